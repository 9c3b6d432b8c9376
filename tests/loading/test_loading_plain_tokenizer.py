"""Tokenizers without `transformers`: they give its tokens and texts, and where they would not, its own tokenizer is given."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from test_loading_sentencepiece import LLAMA, TEXTS, publish, train
from test_loading_tokenizers import byte_level_metadata
from test_loading_vocabularies import byte_pairs, json_file

from quikjax.errors import QuikError
from quikjax.loading.gguf_tokenizer import rebuild_tokenizer
from quikjax.loading.plain_tokenizer import PlainTokenizer
from quikjax.loading.tokenizer import read_tokenizer


def as_json(directory: Path) -> None:
    core = json_file(directory)
    core.add_special_tokens(["<|end|>"])
    core.save(str(directory / "tokenizer.json"))
    (directory / "special_tokens_map.json").write_text('{"eos_token": "<|end|>"}')


def as_merges(directory: Path) -> None:
    byte_pairs(directory)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": true}')


def as_sentencepiece(directory: Path) -> None:
    publish(directory, train(**LLAMA))


@pytest.mark.parametrize("form", [as_json, as_merges, as_sentencepiece, "gguf"])
def test_tokens_and_texts_are_those_of_the_whole_tokenizer(tmp_path: Path, form: Any) -> None:
    if form == "gguf":
        plain, whole = (rebuild_tokenizer("test.gguf", byte_level_metadata("smollm"), plain=plain) for plain in (True, False))
    else:
        form(tmp_path)
        plain, whole = (read_tokenizer(tmp_path, {"vocab_size": 1000}, plain=plain) for plain in (True, False))
    assert isinstance(plain, PlainTokenizer)
    assert whole is not None
    assert plain.eos_token_id == whole.eos_token_id is not None
    end = whole.eos_token
    for text in [*TEXTS[:300], f"{end}the {end}", ""]:
        for special in (True, False):
            ids = plain(text, add_special_tokens=special, verbose=False)["input_ids"]
            assert ids == whole(text, add_special_tokens=special, verbose=False)["input_ids"]
            for skip in (True, False):
                expected = whole.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
                assert plain.decode(ids, skip_special_tokens=skip) == expected


def test_special_tokens_that_transformers_would_add_are_left_to_it(tmp_path: Path) -> None:
    json_file(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "h"}')
    assert not isinstance(read_tokenizer(tmp_path, plain=True), PlainTokenizer)
    # One that the file does not mark as special.
    metadata = byte_level_metadata("smollm", eos_token_id=1)
    assert not isinstance(rebuild_tokenizer("test.gguf", metadata, plain=True), PlainTokenizer)


@pytest.mark.parametrize("settings", [{"padding_side": "middle"}, {"truncation_side": 1}])
def test_settings_that_are_none_are_refused_all_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    json_file(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for plain in (False, True):
        with pytest.raises(QuikError, match="a setting of the tokenizer cannot be used"):
            read_tokenizer(tmp_path, plain=plain)


def test_transformers_is_not_imported(tmp_path: Path) -> None:
    as_json(tmp_path)
    script = (
        "import sys; from pathlib import Path; from quikjax.loading.tokenizer import read_tokenizer; "
        "print(read_tokenizer(Path(sys.argv[1]), plain=True)('the')['input_ids'], 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    ids = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("the").ids
    assert done.stdout == f"{ids} False\n"
