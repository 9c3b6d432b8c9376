"""The scaling study: bits counted to the bit, curves and winners by hand, rows that a kill does not change, what is warned of."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from quikjax import checkpoint
from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate
from quikjax.loading import load_params, open_source
from quikjax.models.registry import abstract_model, dotted
from quikjax.models.tokens import checked_model
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.params import quantize_block
from quikjax.quantizing.proxies import block_proxies
from quikjax.quantizing.recipe import codebook_recipe
from quikjax.study.grid import Row, run_grid
from quikjax.study.scaling import (
    Family,
    best_cells,
    best_per_model,
    charts,
    estimate,
    grid,
    open_family,
    recipe_of,
    scaling_study,
    short_blocks,
)
from quikjax.study.scaling_cells import Writer
from quikjax.study.scaling_curves import Measured, budgets, interpolate, pearson, winners
from quikjax.study.scaling_page import PAGE, WINNERS, write_page
from quikjax.testing import write_tiny_checkpoint
from quikjax.texts import Text
from quikjax.weights.formats import dequantize, is_packed

TEXT = Text("a text", "The quick brown fox jumps over the lazy dog, and again. " * 20)
TINY: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two models that read bytes."""
    place = tmp_path_factory.mktemp("family")
    small = write_tiny_checkpoint(place / "small", 1, **TINY)
    large = write_tiny_checkpoint(place / "large", 2, **{**TINY, "num_hidden_layers": 2})
    return [str(small), str(large)]


@pytest.fixture(scope="module")
def family(models: list[str]) -> Family:
    return open_family(models, TEXT, window=64, count=3)


@pytest.mark.long
def test_bits_are_those_of_the_file_and_perplexity_that_of_the_artifact(
    family: Family, models: list[str], tmp_path: Path
) -> None:
    cells = grid(family, bits=[5, 16], types=["quantile"], blocks=[40], proxies=[0.1])
    assert len(cells) == 4
    study = scaling_study(family, cells[:2], TEXT)
    coded, whole = run_grid(study.cells, study.compute, tmp_path / "rows", inputs=study.inputs)
    recipe = recipe_of(coded.parameters)
    assert recipe is not None
    quantize_checkpoint(models[0], tmp_path / "a", recipe, dtype=jnp.float16)
    sizes = checkpoint.sizes(tmp_path / "a")
    assert coded.result["total_bits"] == sizes.all_bits
    assert coded.result["bits_per_weight"] == sizes.bits_per_weight
    assert whole.result["total_bits"] == 16 * sizes.all_parameters == 16 * family.members[0].parameters
    for row, found in ((coded, load(tmp_path / "a")[0]), (whole, load(models[0])[0])):
        expected = evaluate(found, family.members[0].ids)
        # Random weights, loud norms: losses of 25 nats, of float16 artifacts that compute in float16.
        assert math.log(row.result["perplexity"]) == pytest.approx(math.log(expected.perplexity), rel=2e-3)
        assert math.exp(np.mean(row.result["window_losses"])) == pytest.approx(row.result["perplexity"], rel=1e-5)
    assert len(coded.result["window_losses"]) == 3


