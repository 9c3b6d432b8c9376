"""Vocabularies whose class follows from the model: read in the checkpoint and, from the copied files alone, in an artifact."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from quikjax.checkpoint import tokenizers as stored
from quikjax.errors import QuikError
from quikjax.loading.tokenizer import read_tokenizer, tokenizer_files

LINES = ["hello world, x != y", "the lazy dog's 12345", "a quick brown fox jumps over it"] * 4
TEXT = " Hello the  lazy world"


def word_pieces(directory: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "Hello", "the", "la", "##zy", "world"]
    (directory / "vocab.txt").write_text("\n".join(pieces) + "\n")


def byte_pairs(directory: Path) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    core.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet))
    core.model.save(str(directory))


def sentence_pieces(directory: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(LINES), model_writer=out, vocab_size=40, minloglevel=2)
    (directory / "sentencepiece.bpe.model").write_bytes(out.getvalue())


# By type of the model: its vocabulary, the tokens around a text, and settings that name no class.
FORMS: dict[str, tuple[Callable[[Path], None], list[str], dict[str, Any] | None]] = {
    "bert": (word_pieces, ["[CLS]", "hello", "the", "la", "##zy", "world", "[SEP]"], None),
    "distilbert": (word_pieces, ["[CLS]", "Hello", "the", "la", "##zy", "world", "[SEP]"], {"do_lower_case": False}),
    "roberta": (byte_pairs, ["<s>", "</s>"], None),
    "xlm-roberta": (sentence_pieces, ["<s>", "</s>"], None),
    "camembert": (sentence_pieces, ["<s>", "</s>"], {"model_max_length": 62}),
}


@pytest.mark.parametrize("kind", FORMS)
def test_a_vocabulary_without_a_label_is_its_models_own_also_when_copied(tmp_path: Path, kind: str) -> None:
    write, around, settings = FORMS[kind]
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    write(source)
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": kind, "vocab_size": 300}
    tokenizer = read_tokenizer(source, config)
    assert tokenizer is not None
    ids = tokenizer(TEXT)["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert (tokens if len(around) > 2 else [tokens[0], tokens[-1]]) == around
    assert tokenizer.unk_token_id not in tokenizer("the lazy world")["input_ids"]
    stored.save(tokenizer_files(source), copy)
    assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in source.iterdir())
    again = read_tokenizer(copy, config)
    assert again is not None
    assert again(TEXT)["input_ids"] == ids
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_gpt2s_files_without_a_label_put_nothing_around_a_text(tmp_path: Path) -> None:
    byte_pairs(tmp_path)
    tokenizer = read_tokenizer(tmp_path, {"model_type": "gpt2"})
    assert tokenizer is not None
    assert tokenizer(TEXT)["input_ids"] == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("missing", ["vocab.json", "merges.txt", "both"])
def test_settings_without_a_vocabulary_are_no_tokenizer(tmp_path: Path, missing: str) -> None:
    """`transformers` makes an empty vocabulary, or one without merges, and every text becomes nothing or bytes."""
    byte_pairs(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    for name in ("vocab.json", "merges.txt") if missing == "both" else (missing,):
        (tmp_path / name).unlink()
    with pytest.raises(QuikError, match=r"has no vocabulary \(tokenizer\.json, .*vocab\.json with merges\.txt"):
        read_tokenizer(tmp_path, {"model_type": "gpt2"})


def test_a_missing_package_is_called_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence_pieces(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"not a model")
    with pytest.raises(QuikError, match="comes through the package `sentencepiece`; run: pip install sentencepiece"):
        read_tokenizer(tmp_path, {"model_type": "xlm-roberta"})


def json_file(directory: Path) -> tokenizers.Tokenizer:
    byte_pairs(directory)
    core = tokenizers.Tokenizer(models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt")))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.save(str(directory / "tokenizer.json"))
    return core


@pytest.mark.parametrize("where", ["added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("gap", "spare", "fits"), [(0, 2, True), (1, 3, False), (0, 1, False)])
def test_tokens_added_beside_a_json_file_have_their_published_ids(
    tmp_path: Path, where: str, gap: int, spare: int, fits: bool
) -> None:
    """`gap` ids below the first are nobody's; the model has `spare` rows beyond the file's vocabulary."""
    core = json_file(tmp_path)
    free = core.get_vocab_size()
    ids = {"<|im_start|>": free + gap, "<|im_end|>": free + gap + 1}
    decoder = {str(token): {"content": text, "special": True} for text, token in ids.items()}
    (tmp_path / where).write_text(json.dumps(ids if where == "added_tokens.json" else {"added_tokens_decoder": decoder}))
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = read_tokenizer(tmp_path, {"vocab_size": free + spare})
    assert tokenizer is not None
    text = "<|im_start|>the<|im_end|>"
    expected = [free, *core.encode("the").ids, free + 1] if fits else core.encode(text).ids
    assert tokenizer(text)["input_ids"] == expected
    # Were another id taken for it, a model that says that id would stop.
    assert tokenizer.eos_token_id == (free + 1 if fits else None)


def test_templates_in_a_folder_are_copied(tmp_path: Path) -> None:
    source, copy = tmp_path / "source", tmp_path / "copy"
    (source / "additional_chat_templates").mkdir(parents=True)
    json_file(source)
    (source / "chat_template.jinja").write_text("default")
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    stored.save(tokenizer_files(source), copy)
    shutil.rmtree(source)
    tokenizer = read_tokenizer(copy)
    assert tokenizer is not None
    assert tokenizer.chat_template == {"default": "default", "tool_use": "tools"}
