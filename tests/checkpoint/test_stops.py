"""Where a text ends: every file of a checkpoint that names an end is heard, and artifact and export remember it."""

import json
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import quikjax
from quikjax import checkpoint
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.generation import Generator
from quikjax.generation.programs import Programs
from quikjax.models.base import Transformer
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.testing import chain_config, chain_model, chain_weights, forward, tiny_model, write_chain_checkpoint

sys.path.append(str(Path(__file__).parents[1] / "loading"))
from loading_ggufs import write_gguf

# What the generators of all chains here compile.
PROGRAMS = Programs()
RING = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "so"]


def word_tokenizer(end: str | None = None) -> Any:
    """One token a word of `WORDS`."""
    import tokenizers
    import transformers
    from tokenizers import models, pre_tokenizers

    core = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="so"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **({} if end is None else {"eos_token": end}))


def said(model: Transformer, start: int = 0, stop: Any = None) -> list[int]:
    """The tokens that a model of `RING` says behind `start`, at most 12."""
    out = Generator(model, programs=PROGRAMS).generate([[start]], max_new_tokens=12, stop=stop)
    return out.tokens[0, : out.lengths[0]].tolist()


def published(directory: Path, config: Any = None, generation: Any = None, end: str | None = None) -> Path:
    """A chain of `RING` whose files name these ends."""
    write_chain_checkpoint(directory, RING, **({} if config is None else {"eos_token_id": config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    if end is not None:
        word_tokenizer(end).save_pretrained(directory)
    return directory


def test_a_chain_says_what_it_was_made_to_say() -> None:
    model = chain_model([2, 0, 1, 3])
    logits = forward(model, jnp.asarray([[3, 0, 1, 2, 2]]))
    np.testing.assert_array_equal(logits.argmax(-1), [[3, 2, 0, 1, 1]])
    assert model.stops == ()
    assert said(chain_model(RING)) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    with pytest.raises(ValueError, match="vocabulary of 2"):
        chain_weights([0, 2])


def test_one_stop_or_several_or_the_models_own() -> None:
    model = chain_model(RING, eos_token_id=7)
    assert model.stops == (7,)
    assert said(model) == [1, 2, 3, 4, 5, 6]
    assert said(model, stop=4) == [1, 2, 3]
    assert said(model, stop=np.int64(4)) == [1, 2, 3]
    for several in ([4, 2], (2, 4), {4, 2}, np.asarray([4, 2]), iter([4, 2])):
        assert said(model, stop=several) == [1]
    assert said(model, stop=[]) == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert said(model, stop=1) == []
    for wrong in ("4", [4.0], [4, "2"], [None]):
        with pytest.raises(QuikError, match=r"stop is .*; give a token's number, or several"):
            said(model, stop=wrong)


def test_rows_that_end_at_different_stops() -> None:
    model = chain_model(RING, eos_token_id=[5, 9])
    out = Generator(model, programs=PROGRAMS).generate([[0], [6], [5], [8]], max_new_tokens=8)
    np.testing.assert_array_equal(out.lengths, [4, 2, 3, 0])
    rows = [row[:length].tolist() for row, length in zip(out.tokens, out.lengths, strict=True)]
    assert rows == [[1, 2, 3, 4], [7, 8], [6, 7, 8], []]
    assert all(np.isin(row[length:], [5, 9]).all() for row, length in zip(out.tokens, out.lengths, strict=True))


# Configuration, generation configuration, the tokenizer's end, and what they come to.
ENDS: list[tuple[Any, Any, str | None, tuple[int, ...]]] = [
    (None, None, None, ()),
    (None, None, "dog", (7,)),
    ([9], {"eos_token_id": [8, 9], "temperature": 0.6}, "lazy", (6, 8, 9)),
    (None, {"eos_token_id": None}, None, ()),
    (3, {"temperature": 0.6}, None, (3,)),
    (7, None, None, (7,)),
    ([7, 5], None, None, (5, 7)),
    (None, {"eos_token_id": 6}, None, (6,)),
    (None, {"eos_token_id": [6, 3]}, None, (3, 6)),
    (3, None, "dog", (3, 7)),
    (-1, {"eos_token_id": [-1, 4]}, None, (4,)),
    (99, None, None, ()),  # beyond the vocabulary: nothing ends with it
]


@pytest.mark.parametrize(("config", "generation", "end", "stops"), ENDS)
def test_every_file_is_heard(tmp_path: Path, config: Any, generation: Any, end: str | None, stops: tuple[int, ...]) -> None:
    assert quikjax.load(published(tmp_path / "source", config, generation, end))[0].stops == stops


@pytest.mark.parametrize(
    ("config", "generation", "end", "stops"),
    [*ENDS[:5], *(pytest.param(*row, marks=pytest.mark.long) for row in ENDS[5:])],
)
def test_every_file_is_remembered(tmp_path: Path, config: Any, generation: Any, end: str | None, stops: tuple[int, ...]) -> None:
    source = published(tmp_path / "source", config, generation, end)
    model, tokenizer = quikjax.load(source)
    quantize_checkpoint(source, tmp_path / "artifact", "fp")
    export_safetensors(tmp_path / "artifact", tmp_path / "export")
    checkpoint.save(tmp_path / "saved", model, tokenizer=tokenizer)
    for path in (tmp_path / "artifact", tmp_path / "export", tmp_path / "saved"):
        assert quikjax.load(path)[0].stops == stops
    travelled = tmp_path / "export" / "generation_config.json"
    # Libraries that generate do not ask the tokenizer: what it names is in a file that they read.
    assert travelled.exists() == (generation is not None or end is not None)
    if generation is None and end is not None:
        assert json.loads(travelled.read_text()) == {"eos_token_id": stops[0] if len(stops) == 1 else list(stops)}
    if generation is not None:
        assert json.loads(travelled.read_text()) == generation
        assert checkpoint.Reader(tmp_path / "artifact").generation_config() == generation


def test_stops_of_a_gguf_file(tmp_path: Path) -> None:
    """Its ends of text, of turn and of message."""
    tokenizer = {
        "ggml.model": "llama",
        "ggml.tokens": ["<unk>", *(f"▁{word}" for word in WORDS[1:])],
        "ggml.scores": [0.0] * 10,
        "ggml.token_type": [2, *[1] * 9],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 9,
        "ggml.eot_token_id": 4,
        "ggml.eom_token_id": 6,
    }
    file = write_gguf(tmp_path / "chain.gguf", chain_weights(RING), config=chain_config(RING), tokenizer=tokenizer)
    model, _ = quikjax.load(file)
    assert model.stops == (4, 6, 9)
    assert said(model) == [1, 2, 3]
    assert said(model, 4) == [5]
    quantize_checkpoint(file, tmp_path / "artifact", "fp")
    export_safetensors(tmp_path / "artifact", tmp_path / "export")
    for path in (tmp_path / "artifact", tmp_path / "export"):
        again, _ = quikjax.load(path)
        assert again.stops == (4, 6, 9)
        assert said(again) == [1, 2, 3]
    written = json.loads((tmp_path / "export" / "generation_config.json").read_text())
    assert written == {"bos_token_id": 1, "eos_token_id": [9, 4, 6]}


def test_stops_that_a_user_set_are_saved(tmp_path: Path) -> None:
    model = chain_model(RING, eos_token_id=7)
    model.stops = (2, 7)
    checkpoint.save(tmp_path / "artifact", model, generation_config={"top_p": 0.5})
    assert checkpoint.restore(tmp_path / "artifact")[0].stops == (2, 7)
    assert checkpoint.Reader(tmp_path / "artifact").generation_config() == {"top_p": 0.5, "eos_token_id": [2, 7]}


def test_an_artifact_without_the_file_still_ends(tmp_path: Path) -> None:
    """As those of earlier versions: configuration and tokenizer name the ends."""
    params = {name: jnp.asarray(array) for name, array in chain_weights(RING).items()}
    with checkpoint.Writer(tmp_path / "artifact", config=chain_config(RING, eos_token_id=3)) as writer:
        for name, members in checkpoint.split_parts(params, ("model", "layers")).items():
            writer.write_part(name, members)
        writer.finish(tokenizer=word_tokenizer("lazy"))
    assert checkpoint.restore(tmp_path / "artifact")[0].stops == (3, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": "2"}', "generation_config.json has eos_token_id = '2', which should be a token's number"),
        ('{"eos_token_id": [2, "3"]}', "should be a token's number or a list"),
        ('{"eos_token_id": 2', "is not valid JSON"),
        ("[2]", "holds a JSON list where an object"),
        ('{"eos_token_id": 2, "top_p": NaN}', "cannot be saved as JSON"),
    ],
)
def test_damage_is_said_before_the_work(tmp_path: Path, content: str, message: str) -> None:
    source = published(tmp_path / "source")
    (source / "generation_config.json").write_text(content)
    with pytest.raises(QuikError, match=message):
        quantize_checkpoint(source, tmp_path / "artifact", "fp")
    assert not (tmp_path / "artifact.partial").exists()


def test_a_random_model_ends_where_its_configuration_says() -> None:
    assert tiny_model().stops == (256,)
    assert tiny_model(eos_token_id=None).stops == ()
