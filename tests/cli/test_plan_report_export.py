"""`plan`, `report` and `export`: the commands as a person uses them, and what stands behind the last two."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quikjax
from quikjax.checkpoint import restore, sizes
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.quantizing.checkpoint import quantize_checkpoint
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.reports.artifact import read_report
from quikjax.testing import forward, tiny_config, tiny_model
from quikjax.weights.formats import dequantize_params

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Rounding to nearest compiles quickly; outliers need data. gate_proj and up_proj are left as they are.
RECIPE = Recipe(
    name="some",
    rules=(
        Rule(match=r"down_proj\.weight$", weight_bits=8, activation_bits=8, method="rtn", scale_outliers=True),
        Rule(match=r"[qkvo]_proj\.weight$", method="rtn"),
    ),
)


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifacts") / "some"
    tokens = np.random.default_rng(0).integers(0, 256, (2, 32)).astype(np.int32)
    quantize_checkpoint(tiny_checkpoint, out, RECIPE, lambda _tokenizer: tokens)
    return out


def last_line(done: "subprocess.CompletedProcess[str]") -> str:
    """Of stderr: libraries may complain about a GPU that is not there before it."""
    return done.stderr.splitlines()[-1]


def test_plan_prints_rows_totals_and_reasons(quikjax_command: Run, tiny_checkpoint: Path) -> None:
    done = quikjax_command("plan", tiny_checkpoint, "--memory", "0.5", "--length", "100", "--activation-memory", "0.001")
    assert done.returncode == 0, done.stderr
    # 4096 tokens in float32: 64 numbers enter a block and 64 leave it, and its groups read 64, 64, 64 and 112.
    assert (
        "442.4 kB of activations in host memory (16 x 256 tokens, read one sequence at a time from 7.1 MB on disk)" in done.stdout
    )
    row = next(line for line in done.stdout.splitlines() if "self_attn.k_proj" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:6] == ["3", "32 x 64", "W4A4", "gptq", "4"]
    assert "[1] xla (mosaic: Mosaic kernels need a Hopper GPU" in done.stdout
    assert "tensors as its configuration says" in done.stdout
    assert "device       cpu, 500.0 MB" in done.stdout
    assert "to run " in done.stdout
    assert "fits" in done.stdout


def test_plan_of_a_bare_configuration_lists_all_that_is_wrong(quikjax_command: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config()))
    done = quikjax_command("plan", config, "--outliers", "64", "--length", "300", "--device", "h100", "--json")
    assert done.returncode == 1
    figures = json.loads(done.stdout)
    assert not figures["has_headers"]
    assert figures["device"].startswith("NVIDIA H100")
    assert figures["memory_bytes"] == 80_000_000_000
    assert len(figures["problems"]) == 8  # seven kinds of layer without a base column, and the length
    assert last_line(done) == "error: this cannot be quantized so: 8 problems, listed with the plan"
    assert sum(layer["count"] for layer in figures["layers"]) == figures["quantized_layers"] == 21
    text = quikjax_command("plan", config, "--outliers", "64", "--length", "300")
    assert text.returncode == 1
    assert sum(line.startswith("problem ") for line in text.stdout.splitlines()) == 8


def test_a_plan_is_what_quantizing_does(artifact: Path, tiny_checkpoint: Path) -> None:
    from quikjax.planning.plan import describe, make_plan

    found = describe(tiny_checkpoint)
    plan = make_plan(found.config, RECIPE, source=found.source, memory_bytes=10**9)
    report = read_report(artifact)
    for planned, done in zip(plan.layers, report.layers, strict=True):
        for field in ("pattern", "count", "outputs", "inputs", "weight_bits", "activation_bits", "outliers", "method"):
            assert getattr(planned, field) == getattr(done, field)
        assert planned.bytes * planned.count == done.bytes
    assert plan.total_bytes == sizes(artifact).all_bits // 8
    assert {row.pattern: row.count * row.bytes for row in plan.dense} == {row.pattern: row.bytes for row in report.dense}


def test_report_prints_what_was_done(quikjax_command: Run, artifact: Path) -> None:
    done = quikjax_command("report", artifact)
    assert done.returncode == 0, done.stderr
    every = quikjax_command("report", artifact, "--layers")
    figures = json.loads(quikjax_command("report", artifact, "--json").stdout)
    assert f"fingerprint  {figures['fingerprint']}" in done.stdout
    assert f"worst layers: {figures['worst'][0].removesuffix('.weight')} " in done.stdout
    assert "tokens       sha256" in done.stdout
    assert "shape 2 x 32" in done.stdout
    assert sum("W4A4" in line or "W8A8" in line for line in done.stdout.splitlines()) == 5
    assert sum("W4A4" in line or "W8A8" in line for line in every.stdout.splitlines()) == 15
    assert figures["recipe"]["name"] == "some"
    assert figures["quantized_layers"] == len(figures["layers"]) == 15


def test_a_report_aggregates_its_rows(artifact: Path) -> None:
    report = read_report(artifact)
    rows = [json.loads(line) for line in (artifact / "report.jsonl").read_text().splitlines()]
    assert list(report.rows) == rows
    kind = next(kind for kind in report.layers if "down_proj" in kind.pattern)
    errors = {row["path"]: row["relative_error"] for row in rows if "down_proj" in row["path"]}
    assert kind.count == len(errors) == 3
    assert kind.relative_error == pytest.approx(np.sqrt(np.mean(np.square(list(errors.values())))))
    assert kind.worst_layer is not None
    assert errors[kind.worst_layer] == kind.worst_error == max(errors.values())
    assert [row["relative_error"] for row in report.worst(2)] == sorted((row["relative_error"] for row in rows), reverse=True)[:2]
    reasons = {kind.pattern: kind.reason for kind in report.dense}
    assert reasons["model.layers.*.mlp.up_proj.weight"] == "no rule of the recipe matches"


def test_a_report_of_an_artifact_without_one(tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=1)
    quikjax.save(tmp_path / "dense", model, recipe=Recipe(name="odd", rules=(Rule(match="weight$"),)).model_dump(mode="json"))
    report = read_report(tmp_path / "dense")
    assert report.layers == ()
    assert report.rows == ()
    assert {kind.reason for kind in report.dense} == {"not a linear layer", "outside the blocks, where nothing is quantized"}
    assert sum(kind.bytes for kind in report.dense) * 8 == report.sizes.all_bits


def test_an_export_computes_what_the_dequantized_artifact_does(artifact: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = export_safetensors(artifact, tmp_path / "hf", progress=lambda *step: seen.append(step))
    assert (done.files, done.dtype) == (("model.safetensors",), "float32")
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    exported, tokenizer = quikjax.load(tmp_path / "hf")
    assert tokenizer is not None
    assert tokenizer("hello")["input_ids"] == restore(artifact)[1]("hello")["input_ids"]
    packed, _ = restore(artifact)
    dense = nnx.merge(nnx.split(packed)[0], dequantize_params(pure_params(packed)))
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 256, (2, 17)), jnp.int32)
    np.testing.assert_array_equal(np.asarray(forward(exported, ids)), np.asarray(forward(dense, ids)))
    assert not (tmp_path / "hf.exporting").exists()


def test_an_export_in_shards_is_read_by_others(artifact: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    whole = export_safetensors(artifact, tmp_path / "whole")
    cut = export_safetensors(artifact, tmp_path / "cut", shard_bytes=whole.bytes // 3)
    assert len(cut.files) == 4
    assert cut.bytes == whole.bytes
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    held = {name: array for file in cut.files for name, array in load_file(tmp_path / "cut" / file).items()}
    assert held.keys() == expected.keys()
    assert all((held[name] == expected[name]).all() for name in expected)
    index = json.loads((tmp_path / "cut" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == whole.bytes
    assert open_source(tmp_path / "cut").names()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(
            {"model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
            id="opt",
            marks=pytest.mark.long,
        ),
        pytest.param({"model_type": "gpt2", "n_embd": 32, "n_layer": 11, "n_head": 4}, id="gpt2"),
        pytest.param(
            {"model_type": "falcon", "hidden_size": 32, "num_kv_heads": 2, "new_decoder_architecture": True},
            id="falcon",
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_export_of_another_family_loads_under_its_names(tmp_path: Path, fields: dict[str, Any]) -> None:
    depth = {"num_hidden_layers": 11, "num_attention_heads": 4, "max_position_embeddings": 64}
    published = {"vocab_size": 50, **({} if fields["model_type"] == "gpt2" else depth), **fields}
    abstract = abstract_model(published)
    rng = np.random.default_rng(0)
    params = {path: rng.standard_normal(leaf.shape).astype(np.float32) for path, leaf in dotted(pure_params(abstract)).items()}
    quikjax.save(tmp_path / "artifact", nnx.merge(nnx.split(abstract)[0], nested(jax.tree.map(jnp.asarray, params))))
    export_safetensors(tmp_path / "artifact", tmp_path / "hf", shard_bytes=20_000)
    exported, _ = quikjax.load(tmp_path / "hf")
    found = dotted(pure_params(exported))
    assert found.keys() == params.keys()
    assert all((np.asarray(found[path]) == params[path]).all() for path in params)
    places = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    # Files hold blocks in order: the tenth after the ninth.
    files = [places[name] for number in (2, 9, 10) for name in places if f".{number}." in name]
    assert files == sorted(files)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [type(exported).__name__]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_export_in_sixteen_bits_is_rounded_once(artifact: Path, tmp_path: Path, dtype: str) -> None:
    export_safetensors(artifact, tmp_path / "wide")
    done = export_safetensors(artifact, tmp_path / "narrow", dtype=dtype)
    wide, narrow = open_source(tmp_path / "wide"), open_source(tmp_path / "narrow")
    assert done.bytes * 2 == sum(info.stored_bytes for info in wide.tensors().values())
    assert narrow.config["torch_dtype"] == dtype
    for name in wide.names():
        np.testing.assert_array_equal(narrow.read(name), wide.read(name).astype(jnp.dtype(dtype)))


def test_an_export_that_cannot_be_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    def refused(out: Path, **options: Any) -> str:
        with pytest.raises(QuikError) as caught:
            export_safetensors(options.pop("source", artifact), out, **options)
        return str(caught.value)

    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    assert "exists; choose another directory" in refused(tmp_path / "there")
    (tmp_path / "x.exporting").mkdir()
    (tmp_path / "x.exporting" / "letters.txt").write_text("mine")
    assert "holds letters.txt; move it away" in refused(tmp_path / "x")
    assert (tmp_path / "x.exporting" / "letters.txt").read_text() == "mine"
    model = tiny_model(num_hidden_layers=1)
    params = nnx.to_pure_dict(nnx.split(model)[1])
    params["model"]["norm"]["weight"] = jnp.full((64,), 1e5)
    quikjax.save(tmp_path / "large", nnx.merge(nnx.split(model)[0], params), config=tiny_config(num_hidden_layers=1))
    assert "model.norm.weight has values beyond the range of float16" in refused(
        tmp_path / "y", source=tmp_path / "large", dtype="float16"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "there", "x.exporting"]
    # What a killed export left is written over.
    (tmp_path / "z.exporting").mkdir()
    (tmp_path / "z.exporting" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    export_safetensors(tmp_path / "large", tmp_path / "z")
    assert sorted(path.name for path in (tmp_path / "z").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_export_by_command(quikjax_command: Run, artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    done = quikjax_command("export", artifact, "--out", out, "--format", "safetensors-dequantized", "--dtype", "float16")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{out}: 1 file, 0.2 MB in float16\n"
    assert last_line(done) == "  part 4 of 4 written"
    again = quikjax_command("export", artifact, "--out", out, "--format", "safetensors-dequantized")
    assert (again.returncode, last_line(again)) == (1, f"error: {out} exists; choose another directory")
    wrong = quikjax_command("export", artifact, "--out", tmp_path / "b", "--format", "gguf")
    assert wrong.returncode == 1
    assert 'there is no format "gguf"' in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "ARTIFACT"], "is quantized already; see what was done with: quikjax report"),
        (["plan", "MODEL", "--device", "h10"], 'did you mean "h100"'),
        (["report", "MODEL"], "of a published checkpoint: quantize it first"),
    ],
)
def test_a_mistake_is_one_sentence(
    quikjax_command: Run, artifact: Path, tiny_checkpoint: Path, arguments: list[str], message: str
) -> None:
    names = {"ARTIFACT": artifact, "MODEL": tiny_checkpoint}
    done = quikjax_command(*[str(names.get(argument, argument)) for argument in arguments])
    assert done.returncode == 1
    assert done.stdout == ""
    assert last_line(done).startswith("error: ")
    assert message in last_line(done)
