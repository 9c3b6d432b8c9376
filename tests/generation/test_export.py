"""Exported programs in a process that may not import quikjax, against `generate`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import quikjax
from quikjax.checkpoint.export import runner
from quikjax.checkpoint.export.programs import carried, export_jax, write_arrays
from quikjax.errors import QuikError
from quikjax.generation import Generator
from quikjax.generation.export import export_programs
from quikjax.models.base import CausalLM
from quikjax.models.registry import pure_params
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import Recipe, Rule
from quikjax.testing import chain_model, tiny_model, tiny_tokenizer

# 3 rows of 4 are used; lengths cross a chunk of 16.
PROMPTS = [[5, 9, 200], [int(token) for token in np.random.default_rng(3).integers(0, 256, 24)], [77]]
NEW = 36

WITHOUT = """
import json, runpy, sys
from pathlib import Path
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("quikjax", "flax", "orbax", "transformers", "safetensors"):
            raise ImportError(name + " is forbidden here")
sys.meta_path.insert(0, Forbid())
directory, prompts, new = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
try:
    import quikjax
except ImportError:
    run = runpy.run_path(str(directory / "run.py"))
    print(json.dumps(run["generate"](run["open_export"](directory), prompts, new)))
"""


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """A process that does not find this package."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | (env or {})
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, cwd=cwd, timeout=300, check=False
    )


def quantized(model: CausalLM) -> CausalLM:
    """4-bit projections with outliers, 8-bit down_proj."""
    rules = (
        Rule(match=r"down_proj\.weight$", weight_bits=8, activation_bits=8, method="rtn", outliers=0),
        Rule(match=r"proj\.weight$", method="rtn", outliers=0),
    )
    return nnx.merge(nnx.split(model)[0], quantize_params(pure_params(model), Recipe(name="test", rules=rules)))


