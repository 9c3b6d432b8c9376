"""What is saved comes back, bit for bit, and the same is saved as the same bytes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifacts import CONFIG, assert_same_bits, build, pack, pack_codebook, random_params, read_directory, tiny_tokenizer

from quikjax import checkpoint
from quikjax.checkpoint.parts import DTYPES
from quikjax.errors import QuikError
from quikjax.models.registry import dotted, pure_params
from quikjax.testing import forward

IDS = np.arange(24).reshape(2, 12)


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.long)])
def test_restored_logits_are_bit_identical(tmp_path: Path, quantized: bool, dtype: Any) -> None:
    model = build(random_params(packed=quantized, dtype=dtype))
    fingerprint = checkpoint.save(tmp_path / "a", model, recipe={"name": "by hand"})
    restored, tokenizer = checkpoint.restore(tmp_path / "a")
    assert tokenizer is None
    assert restored.published == model.published
    assert_same_bits(pure_params(model), pure_params(restored))
    ids = jnp.asarray(IDS)
    assert np.asarray(forward(model, ids)).tobytes() == np.asarray(forward(restored, ids)).tobytes()
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert (manifest.fingerprint, manifest.dtype) == (fingerprint, jnp.dtype(dtype).name)
    assert (manifest.recipe, manifest.config) == ({"name": "by hand"}, CONFIG)
    assert os.listdir(tmp_path) == ["a"], "nothing is left beside it"


def test_a_level_clip_is_written_where_there_is_one(tmp_path: Path) -> None:
    """Without one a weight is written as it was before there were any, so that old artifacts keep their bytes."""
    params = random_params()
    params["model.layers.0.self_attn.v_proj.weight"] = pack(np.random.default_rng(0), (8, 16), level_clip=(16, -8))
    checkpoint.save(tmp_path / "a", build(params))
    packed = json.loads((tmp_path / "a" / "arrays" / "model.layers.0.json").read_text())["packed"]
    assert packed["model.layers.0.self_attn.v_proj.weight"]["level_clip"] == [16, -8]
    assert packed["model.layers.0.self_attn.k_proj.weight"]["level_clip"] == [17, 1]
    assert "level_clip" not in packed["model.layers.0.self_attn.q_proj.weight"]
    leaves = dotted(checkpoint.restore_params(tmp_path / "a"))
    assert leaves["model.layers.0.self_attn.v_proj.weight"].level_clip == (16, -8)
    restored = leaves["model.layers.0.self_attn.k_proj.weight"]
    assert (restored.level_clip, restored.levels, restored.lowest) == ((17, 1), 17, 1)
    assert type(restored.level_clip) is tuple


def test_each_array_keeps_its_own_dtype(tmp_path: Path) -> None:
    params = random_params(packed=False, dtype=jnp.bfloat16)
    params["model.norm.weight"] = params["model.norm.weight"].astype(jnp.float32)
    checkpoint.save(tmp_path / "a", build(params))
    restored = dotted(pure_params(checkpoint.restore(tmp_path / "a")[0]))
    assert restored["model.norm.weight"].dtype == jnp.float32
    assert_same_bits(params, restored)


@pytest.mark.long
def test_a_process_that_never_saw_the_model_gets_the_same_logits(tmp_path: Path) -> None:
    model = build(random_params())
    checkpoint.save(tmp_path / "a", model, tokenizer=tiny_tokenizer())
    code = (
        "import numpy as np; from quikjax import checkpoint; from quikjax.testing import forward\n"
        "model, tokenizer = checkpoint.restore('a')\n"
        "np.save('logits.npy', forward(model, np.arange(24).reshape(2, 12)))\n"
        "assert tokenizer.encode('hello world') == [1, 2]\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), np.asarray(forward(model, jnp.asarray(IDS))))


def test_saving_twice_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras: dict[str, Any] = {"recipe": {"name": "r"}, "provenance": {"seed": 0}, "report": [{"layer": "a", "snr": np.inf}]}
    one = checkpoint.save(tmp_path / "one", build(random_params()), tokenizer=tiny_tokenizer(), **extras)
    # By a relative path, in another place, and the tokenizer from files whose path could have leaked into it.
    monkeypatch.chdir(tmp_path)
    model, tokenizer = checkpoint.restore("one")
    two = checkpoint.save("some/where/else", model, tokenizer=tokenizer, **extras)
    assert one == two
    first, second = read_directory(tmp_path / "one"), read_directory(tmp_path / "some/where/else")
    assert first == second
    assert {"quikjax.json", "report.jsonl", "tokenizer/tokenizer.json", "arrays/rest.json"} <= set(first)
    assert str(tmp_path).encode() not in b"".join(first.values())


def test_the_fingerprint_is_of_everything_that_decides_a_result(tmp_path: Path) -> None:
    params = random_params()
    changed = dict(params)
    changed["model.norm.weight"] = params["model.norm.weight"].at[3].add(1e-3)
    prints = [
        checkpoint.save(tmp_path / "0", build(params)),
        checkpoint.save(tmp_path / "1", build(changed)),
        checkpoint.save(tmp_path / "2", build(params), recipe={"name": "r"}),
        checkpoint.save(tmp_path / "3", build(params), provenance={"seed": 1}),
        checkpoint.save(tmp_path / "4", build(params), config=CONFIG | {"rope_theta": 5000.0}),
        checkpoint.save(tmp_path / "5", build(params), tokenizer=tiny_tokenizer()),
    ]
    assert len(set(prints)) == len(prints)


def test_report_and_tokenizer_come_back(tmp_path: Path) -> None:
    report: list[dict[str, Any]] = [{"layer": "a", "error": np.float32(0.5), "snr": float("inf"), "bits": (4, 8)}, {"layer": "b"}]
    tokenizer = tiny_tokenizer()
    checkpoint.save(tmp_path / "a", build(random_params()), tokenizer=tokenizer, report=report)
    reader = checkpoint.Reader(tmp_path / "a")
    assert reader.report() == [{"layer": "a", "error": 0.5, "snr": None, "bits": [4, 8]}, {"layer": "b"}]
    assert reader.tokenizer().encode("world hello") == tokenizer.encode("world hello") == [2, 1]


def test_blocks_are_read_one_by_one(tmp_path: Path) -> None:
    params = random_params()
    checkpoint.save(tmp_path / "a", build(params))
    reader = checkpoint.Reader(tmp_path / "a")
    assert set(reader.parts) == {"model.layers.0", "model.layers.1", "rest"}
    block = reader.read_part("model.layers.1")
    assert set(block) == {path for path in params if path.startswith("model.layers.1.")}
    for path, leaf in block.items():
        assert_same_bits(leaf, params[path])
    with pytest.raises(QuikError, match=r'has no part "model.layers.11"; did you mean "model.layers.1"'):
        reader.read_part("model.layers.11")


def test_sizes_count_every_stored_bit(tmp_path: Path) -> None:
    params = random_params()
    checkpoint.save(tmp_path / "a", build(params))
    measured = checkpoint.sizes(tmp_path / "a")
    linear = {path: leaf for path, leaf in params.items() if "proj" in path}
    others = sum(leaf.size for path, leaf in params.items() if path not in linear)
    assert measured.linear_bits == sum(leaf.bits() for leaf in linear.values())
    assert measured.linear_parameters == 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 32 * 16)
    assert measured.all_bits == measured.linear_bits + 32 * others
    assert measured.all_parameters == measured.linear_parameters + others
    assert measured.disk_bytes == sum(len(octets) for octets in read_directory(tmp_path / "a").values())
    checkpoint.save(tmp_path / "dense", build(random_params(packed=False, dtype=jnp.float16)))
    assert checkpoint.sizes(tmp_path / "dense").relative_to_fp16 == 1


def test_orbax_alone_reads_the_arrays(tmp_path: Path) -> None:
    """Nobody is locked in: without this library, a part is nested dictionaries under the published names."""
    import orbax.checkpoint as ocp

    params = random_params()
    checkpoint.save(tmp_path / "a", build(params))
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    block = ocp.Checkpointer(handler).restore((tmp_path / "a/arrays/model.layers.0").absolute())
    weight = block["model"]["layers"]["0"]["mlp"]["down_proj"]["weight"]
    original = params["model.layers.0.mlp.down_proj.weight"]
    np.testing.assert_array_equal(np.asarray(weight["qweight"]), np.asarray(original.qweight))
    np.testing.assert_array_equal(np.asarray(weight["columns"]), np.asarray(original.columns))


@dataclasses.dataclass(frozen=True)
class Dense:
    """An array of random bits, NaNs and all."""

    dtype: str
    shape: tuple[int, ...]
    on_device: bool

    def make(self, rng: np.random.Generator) -> Any:
        if self.dtype in ("int4", "bool"):
            low, high = (-8, 8) if self.dtype == "int4" else (0, 2)
            array = np.asarray(rng.integers(low, high, self.shape)).astype(jnp.dtype(self.dtype))
        else:
            octets = rng.integers(0, 256, math.prod(self.shape) * jnp.dtype(self.dtype).itemsize).astype(np.uint8)
            array = octets.view(jnp.dtype(self.dtype)).reshape(self.shape)
        return jnp.asarray(array) if self.on_device else array


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed weight."""

    shape: tuple[int, int]
    bits: int
    outliers: float
    dtype: str
    group: str | None

    def make(self, rng: np.random.Generator) -> Any:
        outliers = round(self.outliers * self.shape[1])
        return pack(rng, self.shape, bits=self.bits, outliers=outliers, dtype=jnp.dtype(self.dtype), group=self.group)


