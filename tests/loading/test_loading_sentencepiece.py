"""`tokenizer.model` against SentencePiece itself, on real models trained here."""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from loading_checkpoints import CONFIG, llama_weights, write_single
from loading_ggufs import write_gguf

from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.loading.sentencepiece_model import read_model
from quikjax.loading.tokenizer import read_tokenizer
from quikjax.texts import tokenize

LINES = [line for text in topics.values() for line in text.splitlines() if line.strip()][:1500] + ["añb ünï ✓", "日本語"] * 20
# As LLaMA's was trained: nothing is rewritten, what has no piece becomes bytes.
LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "vocab_size": 600,
}
_TRAINED: dict[str, bytes] = {}


def train(**options: Any) -> bytes:
    """The bytes of a `tokenizer.model`."""
    key = repr(sorted(options.items()))
    if key not in _TRAINED:
        out = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=out, minloglevel=2, **{"vocab_size": 400, **options}
        )
        _TRAINED[key] = out.getvalue()
    return _TRAINED[key]


def publish(directory: Path, model: bytes, **settings: Any) -> Path:
    """A directory with `tokenizer.model` and, where there are settings, `tokenizer_config.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(model)
    if settings:
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def random_texts(count: int, more: tuple[str, ...] = ()) -> list[str]:
    rng = random.Random(0)
    letters = [
        *"abcdehilnorstu     ",
        "\n",
        "\t",
        "é",
        "🙂",
        "日",
        "<",
        ">",
        "1",
        "2",
        ".",
        "  ",
        "▁",
        "ﬁ",
        "\u3000",
        "the",
        " and",
    ]
    letters += ["class", "\r\n", "\x00", "각", "½", "e\u0301", "\u200b", *more]
    words = " ".join(LINES).split(" ")

    def text() -> str:
        kind = rng.random()
        if kind < 0.5:
            return "".join(rng.choice(letters) for _ in range(rng.randrange(25)))
        if kind < 0.8:
            return " " * rng.randrange(3) + rng.choice([" ", "  ", "\n"]).join(rng.choice(words) for _ in range(rng.randrange(8)))
        blocks = ((32, 127), (0x80, 0x3000), (0x1F300, 0x1F700))
        return "".join(chr(rng.randrange(*rng.choice(blocks))) for _ in range(rng.randrange(20)))

    return [text() for _ in range(count)]


TEXTS = random_texts(3000)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (LLAMA, 0),
        ({**LLAMA, "byte_fallback": False}, 0),
        ({**LLAMA, "add_dummy_prefix": False}, 0),
        ({**LLAMA, "remove_extra_whitespaces": True}, 0),
        # SentencePiece adds float32 numbers: where two segmentations have one sum, the last bit chooses.
        ({**LLAMA, "model_type": "unigram"}, 3),
        ({**LLAMA, "model_type": "unigram", "remove_extra_whitespaces": True}, 3),
    ],
    ids=["llama", "without bytes", "without prefix", "spaces collapse", "unigram", "unigram, spaces collapse"],
)
def test_tokens_are_sentencepieces_own(tmp_path: Path, options: dict[str, Any], allowed: int) -> None:
    model = train(**options)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = read_tokenizer(publish(tmp_path, model, tokenizer_class="LlamaTokenizer"))
    assert tokenizer is not None
    found = tokenizer(TEXTS)["input_ids"]
    wrong = [text for text, ids in zip(TEXTS, found, strict=True) if ids != [1, *processor.encode(text)]]
    assert len(wrong) <= allowed, wrong[:5]
    if options["byte_fallback"] and not options["remove_extra_whitespaces"]:
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in found] == [processor.decode(ids[1:]) for ids in found]


def test_normalization_of_characters(tmp_path: Path) -> None:
    """SentencePiece's default rules, for texts without combining marks (`tokenizers` treats a letter and its marks as one)."""
    model = train(model_type="unigram")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = read_tokenizer(publish(tmp_path, model))
    assert tokenizer is not None
    texts = ["ﬁne  ｆｕｌｌ\twidth\u3000 ①½ ", " \n ", "", "K", *(text for text in TEXTS if text.isascii())]
    wrong = [text for text in texts if tokenizer(text)["input_ids"] != [1, *processor.encode(text)]]
    assert len(wrong) <= 3, wrong[:5]
    assert not set(wrong) & set(texts[:4])


def test_user_defined_pieces(tmp_path: Path) -> None:
    model = train(**LLAMA, user_defined_symbols=["<x>", "▁▁", "▁▁▁"])
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    tokenizer = read_tokenizer(publish(tmp_path, model))
    assert tokenizer is not None
    for text in random_texts(1000, ("<x>", "<x>", " <x> ")):
        if text != "<x>":  # the one text that cannot be told from the piece
            assert tokenizer(text)["input_ids"] == [1, *processor.encode(text)], text


