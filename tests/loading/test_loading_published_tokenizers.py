"""`tokenizer.json`, and `vocab.json` with `merges.txt`: used as they are, whatever class they are labelled."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from quikjax.errors import QuikError
from quikjax.loading.tokenizer import read_tokenizer, tokenizer_files
from quikjax.texts import tokenize

TEXT = "hello world, x != y"
LABELS = [
    None,
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "GPT2Tokenizer",
    "PreTrainedTokenizerFast",
    "TokenizersBackend",
    "GemmaTokenizer",
    "T5Tokenizer",
    "CodeLlamaTokenizer",
    "Qwen2Tokenizer",
    "NoSuchTokenizer",
]


def byte_level() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    _train(core, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", core.token_to_id("<s>")), ("</s>", core.token_to_id("</s>"))]
    )
    return core


def metaspace() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    _train(core)
    return core


def words() -> tokenizers.Tokenizer:
    core = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["<unk>", "<s>", "</s>"]))
    core.enable_truncation(3)  # of whoever saved it; no text may be cut by it
    core.enable_padding(length=10)
    return core


def _train(core: tokenizers.Tokenizer, **options: Any) -> None:
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<unk>", "<s>", "</s>"], **options)
    core.train_from_iterator([TEXT, "the lazy dog", "12345 !!", "a  b\n\nc"] * 5, trainer)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("make", [byte_level, metaspace, words])
def test_a_json_file_is_used_as_it_is(tmp_path: Path, make: Any, label: str | None) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "add_eos_token": True,
        "legacy": False,
    }
    settings |= {"add_prefix_space": True, "clean_up_tokenization_spaces": True, "pad_token": "[absent]", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | ({"tokenizer_class": label} if label else {})))
    truth = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    truth.no_truncation()
    truth.no_padding()
    tokenizer = read_tokenizer(tmp_path, {"model_type": "llama"})
    assert tokenizer is not None
    rng = random.Random(0)
    texts = ["", TEXT, " " + TEXT, "hello  \n world", "<s>hello</s>", "x</s> y", "é🙂 12345"]
    texts += ["".join(rng.choice([*"helo wrd,!=xy12\n", "</s>", "the"]) for _ in range(rng.randrange(30))) for _ in range(100)]
    for text in texts:
        assert tokenizer(text)["input_ids"] == truth.encode(text).ids, text
    ids = truth.encode(TEXT).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == truth.decode(ids, skip_special_tokens=False)
    assert tokenizer.eos_token_id == truth.token_to_id("</s>")
    # What the vocabulary does not have is no special token: it would take the id of another.
    assert tokenizer.pad_token is None
    assert len(tokenizer) == truth.get_vocab_size()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_byte_order_mark_before_any_file(tmp_path: Path, name: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "special_tokens_map.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_bytes(b"\xef\xbb\xbf{{ messages }}")
    before = read_tokenizer(tmp_path)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
    after = read_tokenizer(tmp_path)
    assert before is not None
    assert after is not None
    assert after(TEXT)["input_ids"] == before(TEXT)["input_ids"]
    assert after.chat_template == before.chat_template == "{{ messages }}"


def test_a_tokenizer_in_another_encoding_is_called_that(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_bytes((tmp_path / "tokenizer.json").read_text().encode("utf-16"))
    with pytest.raises(QuikError, match=r"tokenizer.json is UTF-16 text; save it as UTF-8"):
        read_tokenizer(tmp_path)


def test_settings_from_older_files(tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    special = {"eos_token": "</s>", "additional_special_tokens": ["<s>", "[no]"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "old {{ messages[0].content }}"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("</s>", None)
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "old hi"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<s>", "model_max_length": 77, "extra_special_tokens": ["</s>"], "chat_template": "new"})
    )
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].content }}")
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    assert (tokenizer.eos_token, tokenizer.model_max_length) == ("<s>", 77)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "file hi"
    assert [file.name for file in tokenizer_files(tmp_path)] == sorted(file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    ["[]", "{", '{"padding_side": "middle"}', '{"added_tokens_decoder": {"x": {}}}', '{"chat_template": [{"x": 1}]}'],
)
def test_damaged_settings(tmp_path: Path, settings: str) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(settings)
    with pytest.raises(QuikError) as caught:
        read_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_vocabulary_and_merges_as_opt_publishes_them(tmp_path: Path) -> None:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], initial_alphabet=alphabet)
    core.train_from_iterator([TEXT, "the lazy dog's 12345", "#version is a word"] * 5, trainer)
    core.model.save(str(tmp_path))
    merges = (tmp_path / "merges.txt").read_text()
    assert merges.startswith("#version")
    end = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "__type": "AddedToken"}
    settings = {"bos_token": end, "eos_token": end, "unk_token": end, "pad_token": "<pad>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = read_tokenizer(tmp_path)
    assert tokenizer is not None
    for text in (TEXT, " " + TEXT, "the  dog's\n\n123 é🙂", "# versions", "a<pad>b"):
        assert tokenizer(text)["input_ids"] == [2, *core.encode(text).ids]
        assert tokenizer.decode(tokenizer(text)["input_ids"][1:]) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 2, 1)
    assert tokenize(tokenizer, "</s>the").tolist() == [2, *core.encode("the").ids]
    (tmp_path / "merges.txt").write_bytes(b"\xef\xbb\xbf" + merges.replace("\n", "\r\n").encode())
    (tmp_path / "vocab.json").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "vocab.json").read_bytes())
    again = read_tokenizer(tmp_path)
    assert again is not None
    assert again(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    (tmp_path / "merges.txt").write_text("no such\n")
    with pytest.raises(QuikError, match=r"cannot be read: its tokenizer's merges do not fit"):
        read_tokenizer(tmp_path)
