"""GGUF files as they come: odd bytes in what nobody computes with, odd names, parts."""

import struct
from pathlib import Path

import numpy as np
import pytest
from loading_checkpoints import CONFIG, Weights, complaint, llama_weights, refusal
from loading_ggufs import write_gguf

from quikjax.errors import QuikError
from quikjax.loading import open_source


@pytest.fixture(scope="module")
def weights() -> Weights:
    return llama_weights()


@pytest.mark.parametrize("key", ["general.name", "general.license", "tokenizer.chat_template"])
def test_one_bad_byte_in_a_text_for_people(tmp_path: Path, weights: Weights, key: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights, extra={key: "caf_!"})
    path.write_bytes(path.read_bytes().replace(b"caf_!", b"caf\xe9!"))
    source = open_source(path)
    assert source.metadata[key] == "caf\ufffd!"  # type: ignore[attr-defined]
    assert np.array_equal(source.read("model.norm.weight"), weights["model.norm.weight"])


@pytest.mark.parametrize("text", [b"general.name", b"output_norm.weight"])
def test_a_key_and_a_tensors_name_must_be_text(tmp_path: Path, weights: Weights, text: bytes) -> None:
    path = write_gguf(tmp_path / "m.gguf", weights, extra={"general.name": "x"})
    path.write_bytes(path.read_bytes().replace(text, text[:-1] + b"\xe9"))
    assert "is not a readable GGUF file" in refusal(path)


def test_a_bad_byte_in_the_vocabulary_is_told_when_it_is_needed(tmp_path: Path, weights: Weights) -> None:
    tokenizer = {"ggml.model": "gpt2", "ggml.pre": "gpt-2", "ggml.tokens": ["a", "zz_"], "ggml.merges": ["a a"]}
    path = write_gguf(tmp_path / "m.gguf", weights, tokenizer=tokenizer)
    path.write_bytes(path.read_bytes().replace(b"zz_", b"zz\xff"))
    assert complaint(path) is None
    with pytest.raises(QuikError, match=r"number 1 of tokenizer\.ggml\.tokens is not UTF-8 text"):
        open_source(path).tokenizer()


@pytest.mark.parametrize("name", ["model.GGUF", "model.bin", "sha256-0123456789abcdef", "model"])
def test_a_file_is_known_by_its_mark(tmp_path: Path, weights: Weights, name: str) -> None:
    (tmp_path / "models").mkdir()
    path = write_gguf(tmp_path / "models" / name, weights)
    (tmp_path / "models" / "._notes.gguf").write_bytes(b"another system's notes about the file")
    for model in (path, path.parent):
        assert np.array_equal(open_source(model).read("model.norm.weight"), weights["model.norm.weight"])


def test_an_old_format_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(struct.pack("<I", 0x67676A74) + bytes(64))
    assert "an older format of llama.cpp (GGML)" in refusal(tmp_path / "old.gguf")


def test_parts_of_a_model_are_told_at_once(tmp_path: Path, weights: Weights) -> None:
    first = write_gguf(tmp_path / "m-00001-of-00002.gguf", weights, extra={"split.count": 2, "split.no": 0})
    assert "one of 2 parts of a model; join them with: llama-gguf-split --merge" in refusal(first)
    # All parts but the first say next to nothing of themselves.
    rest = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", 11) + b"split.count" + struct.pack("<IH", 2, 2)
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(rest)
    assert "one of 2 parts" in refusal(tmp_path / "m-00002-of-00002.gguf")
    assert "holds a model in 2 GGUF parts (m-00001-of-00002.gguf, ...)" in refusal(tmp_path)


def test_metadata_that_is_switched_off(tmp_path: Path, weights: Weights) -> None:
    off = {"llama.attention.causal": True, "llama.logit_scale": 1.0, "llama.use_parallel_residual": False}
    assert complaint(write_gguf(tmp_path / "off.gguf", weights, extra=off)) is None
    assert "llama.logit_scale" in refusal(write_gguf(tmp_path / "on.gguf", weights, extra={"llama.logit_scale": 0.5}))
    assert CONFIG["vocab_size"] == 128
