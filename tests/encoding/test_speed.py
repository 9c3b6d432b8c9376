"""How fast encoders and their products are: who takes turns, what is timed, and what `quikjax bench` prints of it."""

import csv
import json
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_encoder import VARIANTS, build

import quikjax
from quikjax import executables
from quikjax.cli import bench
from quikjax.cli.bench_tables import compared, written
from quikjax.encoding import speed
from quikjax.encoding.speed import RunningEncoder, keep_pattern, product_speeds
from quikjax.errors import QuikError
from quikjax.models.base import project
from quikjax.models.encoder import Encoder
from quikjax.models.registry import dotted, pure_params
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, find_recipe
from quikjax.rounds import Prepared, speeds
from quikjax.speed_tests import EncoderTest, parse_test
from quikjax.weights.formats import dequantize

Run = Callable[..., "subprocess.CompletedProcess[str]"]
# As `BertBlock.groups` has them, with (N, K) of a block 48 wide whose MLP is 80 wide.
SHAPES = {
    "attention_input": ((48,) * 3, 48),
    "attention_output": ((48,), 48),
    "mlp_input": ((80,), 48),
    "mlp_output": ((48,), 80),
}


def packed(model: Encoder, recipe: Recipe | str = "rtn-w4a4") -> Encoder:
    return nnx.merge(nnx.split(model)[0], quantize_params(pure_params(model), recipe))


@pytest.fixture(scope="module")
def quantized() -> Encoder:
    return packed(build("minilm"))


def test_tests_of_encoders_have_names() -> None:
    assert parse_test(" en16 ", 4) == EncoderTest(16, batch=4)
    for wrong in ("en", "en0", "en16+tg4", "xx"):
        with pytest.raises(QuikError, match=re.escape(f'no test "{wrong}"') + ".* or en128 for an encoder"):
            parse_test(wrong)


def test_models_take_turns() -> None:
    turns: list[str] = []

    def prepare(name: str, seconds: float) -> Callable[[EncoderTest], Prepared]:
        def run() -> float:
            turns.append(name)
            return seconds * len(turns)

        return lambda test: Prepared(run, seconds, test.length)

    tests = [EncoderTest(8, batch=2), EncoderTest(4)]
    found = speeds(tests, {"a": prepare("a", 1.0), "b": prepare("b", 2.0)}, lambda test: test.batch * test.length, 2)
    assert turns == ["a", "b"] * 4
    assert [one.rounds for one in found["a"]] == [(16 / 1, 16 / 3), (4 / 5, 4 / 7)]
    assert [one.rounds for one in found["b"]] == [(16 / 4, 16 / 8), (4 / 12, 4 / 16)]
    assert [(one.test, one.compile_seconds, one.peak_bytes) for one in found["b"]] == [(tests[0], 2.0, 8), (tests[1], 2.0, 4)]


@pytest.mark.parametrize("unrolled", [False, True])
def test_the_timed_product_is_the_models_layer(quantized: Encoder, unrolled: bool) -> None:
    """Of packed weights and of their floats, in the form for a CPU and in that for a GPU; and the last block is in the end."""
    encoder = RunningEncoder(quantized, unrolled=unrolled)
    number, blocks = speed.first_packed_run(encoder) or (-1, [])
    assert number == 0
    assert len(blocks) == 2
    params = [nnx.to_pure_dict(nnx.state(block)) for block in blocks]
    for group in ("attention_input", "mlp_output"):
        names = type(blocks[0]).groups[group]
        x = jnp.asarray(np.random.default_rng(0).standard_normal((5, SHAPES[group][1])), jnp.float32)
        layers = [layer_of(blocks[-1], name) for name in names]
        as_quantized = jax.jit(lambda x, layers=layers: project(x, *layers))(x)
        in_floats = [x @ dequantize(layer.weight.get_value()).T + layer.bias.get_value() for layer in layers]
        made = (
            (speed.running_layers(encoder.layout, encoder.params["runs"]["0"], names), as_quantized),
            (speed.float_layers(encoder, params, names), in_floats),
        )
        for form, expected in made:
            _, ys = speed._one_by_one(x, form) if unrolled else speed._in_a_scan(x, form, count=len(blocks))
            for got, want in zip(ys, expected, strict=True):
                # In a scan an element of the first row changes from block to block.
                np.testing.assert_allclose(got[1:], want[1:], rtol=2e-5, atol=2e-5)
        assert not np.allclose(as_quantized[0][1:], in_floats[0][1:], rtol=1e-3), "activations of 4 bits"