@pytest.mark.parametrize(
    ("data_type", "bits", "block", "proxy"),
    [
        ("int", 3, 64, 0.1),
        pytest.param("float", 5, 7, 0.0, marks=pytest.mark.long),
        pytest.param("quantile", 6, "tensor", 0.1, marks=pytest.mark.long),
        ("dynamic", 8, 100, 0.0),
    ],
)
def test_a_cells_weights_are_those_of_the_packed_layers_bit_for_bit(
    models: list[str], data_type: str, bits: int, block: int | str, proxy: float
) -> None:
    source = open_source(models[1])
    abstract = checked_model(abstract_model(source.config))
    params = dotted(load_params(source, abstract, dtype=jnp.float32))
    recipe = recipe_of({"type": data_type, "bits": bits, "block": block, "proxy": proxy})
    assert recipe is not None
    written = Writer(abstract, params)(recipe)
    name = "model.layers.1."
    before, inside = (
        {path.removeprefix(n): leaf for path, leaf in params.items() if path.startswith(n)} for n in ("model.layers.0.", name)
    )
    packed = quantize_block(
        inside, recipe, dict.fromkeys(inside), prefix=name, proxies=block_proxies(abstract, inside, before) if proxy else None
    )
    layers = 0
    for path, leaf in packed.items():
        expected = dequantize(leaf) if is_packed(leaf) else leaf
        np.testing.assert_array_equal(written.params[name + path], expected, err_msg=path)
        layers += is_packed(leaf)
    assert layers == 7
    assert written.weights == 2 * sum(leaf.size for path, leaf in inside.items() if is_packed(packed[path]))


def test_weights_that_cannot_be_written_are_refused(models: list[str]) -> None:
    source = open_source(models[0])
    abstract = checked_model(abstract_model(source.config))
    params = dotted(load_params(source, abstract, dtype=jnp.float32))
    path = "model.layers.0.self_attn.q_proj.weight"
    for value in (jnp.nan, jnp.inf, 1e6):
        spoilt = {**params, path: params[path].at[3, 4].set(value)}
        with pytest.raises(QuikError, match=f"{path} has weights that are not finite, or beyond the float16 of absmax"):
            Writer(abstract, spoilt)(codebook_recipe("int", 4))
    with pytest.raises(QuikError, match="a scaling study writes codebooks without data"):
        Writer(abstract, params)(codebook_recipe("int", 4, absmax="double"))