@dataclasses.dataclass(frozen=True)
class Codebook:
    """A codebook weight."""

    shape: tuple[int, int]
    data_type: str
    bits: int
    block: int
    outliers: float
    absmax: str
    centered: bool

    def make(self, rng: np.random.Generator) -> Any:
        fields = dataclasses.asdict(self) | {"outliers": round(self.outliers * self.shape[1])}
        return pack_codebook(rng, fields.pop("shape"), **fields)


SHAPES = st.sampled_from([(1, 1), (9, 2), (3, 8)])  # every shape is a compilation
dense = st.builds(
    Dense, st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple), on_device=st.booleans()
)
packed = st.builds(
    Packed,
    shape=SHAPES,
    bits=st.sampled_from([4, 8]),
    outliers=st.sampled_from([0.0, 1.0, 0.3]),  # none, all, some
    dtype=st.sampled_from(["float16", "bfloat16"]),
    group=st.none() | st.text(),
)
codebook = st.builds(
    Codebook,
    shape=SHAPES,
    data_type=st.sampled_from(["nf", "dynamic", "quantile"]),
    bits=st.integers(3, 8),
    block=st.sampled_from([1, 8, 64]),
    outliers=st.sampled_from([0.0, 1.0, 0.3]),
    absmax=st.sampled_from(["float16", "float32", "double"]),
    centered=st.booleans(),
)
names = st.text("abcdefgh_0123456789", min_size=1, max_size=5)