def layer_of(block: Any, name: str) -> Any:
    for step in name.split("."):
        block = getattr(block, step)
    return block


def test_products_with_packed_weights_are_listed(quantized: Encoder) -> None:
    found = product_speeds(RunningEncoder(quantized), 8, 1)
    assert {one.group: (one.outputs, one.inputs) for one in found} == SHAPES
    assert [one.layers for one in found] == list(type(quantized.blocks["0"]).groups.values())
    for one in found:
        assert one.rows == 8
        assert min(one.quantized, one.floats) > 0
        assert one.gains == (one.quantized < one.floats)


def test_products_and_blocks_in_floats_are_left_out() -> None:
    """The first block is kept whole, of the second its MLP's last layer."""
    recipe = find_recipe("rtn-w4a4").keeping(r"layer\.0|1\.output")
    encoder = RunningEncoder(packed(build("minilm"), recipe))
    number, blocks = speed.first_packed_run(encoder) or (-1, [])
    assert (number, len(blocks)) == (1, 1)
    assert [one.group for one in product_speeds(encoder, 8, 1)] == ["attention_input", "attention_output", "mlp_input"]
    assert product_speeds(RunningEncoder(build("minilm")), 2, 1) == ()


@pytest.mark.parametrize("name", ["minilm", "distilbert"])
def test_the_pattern_keeps_these_layers_and_no_others(name: str) -> None:
    model = build(name)
    groups = type(model.blocks["0"]).groups
    paths = [path for path in dotted(pure_params(model)) if find_recipe("rtn-w4a4").rule_for(path) is not None]
    for chosen in (["mlp_output"], ["attention_input", "mlp_output"]):
        layers = [layer for group in chosen for layer in groups[group]]
        kept = find_recipe("rtn-w4a4").keeping(keep_pattern(layers))
        expected = {f"{'.'.join(model.block_path)}.{block}.{layer}.weight" for block in model.blocks for layer in layers}
        assert {path for path in paths if kept.rule_for(path) is None} == expected


def save(directory: Path, model: Encoder) -> Path:
    quikjax.save(directory, model, config={**VARIANTS["minilm"], "vocab_size": 257})
    return directory


