"""The tokenizer of an artifact and of an export: the source's own files, as they are, in words that transformers 4 knows."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp

import quikjax
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.testing import tiny_model, tiny_tokenizer, write_tiny_checkpoint

SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}


def test_files_are_copied_and_not_saved_anew(tmp_path: Path) -> None:
    source = write_tiny_checkpoint(tmp_path / "source", **SMALL)
    # Spaces, an order and fields that no library would write.
    settings = '{ "tokenizer_class" :"LlamaTokenizer","zebra": 1,\n"eos_token":"<|end|>", "add_eos_token": true}'
    (source / "tokenizer_config.json").write_text(settings)
    (source / "special_tokens_map.json").write_text('{"bos_token":   "<|end|>"}')
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (source / "tokenizer.json").write_text(json.dumps(json.loads((source / "tokenizer.json").read_text()), indent=3))
    (source / "modeling.py").write_text("raise SystemExit")
    quantize_checkpoint(source, tmp_path / "artifact", "fp")
    export_safetensors(tmp_path / "artifact", tmp_path / "export")
    names = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(file.name for file in (tmp_path / "artifact" / "tokenizer").iterdir()) == names
    for name in names:
        original = (source / name).read_bytes()
        assert (tmp_path / "artifact" / "tokenizer" / name).read_bytes() == original
        assert (tmp_path / "export" / name).read_bytes() == original
    assert not (tmp_path / "export" / "modeling.py").exists()
    ids = tiny_tokenizer()("añ 🙂")["input_ids"]
    for path in (source, tmp_path / "artifact", tmp_path / "export"):
        tokenizer = quikjax.load(path)[1]
        assert tokenizer is not None
        assert tokenizer("añ 🙂")["input_ids"] == ids
        assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|end|>", "<|end|>")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x!"


def test_words_of_transformers_5_are_said_in_those_of_4(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    fields: dict[str, Any] = {"rope_theta": None, "rope_parameters": rope, "dtype": "float32", "eos_token_id": 256}
    source = write_tiny_checkpoint(tmp_path / "source", **SMALL, **fields)
    settings = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|end|>"], "eos_token": "<|end|>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    quantize_checkpoint(source, tmp_path / "artifact", "fp")
    export_safetensors(tmp_path / "artifact", tmp_path / "export")
    written = json.loads((tmp_path / "export" / "tokenizer_config.json").read_text())
    expected = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|end|>"], "eos_token": "<|end|>"}
    assert written == expected
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (5e5, {"rope_type": "linear", "factor": 2.0})
    assert config["torch_dtype"] == "float32"
    assert "dtype" not in config
    one, other = (quikjax.load(path)[0] for path in (source, tmp_path / "export"))
    ids = jnp.asarray([[1, 2, 3, 200]])
    assert (one(ids) == other(ids)).all()


def test_a_tokenizer_that_was_rebuilt_is_labelled_for_every_version(tmp_path: Path) -> None:
    quikjax.save(tmp_path / "artifact", tiny_model(), tokenizer=tiny_tokenizer())
    settings = json.loads((tmp_path / "artifact" / "tokenizer" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "backend" not in settings