trees = st.dictionaries(names, st.dictionaries(names, dense | packed | codebook, max_size=4), max_size=3)


@settings(max_examples=12, deadline=None)
@given(trees, st.integers(0, 2**32))
def test_any_tree_comes_back(kinds: dict[str, dict[str, Dense | Packed | Codebook]], seed: int) -> None:
    check_comes_back(kinds, seed)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(trees, st.integers(0, 2**32))
def test_many_trees_come_back(kinds: dict[str, dict[str, Dense | Packed | Codebook]], seed: int) -> None:
    check_comes_back(kinds, seed)


def check_comes_back(kinds: dict[str, dict[str, Dense | Packed | Codebook]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree = {name: {key: kind.make(rng) for key, kind in members.items()} for name, members in kinds.items()}
    with tempfile.TemporaryDirectory() as place:
        with checkpoint.Writer(Path(place) / "a") as writer:
            for name, members in tree.items():
                writer.write_part(f"part_{name}", {f"{name}.{key}": leaf for key, leaf in members.items()})
            fingerprint = writer.finish()
        assert checkpoint.read_manifest(Path(place) / "a").fingerprint == fingerprint
        restored = checkpoint.restore_params(Path(place) / "a")
    expected = {name: members for name, members in tree.items() if members}
    assert_same_bits(expected, restored)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))


def test_an_array_of_several_chunks_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quikjax.checkpoint.store.CHUNK_BYTES", 1000)
    params: dict[str, Any] = {"a.dense": np.random.default_rng(0).normal(size=(70, 50)).astype(np.float32)}
    params["a.packed"] = pack(np.random.default_rng(1), (60, 70))
    with checkpoint.Writer(tmp_path / "a") as writer:
        part = writer.write_part("a", params)
        writer.finish()
    assert len([path for path in part.files if path.startswith("a.dense/")]) > 10
    assert_same_bits({"a": {"dense": params["a.dense"], "packed": params["a.packed"]}}, checkpoint.restore_params(tmp_path / "a"))