@pytest.mark.long
@pytest.mark.parametrize(("packed", "dtype", "cache"), [(False, "bfloat16", None), (True, "float32", "int8")])
def test_a_process_without_the_package_gives_the_tokens_of_generate(
    tmp_path: Path, packed: bool, dtype: str, cache: str | None
) -> None:
    model = tiny_model(dtype=jnp.dtype(dtype), num_hidden_layers=2)
    model = quantized(model) if packed else model
    quikjax.save(tmp_path / "artifact", model, tokenizer=tiny_tokenizer())
    done = export_jax(
        tmp_path / "artifact", tmp_path / "out", length=30, context=80, batch=4, cache=cache, platforms=["cpu", "cuda"]
    )
    names = {"decode-cpu.jax", "decode-cuda.jax", "export.json", "params.npz", "prefill-cpu.jax", "prefill-cuda.jax", "run.py"}
    assert set(done.files) == names | {"tokenizer.json"}
    ran = python("-c", WITHOUT, str(tmp_path / "out"), json.dumps(PROMPTS), str(NEW), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    # What the artifact holds: its model restored, and not one whose weights were never written.
    restored, _ = quikjax.restore(tmp_path / "artifact")
    expected = Generator(restored, cache=cache).generate(PROMPTS, max_new_tokens=NEW)
    rows = json.loads(ran.stdout.splitlines()[-1])
    assert rows == [row[:n].tolist() for row, n in zip(expected.tokens, expected.lengths, strict=True)]
    assert len({tuple(row) for row in rows}) == 3
    assert max(map(len, rows)) > 17  # more than one chunk
    description = json.loads((tmp_path / "out" / "export.json").read_text())
    dtypes = {entry["dtype"] for entry in description["parameters"].values()}
    assert ("int4" in dtypes) == packed
    assert ("bfloat16" in dtypes) == (dtype == "bfloat16")


@pytest.mark.long
def test_the_command_and_its_runner(tmp_path: Path, tiny_checkpoint: Path, quikjax_command: Any) -> None:
    out = tmp_path / "out"
    done = quikjax_command(
        "export", tiny_checkpoint, "--out", out, "--format", "jax-export", "--length", "16", "--context", "64", "--json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert (figures["length"], figures["context"], figures["batch"], figures["platforms"]) == (16, 64, 1, ["cpu"])
    assert figures["bytes"] == sum(file.stat().st_size for file in out.iterdir())
    assert "not exported: tpu: " in done.stderr
    ran = python(str(out / "run.py"), "Hello", "20", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    generated = quikjax_command("generate", tiny_checkpoint, "Hello", "--max-new-tokens", "20")
    assert ran.stdout == generated.stdout
    for arguments, message in ((["x" * 17], "1 to 16 tokens"), (["Hello", "60"], "at most 64")):
        refused = python(str(out / "run.py"), *arguments, cwd=tmp_path)
        assert refused.returncode == 1
        assert message in refused.stderr


def test_the_runners_texts_are_those_of_generate() -> None:
    """A word's space, half a character, and BOS that was typed."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"<s>": 0, "▁the": 1, "▁lazy": 2, "▁dog": 3}, unk_token="<s>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    words.add_special_tokens(["<s>"])
    assert runner.tokens_of(words, "the", [0]) == [0, 1]
    assert runner.tokens_of(words, "<s>the", [0]) == [0, 1]
    assert runner.tokens_of(words, "<s><s>the", [0]) == [0, 0, 1]
    assert words.decode([2, 3]) == "lazy dog"
    assert runner.text_behind(words, [0, 1], [2, 3]) == " lazy dog"
    assert runner.text_behind(words, [], [2, 3]) == "lazy dog"
    core = tiny_tokenizer().backend_tokenizer
    whole = core.encode("é!", add_special_tokens=False).ids
    assert runner.text_behind(core, whole[:1], whole[1:]) == "é!"


@pytest.mark.long
def test_a_runner_says_what_is_wrong_and_prints_in_any_locale(tmp_path: Path) -> None:
    """`é` and then an end, under ASCII; and how it is called."""
    start, first, second = tiny_tokenizer()("Aé", add_special_tokens=False)["input_ids"]
    following = [0] * 257
    following[start], following[first], following[second] = first, second, 256
    quikjax.save(tmp_path / "artifact", chain_model(following, eos_token_id=256), tokenizer=tiny_tokenizer())
    (tmp_path / "out" / "lost+found").mkdir(parents=True)
    (tmp_path / "out" / ".DS_Store").write_bytes(b"x")
    done = export_jax(tmp_path / "artifact", tmp_path / "out", length=4, context=64)
    assert (tmp_path / "out" / "lost+found").is_dir()
    assert sorted(done.files) == sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] not in ".l")
    ran = python(str(tmp_path / "out" / "run.py"), "A", cwd=tmp_path, env={"PYTHONIOENCODING": "ascii"})
    assert (ran.returncode, ran.stdout) == (0, "\\xe9\n")
    for wrong in ([], ["A", "x"], ["A", "1", "2"]):
        ran = python(str(tmp_path / "out" / "run.py"), *wrong, cwd=tmp_path)
        assert ran.returncode == 1
        assert ran.stderr == "usage: python run.py TEXT [NEW_TOKENS]\n"
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert "without a tokenizer.json" in python(str(tmp_path / "out" / "run.py"), "A", cwd=tmp_path).stderr


def test_a_row_ends_at_a_stop(tmp_path: Path) -> None:
    # 1 -> 2 -> 3 -> 0 (the end); 4 -> 5 -> 4 for ever.
    quikjax.save(tmp_path / "artifact", chain_model([0, 2, 3, 0, 5, 4], eos_token_id=0))
    done = export_jax(tmp_path / "artifact", tmp_path / "out", length=4, context=64, batch=2)
    assert "tokenizer.json" not in done.files
    ran = python("-c", WITHOUT, str(tmp_path / "out"), "[[1], [5, 4]]", "20", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == [[2, 3], [5, 4] * 10]


def test_stored_arrays_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a/odd": rng.integers(-8, 8, (3, 5)).astype(jnp.int4),
        "a/none": np.zeros((4, 0), jnp.bfloat16),
        "b": rng.standard_normal((2, 3)).astype(jnp.bfloat16),
        "c": rng.integers(0, 255, 7).astype(np.uint8),
    }
    write_arrays(tmp_path / "one.npz", arrays)
    write_arrays(tmp_path / "two.npz", arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    stored = np.load(tmp_path / "one.npz")
    assert set(stored.files) == set(arrays)
    assert stored["a/odd"].nbytes == 8
    for index, code in enumerate(arrays["a/odd"].reshape(-1).astype(int)):
        half = int(stored["a/odd"].view(np.uint8)[index // 2]) >> 4 * (index % 2) & 15
        assert (half ^ 8) - 8 == code
    np.testing.assert_array_equal(stored["b"].view(jnp.bfloat16), arrays["b"])
    assert stored["a/none"].shape == (4, 0)
    assert carried(arrays["c"]) is arrays["c"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"platforms": ["tpu"]}, "cannot be exported for tpu: no layer"),
        ({"platforms": ["gpu"]}, 'no platform "gpu"'),
        ({"platforms": []}, "no platform is named"),
        ({"context": 257}, "the context may be 2 to 256 tokens"),
        ({"length": 32}, "1 to 31 tokens"),
        ({"batch": 0}, "at least 1 row"),
        ({"cache": "int9"}, 'no KV cache of kind "int9"'),
        ({"batch": 10**12}, "--kv-cache int8"),
    ],
)
def test_mistakes_are_told_before_tracing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(QuikError, match=message):
        export_programs(tiny_model(num_hidden_layers=1), **{"length": 8, "context": 32, **options})


def test_a_directory_that_is_taken_and_a_missing_package(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("x")
    (tmp_path / "out.exporting").mkdir()
    (tmp_path / "out.exporting" / "mine").write_text("x")
    with pytest.raises(QuikError, match="taken exists; choose another"):
        export_jax(tiny_checkpoint, tmp_path / "taken")
    with pytest.raises(QuikError, match=r"out\.exporting is needed"):
        export_jax(tiny_checkpoint, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(QuikError, match=r"pip install 'quikjax\[export\]'"):
        export_jax(tiny_checkpoint, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.exporting", "taken"]
