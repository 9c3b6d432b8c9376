"""SentencePiece's rules with the means of `tokenizers`: the one builder for `tokenizer.model` and for GGUF's "llama" kind.

Spaces become "▁", one is put in front of a text, and characters without a piece become bytes or the unknown token. BPE's merges
follow from the pieces' scores; a unigram model takes the segmentation with the greatest sum of scores.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal

from quikjax.loading.sentencepiece_model import Kind, Pieces

_SPACE = "▁"  # how SentencePiece writes a space

# Where a space is put in front: of each stretch of text between special tokens, or only of one that begins the text.
Prefix = Literal["each", "first"]


def build_sentencepiece(
    pieces: Pieces,
    *,
    unigram: bool = False,
    prefix: Prefix | None = "each",
    collapse_spaces: bool = False,
    charsmap: bytes = b"",
    user_defined_in_text: bool = True,
    special: Sequence[str] = (),
) -> Any:
    """A `tokenizers.Tokenizer` that gives each text the tokens that SentencePiece gives it; without BOS and EOS.

    Exact for BPE whose pieces have scores of their own, as trained ones do. `tokenizers` differs in rare texts where a compiled
    normalization meets combining marks, where sums of scores are equal to the last bits of float32, and where user-defined
    pieces of a unigram model are runs of spaces.

    Args:
        pieces: the vocabulary.
        unigram: how pieces are chosen: by the sum of scores, or by merging the best pair (BPE).
        prefix: where "▁" is put in front of text; `None` for nowhere.
        collapse_spaces: spaces at both ends go, several between become one.
        charsmap: SentencePiece's compiled normalization of characters.
        user_defined_in_text: whether user-defined pieces are pieces of a text like others, as SentencePiece takes them; else
            they part the text as control tokens do, as llama.cpp takes them.
        special: special tokens beside the control pieces, which with the prefix "first" must be known here. They are not added,
            and are to be added as `normalized` with that prefix, not so with another.

    Raises:
        ValueError: the merges or the scores do not make a tokenizer.
    """
    import tokenizers
    from tokenizers import decoders, normalizers

    tokenizer = tokenizers.Tokenizer(_unigram_model(pieces) if unigram else _bpe_model(pieces))
    of_kind = {kind: [token for token, k in zip(pieces.tokens, pieces.kinds, strict=True) if k == kind] for kind in Kind}
    # In a unigram model they are chosen by their score.
    in_text = of_kind[Kind.USER_DEFINED] if user_defined_in_text and not unigram else []
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    if collapse_spaces:
        steps += [normalizers.Replace(tokenizers.Regex(r"\A +"), ""), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if prefix:
        # Tokens that are looked for in the normalized text do not part what is normalized: it then has one beginning.
        steps.append(_prepend(in_text, [*of_kind[Kind.CONTROL], *special] if prefix == "first" else []))
    steps.append(normalizers.Replace(" ", _SPACE))
    if collapse_spaces:
        steps.append(normalizers.Replace(tokenizers.Regex(rf"{_SPACE}+\z"), ""))
    tokenizer.normalizer = normalizers.Sequence(steps)
    back = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    control = [tokenizers.AddedToken(token, normalized=prefix == "first", special=True) for token in of_kind[Kind.CONTROL]]
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=True) for token in in_text])
    if not user_defined_in_text:
        tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in of_kind[Kind.USER_DEFINED]])
    return tokenizer


def _prepend(in_text: list[str], special: list[str]) -> Any:
    """Put "▁" in front of a text, unless it begins with one of `special`, or is one of `in_text`.

    The spelling of such tokens is normalized as a text is, and must stay what it is. A text that is a user-defined piece and
    nothing else cannot be told from it, and lacks its "▁".
    """
    import tokenizers
    from tokenizers import normalizers

    if not in_text and not special:
        return normalizers.Prepend(_SPACE)
    spared = [*map(re.escape, special), *(rf"{re.escape(token)}\z" for token in in_text)]
    return normalizers.Replace(tokenizers.Regex(rf"\A(?!{'|'.join(spared)})"), _SPACE)


def _bpe_model(pieces: Pieces) -> Any:
    from tokenizers import models

    unknown = next((token for token, kind in zip(pieces.tokens, pieces.kinds, strict=True) if kind == Kind.UNKNOWN), None)
    vocabulary = {token: i for i, token in enumerate(pieces.tokens)}
    merges = merges_from_scores(*pieces)
    return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=Kind.BYTE in pieces.kinds)


def _unigram_model(pieces: Pieces) -> Any:
    from tokenizers import models

    unknown = next((i for i, kind in enumerate(pieces.kinds) if kind == Kind.UNKNOWN), None)
    worst = min((score for score, kind in zip(pieces.scores, pieces.kinds, strict=True) if kind == Kind.NORMAL), default=0.0)

    def score(own: float, kind: int) -> float:
        if kind == Kind.USER_DEFINED:
            return -0.1  # nearly certain to be chosen, as in SentencePiece
        # Others are nobody's text and never chosen. (Byte pieces are taken by fallback, not by score.)
        return own if kind == Kind.NORMAL else worst - 1e6

    vocabulary = [(token, score(own, kind)) for token, own, kind in zip(*pieces, strict=True)]
    return models.Unigram(vocabulary, unknown, Kind.BYTE in pieces.kinds)


def merges_from_scores(tokens: list[str], scores: list[float], kinds: list[int]) -> list[tuple[str, str]]:
    """The merges that do what SentencePiece does with scores: of all neighbours that together are a piece, join the best first.

    A piece gives one merge for every cut into two pieces, so that each way of reaching it has the piece's rank; the
    better score comes first, and among equal ones the lower token.

    >>> merges_from_scores(["a", "b", "ab", "aba"], [0.0, 0.0, -1.0, -2.0], [1, 1, 1, 1])
    [('a', 'b'), ('ab', 'a')]
    """
    # Control, unknown and byte tokens never come out of a merge; unused ones fill a table up and are nobody's text.
    merged = {
        token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind in (Kind.NORMAL, Kind.USER_DEFINED)
    }
    ranked = []
    for token, i in merged.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in merged and right in merged:
                ranked.append((-scores[i], i, -cut, left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]