def test_a_killed_study_goes_on_to_the_same_rows_and_writes_a_page(family: Family, tmp_path: Path) -> None:
    cells = grid(family, bits=[3, 8, 16], types=["int", "nf"], blocks=[64], proxies=[0.0])
    study = scaling_study(family, cells, TEXT, lambda _model, tokenizer: len(tokenizer) / 1000, {"names": ["length"]})
    result = study.run(tmp_path / "whole")
    rows = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    (tmp_path / "half" / "rows.jsonl").write_bytes(rows[: len(rows) // 2])
    done = study.finished(tmp_path / "half")
    assert 0 < sum(done) < len(done) == 10
    again = scaling_study(family, cells, TEXT, lambda _model, tokenizer: len(tokenizer) / 1000, {"names": ["length"]})
    again.run(tmp_path / "half")
    assert (tmp_path / "half" / "rows.jsonl").read_bytes() == rows
    cost = estimate(family, study.cells, done)
    assert (cost.models, cost.cells, cost.missing) == (2, 10, 10 - sum(done))
    assert cost.hours > 0

    files = write_page(result, tmp_path / "whole", comparable=family.comparable)
    assert {PAGE, WINNERS, "precisions.svg", "types-3.svg", "types-8.svg"} <= set(files)
    found = json.loads((tmp_path / "whole" / WINNERS).read_text())
    assert found
    assert all(abs(sum(winner["share_of_resamples"].values()) - 1) < 1e-9 for winner in found)
    page = (tmp_path / "whole" / PAGE).read_text()
    assert page.count("<svg") == 3
    assert "Mbit: " in page
    assert "zero-shot" in (tmp_path / "whole" / "table.md").read_text()
    assert {name: len(points) for name, points in best_per_model(result.rows).items()} == {"3 bit": 2, "8 bit": 2, "16 bit": 2}
    assert set(charts(result.rows)["precisions"].series) == {"3 bit", "8 bit", "16 bit"}


def test_one_model_is_drawn_through_its_precisions() -> None:
    """Of cells of one model, lines go from precision to precision, each through the best of what is not drawn apart."""

    def row(bits: int, perplexity: float, **fields: Any) -> Row:
        result = {"perplexity": perplexity, "window_losses": [math.log(perplexity)], "total_bits": bits * 10**6, "parameters": 7}
        return Row(str((bits, fields)), {"model": "m", "bits": bits, **fields}, "", {**result, "bits_per_weight": bits + 0.25})

    rows = [
        *[row(k, 100 / k, type="int", block=block, proxy=0.0) for k in (4, 8) for block in (64, "tensor")],
        *[row(k, 2000 / k, type="dynamic", block="tensor", proxy=0.02) for k in (4, 8)],
        row(16, 5.0),
    ]
    drawn = charts(rows)
    assert set(drawn) == {"precisions", "types", "blocks", "proxies"}
    assert set(drawn["blocks"].series) == {"block 64", "whole tensor"}
    assert set(drawn["proxies"].series) == {"no outliers", "2.0% of the columns in 16 bits"}
    assert [point.x for point in drawn["types"].series["int"]] == [4, 8]
    assert [point.y for point in drawn["types"].series["int"]] == pytest.approx([25, 12.5])
    assert [point.y for point in drawn["types"].series["dynamic"]] == pytest.approx([100, 100])  # 500 is beyond what is drawn
    assert drawn["types"].rules == {"16 bits": 5.0}
    assert best_cells(rows) == [
        "m, 4 bits: perplexity 25.0000 with int in blocks of 64, 4.250 bits a weight, 4 Mbit in all.",
        "m, 8 bits: perplexity 12.5000 with int in blocks of 64, 8.250 bits a weight, 8 Mbit in all.",
        "m, 16 bits: perplexity 5.0000, 16 Mbit in all.",
    ]


def test_curves_and_winners_by_hand() -> None:
    assert interpolate([(1e6, 4.0), (1e8, 2.0), (1e7, 3.5)], 10**6.5) == pytest.approx(3.75)
    assert interpolate([], 5.0) is None
    four = [Measured(10, (2.0, 2.2)), Measured(1000, (1.0, 1.2))]
    eight = [Measured(20, (3.0, 3.2)), Measured(2000, (0.9, 1.3))]
    curves = {"4 bit": four, "8 bit": eight, "16 bit": [Measured(4000, (0.5, 0.5))]}
    at = budgets(curves, 3)
    np.testing.assert_allclose(at, [20, math.sqrt(20 * 1000), 1000])
    found = winners(curves, at, resamples=200)
    assert [winner.precision for winner in found] == ["4 bit"] * 3
    share = math.log(20 / 10) / math.log(100)
    assert found[0].losses == pytest.approx({"4 bit": 2.1 - share, "8 bit": 3.1})
    assert found[0].wins == {"4 bit": 1.0, "8 bit": 0.0}
    # Where one is better on one window and the other on the other, the text decides.
    split = winners({"a": [Measured(10, (1.0, 2.0))], "b": [Measured(10, (2.0, 1.1))]}, [10.0])
    assert split[0].precision == "a"
    assert 0.6 < split[0].wins["a"] < 0.9
    # A model that broke down counts as perplexity 100, however far it is.
    broken = winners({"a": [Measured(10, (50.0,))], "b": [Measured(10, (4.7,))]}, [10.0])
    assert broken[0].losses["a"] == pytest.approx(math.log(100))
    assert winners({"a": four}, [20.0]) == []
    assert budgets({"a": four}) == []
    x, y = np.random.default_rng(0).normal(size=(2, 20))
    assert pearson(x.tolist(), y.tolist()) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert pearson([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None


def test_models_that_are_not_comparable_are_said(models: list[str], tmp_path: Path) -> None:
    headed = write_tiny_checkpoint(tmp_path / "headed", 3, **{**TINY, "vocab_size": 3000})
    other = write_tiny_checkpoint(tmp_path / "other", 4, **TINY)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {letter: 255 - index for letter, index in tokenizer["model"]["vocab"].items()}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = open_family([models[0], str(headed), str(other)], TEXT, window=64, count=2)
    assert not found.comparable
    first, second = found.warnings
    assert "% of the parameters of headed are embeddings and head, which stay in 16 bits: its curve is about them" in first
    assert (
        "different tokenizers (small, headed; other): their perplexities are per token of their own and are not compared"
        in second
    )


def test_blocks_that_divide_nothing_are_said(family: Family) -> None:
    cells = grid(family, bits=[4, 16], types=["int"], blocks=[64, 100, "tensor"], proxies=[0.0])
    assert short_blocks(family, cells) == [
        f"blocks of 100 do not divide the weights of every layer of {name}: the last one is short" for name in ("small", "large")
    ]
    assert list(scaling_study(family, cells, TEXT).notes) == short_blocks(family, cells)


def test_what_is_refused(family: Family, models: list[str]) -> None:
    good: dict[str, Any] = {"bits": [4], "types": ["int"], "blocks": [64], "proxies": [0.0]}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"bits": [2]}, "--bits takes numbers from 3 to 8, and 16; not 2"),
        ({"types": ["nf4"]}, 'there is no data type "nf4" for a study; did you mean "nf"'),
        ({"proxies": [2.0]}, "--proxy takes shares between 0 and 1, not 2"),
        ({"types": []}, "the grid has no cells"),
    ]
    for fields, message in wrong:
        with pytest.raises(QuikError, match=message):
            grid(family, **{**good, **fields})
    with pytest.raises(QuikError, match='two models are called "small"'):
        open_family([models[0], models[0] + "/"], TEXT, window=64, count=1)
    with pytest.raises(QuikError, match="--window 512 exceeds the context of small, 256 tokens"):
        open_family(models, TEXT, window=512, count=1)
    with pytest.raises(QuikError, match="the text has"):
        open_family(models, Text("short", "abc"), window=64, count=1)


def test_rows_do_not_depend_on_the_models_beside(family: Family, models: list[str]) -> None:
    fields: dict[str, Any] = {"bits": [4], "types": ["int"], "blocks": ["tensor"], "proxies": [0.0]}
    alone = open_family(models[:1], TEXT, window=64, count=3)
    one, both = (scaling_study(members, grid(members, **fields), TEXT) for members in (alone, family))
    assert one.cells[0].parameters == both.cells[0].parameters
    assert one.inputs == both.inputs
    assert isinstance(one.cells[0].parameters["block"], str)


def test_the_command_counts_before_it_runs(quikjax_command: Callable[..., Any], models: list[str], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text(TEXT.content)
    arguments = ["study", "scaling", "--models", ",".join(models), "--out", tmp_path / "out", "--perplexity", text]
    arguments += ["--window", "64", "--windows", "2"]
    dry = quikjax_command(*arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert "2 models, 162 cells, 162 to run: about" in dry.stderr  # 5 precisions x 4 types x 4 blocks, and 16 bits, of each
    assert "kB on disk" in dry.stderr
    assert not (tmp_path / "out").exists()
    assert f"--models {models[0]} --bits 3 --types int --blocks 64 --proxy 0" in dry.stdout
    done = quikjax_command(*arguments, "--bits", "4,16", "--types", "int", "--blocks", "64")
    assert done.returncode == 0, done.stderr
    assert "| small | " in done.stdout
    assert len((tmp_path / "out" / "seconds.jsonl").read_text().splitlines()) == 4
    assert (tmp_path / "out" / PAGE).exists()
    refused = quikjax_command(*arguments, "--bits", "x")
    assert refused.returncode == 1
    assert refused.stderr.endswith('--bits takes numbers with commas between them, not "x"\n')


def test_a_row_of_another_study_is_no_cell_of_this() -> None:
    row = Row("k", {"model": "m", "source": "s", "bits": 4, "type": "int", "block": 64, "proxy": 0.0}, "", {"perplexity": 2.0})
    assert best_per_model([row], type="nf") == {}