SETTINGS: list[tuple[dict[str, Any], dict[str, Any], Callable[[list[int]], list[int]]]] = [
    ({}, {}, lambda ids: [1, *ids]),
    ({"tokenizer_class": "LlamaTokenizer"}, {}, lambda ids: [1, *ids]),
    ({"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": None}, {}, lambda ids: [1, *ids]),
    ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, {}, lambda ids: ids),
    ({"tokenizer_class": "LlamaTokenizer", "add_eos_token": True}, {}, lambda ids: [1, *ids, 2]),
    ({"tokenizer_class": "LlamaTokenizer", "legacy": False}, {}, lambda ids: [1, *ids]),
    ({"tokenizer_class": "T5Tokenizer"}, {}, lambda ids: ids),
    ({}, {"model_type": "llama", "tokenizer_class": "LlamaTokenizer"}, lambda ids: [1, *ids]),
]


@pytest.mark.parametrize(("settings", "config", "expected"), SETTINGS)
def test_a_beginning_is_added_as_llama_adds_it(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], expected: Callable[[list[int]], list[int]]
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=train(**LLAMA))
    tokenizer = read_tokenizer(publish(tmp_path, train(**LLAMA), **settings), config)
    assert tokenizer is not None
    for text in ("hello", " hello", "  hello\n", "x y "):
        assert tokenizer(text)["input_ids"] == expected(processor.encode(text))
        # A prompt has no end behind it, whatever the settings say.
        with_begin = expected(processor.encode(text))
        assert tokenize(tokenizer, text).tolist() == with_begin[: len(with_begin) - (with_begin[-1] == 2)]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)


def test_special_and_added_tokens(tmp_path: Path) -> None:
    model = train(**LLAMA)
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    size = processor.get_piece_size()
    directory = publish(
        tmp_path,
        model,
        tokenizer_class="LlamaTokenizer",
        eos_token={"content": "<|im_end|>", "__type": "AddedToken"},
        added_tokens_decoder={
            "1": {"content": "<s>", "normalized": True, "special": True},
            str(size): {"content": "<|im_start|>", "special": True},
            str(size + 1): {"content": "<|im_end|>", "special": True, "normalized": False},
        },
        chat_template="{{ messages[0].content }}",
    )
    tokenizer = read_tokenizer(directory)
    assert tokenizer is not None
    hello = processor.encode("hello")
    assert tokenizer("<|im_start|>hello<|im_end|>")["input_ids"] == [1, size, *hello, size + 1]
    assert tokenizer.eos_token_id == size + 1
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"
    # BOS that the user typed is BOS, and the only one.
    assert tokenize(tokenizer, "<s>hello").tolist() == [1, *hello]
    assert tokenizer.decode([1, size, *hello], skip_special_tokens=True) == "hello"
    (directory / "added_tokens.json").write_text(json.dumps({"<far>": size + 7}))
    with pytest.raises(QuikError, match="its files do not belong together"):
        read_tokenizer(directory)


def test_a_gguf_gives_the_same_tokens(tmp_path: Path) -> None:
    """One builder serves both."""
    pieces = read_model(publish(tmp_path, train(**LLAMA)) / "tokenizer.model").pieces
    metadata = {
        "ggml.model": "llama",
        "ggml.tokens": pieces.tokens,
        "ggml.scores": pieces.scores,
        "ggml.token_type": [int(kind) for kind in pieces.kinds],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
    }
    gguf = open_source(write_gguf(tmp_path / "model.gguf", llama_weights(), tokenizer=metadata)).tokenizer()
    directory = read_tokenizer(tmp_path)
    assert gguf is not None
    assert directory is not None
    assert gguf(TEXTS)["input_ids"] == directory(TEXTS)["input_ids"]


@pytest.mark.parametrize("content", [b"", b"\x0a", b"\x0a\xff\xff", b"\x0a\x02\x08\x01", b"version https://git-lfs", bytes(64)])
def test_a_damaged_model_file(tmp_path: Path, content: bytes) -> None:
    directory = write_single(tmp_path, CONFIG, llama_weights())
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(QuikError, match=r"the tokenizer in .* cannot be read") as caught:
        open_source(directory).tokenizer()
    assert "\n" not in str(caught.value)


def test_kinds_that_are_refused_by_name(tmp_path: Path) -> None:
    for model, message in (
        (train(model_type="char", vocab_size=100), "models of type char are not supported"),
        (train(model_type="bpe", treat_whitespace_as_suffix=True), "spaces behind words"),
    ):
        with pytest.raises(QuikError, match=message):
            read_tokenizer(publish(tmp_path, model))