@pytest.fixture(scope="module")
def artifacts(quantized: Encoder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("encoders")
    return {"quantized": save(place / "quantized", quantized), "original": save(place / "original", build("minilm"))}


def test_bench_measures_an_encoder_and_its_products(quikjax_command: Run, artifacts: dict[str, Path]) -> None:
    """There is no tokenizer, and none is needed."""
    ours, theirs = map(str, artifacts.values())
    tests = ("-t", "en8", "-b", "1", "-b", "4", "-r", "2")
    done = quikjax_command("bench", ours, "--against", theirs, *tests, "-o", "json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    sizes = [(row["model"], row["test"], row["batch"]) for row in rows]
    assert sizes == [(ours, "en8", 1), (ours, "en8", 4), (theirs, "en8", 1), (theirs, "en8", 4)]
    for row in rows:
        assert len(row["samples"]) == 2
        assert row["mean"] == pytest.approx(sum(row["samples"]) / 2)
        assert row["compile_seconds"] > 0
        assert row["peak_bytes"] > 4 * 257 * 48  # at least the table
        shapes = [] if row["model"] == theirs else list(SHAPES.values())
        assert [(tuple(one["outputs"]), one["inputs"]) for one in row["products"]] == shapes
        assert all(one["rows"] == 8 * row["batch"] for one in row["products"])
        slower = [layer for one in row["products"] if one["faster"] == "floats" for layer in one["layers"]]
        assert row["keep"] == (keep_pattern(slower) if slower else None)
    assert [row["over_against"] for row in rows] == [rows[0]["mean"] / rows[2]["mean"], rows[1]["mean"] / rows[3]["mean"], 1, 1]


def test_without_tests_it_is_texts_that_the_encoder_reads(quikjax_command: Run, artifacts: dict[str, Path]) -> None:
    done = quikjax_command("bench", artifacts["quantized"], "-r", "1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "model",
        "batch",
        "test",
        "tokens/s",
        "compiled in s",
        "memory",
    ]
    assert lines[2].split("|")[3].strip() == "en32"
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == ["product of a block", "N x K", "32 rows"]
    assert "attention.self.query, attention.self.key, attention.self.value | 48+48+48 x 48 |" in lines[6]


def row(model: str, test: str, times: Sequence[tuple[float, float]], keep: str | None) -> dict[str, Any]:
    products = [
        {
            "layers": [name],
            "outputs": [8],
            "inputs": 4,
            "rows": int(test[2:]),
            "quantized_us": ours,
            "floats_us": theirs,
            "faster": "quantized" if ours < theirs else "floats",
        }
        for name, (ours, theirs) in zip(("wide", "narrow"), times, strict=False)
    ]
    figures = {"mean": 10.0, "deviation": 1.0, "samples": [9.0, 11.0], "compile_seconds": 0.5, "peak_bytes": 2000}
    return {"model": model, "batch": 1, "test": test, **figures, "products": products, "keep": keep}


def test_tables_say_which_products_gain() -> None:
    rows = [
        row("ours", "en64", [(5.0, 6.0), (7.0, 8.0)], None),
        row("ours", "en16", [(2.0, 3.0), (4.0, 3.5)], r"\d\.narrow"),
        row("ours", "en4", [(2.0, 1.0), (2.0, 1.5)], r"\d\.(wide|narrow)"),
        row("theirs", "en64", [], None),
        row("theirs", "en16", [], None),
        row("theirs", "en4", [], None),
    ]
    rows = compared([{**one, "mean": 20.0} if one["model"] == "ours" else one for one in rows], "theirs")
    table = written(rows, "md", "theirs")
    assert table.splitlines()[0].split("|")[-2].strip() == "over theirs"
    assert "| 20.00 ± 1.00 |" in table
    assert table.count("2.00x") == 3
    assert re.search(r"\| +4 rows \| +16 rows \| +64 rows \|", table)
    assert re.search(
        r"wide +\| 8 x 4 \| +2\.0 / 1\.0 us: floats \| +2\.0 / 3\.0 us: quantized \| +5\.0 / 6\.0 us: quantized \|", table
    )
    assert table.splitlines()[-4:] == [
        "ours: as quantized / of its weights in floats, and the faster one, measured; rows are batch x length",
        "at 4 rows every product is faster in floats: quantizing saves memory here, and no time",
        r"at 16 rows some are faster in floats; to leave them there: quikjax quantize --keep '\d\.narrow'",
        "at 64 rows every product is faster as quantized",
    ]
    assert [json.loads(line) for line in written(rows, "jsonl", "theirs").splitlines()] == rows
    read = list(csv.DictReader(written(rows, "csv", "theirs").splitlines()))
    assert [line["test"] for line in read] == ["en64", "en16", "en4"] * 2
    assert read[0]["samples"] == "9.0 11.0"
    assert read[0].keys() == rows[0].keys() - {"products", "keep"}


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("quantized", {"test": ["pp8"]}, "BertModel is an encoder and does not decode, as pp8 does; give tests such as en32"),
        ("quantized", {"test": ["en8", "tg4"]}, "BertModel is an encoder and does not decode, as tg4 does"),
        ("quantized", {"test": ["en65"]}, "en65 exceeds the 64 tokens that BertModel reads; give a smaller test"),
        ("quantized", {"kv_cache": "int8"}, "--kv-cache and --unroll are for models that decode, and BertModel is an encoder"),
        ("quantized", {"against": "decoder"}, "an encoder and a model that decodes have no test in common"),
        ("decoder", {"test": ["en8"]}, "en8 is a test of encoders, and LlamaForCausalLM is none; give tests such as pp512"),
    ],
)
def test_a_mistake_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    artifacts: dict[str, Path],
    tiny_checkpoint: Path,
    model: str,
    options: dict[str, Any],
    message: str,
) -> None:
    # A command sets up the compilation cache of its process, which is not this one's.
    monkeypatch.setattr(executables, "keep_executables", lambda named=None: Path())
    places = {**artifacts, "decoder": tiny_checkpoint}
    given = {name: str(places[value]) if name == "against" else value for name, value in options.items()}
    with pytest.raises(QuikError, match=re.escape(message)) as error:
        bench.bench(str(places[model]), **given)
    assert len(str(error.value).splitlines()) == 1
