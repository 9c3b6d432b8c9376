"""Mistakes that need no model to be seen are said before JAX is imported, which takes longer than anything else in them."""

import subprocess
import sys
from pathlib import Path

import pytest

from quikjax.checkpoint.manifest import Manifest, seal

# What is typed, and a part of what is said.
MISTAKES = (
    ("generate nowhere hi", 'there is no model "nowhere"'),
    ("generate smollm2-135n hi", 'did you mean "smollm2-135m"'),
    ("generate . hi --temperature -1", "the temperature is 0"),
    ("generate . hi --top-p 0.5 --temperature 0", "give a temperature above 0"),
    ("generate . hi --seed -1", "a seed is a number"),
    ("generate . hi --dtype fp32", 'did you mean "float32"'),
    ("generate . hi --kv-cache int4", 'did you mean "int8"'),
    ("generate . hi --context 1", "the context is at least 2 tokens"),
    ("generate . hi --system x", "give --chat as well"),
    ("generate . hi --chat --template nowhere.jinja", "nowhere.jinja cannot be read"),
    ("generate . \udce9", "the prompt is not UTF-8 text"),
    ("generate . hi --stop \udce9", "a stop string is not UTF-8 text"),
    ("generate . hi --chat --system \udce9", "the system message is not UTF-8 text"),
    ("generate .", "give one of a prompt and --prompt-file"),
    ("generate . --prompt-file nowhere.txt", "nowhere.txt cannot be read"),
    ("chat nowhere", 'there is no model "nowhere"'),
    ("chat . --min-p 2", "min-p is a share"),
    ("bench . -t xx", 'there is no test "xx"'),
    ("bench . -b 0", "a batch has at least 1 text"),
    ("bench . --against nowhere", 'there is no model "nowhere"'),
    ("bench . -o xml", 'there is no output "xml"'),
    ("eval .", "there is nothing to evaluate"),
    ("eval . --perplexity pydoc --against nowhere", 'there is no model "nowhere"'),
    ("plan nowhere", 'there is no model "nowhere"'),
    ("quantize nowhere --out made", 'there is no model "nowhere"'),
    ("quantize . --out .", "is not an artifact of quikjax"),
    ("embed . sentences.txt", 'there is no file "sentences.txt"'),
    ("classify . --pairs data/pairs.tsv", 'there is no file "data/pairs.tsv"'),
    ("report nothing", "there is no directory"),
    ("report .", "has no quikjax.json"),
    ("recover nothing --out made", "there is no directory"),
    ("recover summarizer --out made", "is an encoder-decoder (bart); recovery trains models that only decode or only encode"),
    ("export nothing --out made --format safetensors-dequantized", "there is no directory"),
    ("export nothing --out made --format jax-export", 'there is no model "nothing"'),
    ("export . --out made --format onnx", 'there is no format "onnx"'),
    ("study nothing", "No such command"),
    ("study failure nowhere", 'there is no model "nowhere"'),
)
RUN = """
import contextlib, io, sys
from quikjax.cli import main
for line in sys.argv[1:]:
    sys.argv = ["quikjax", *line.split()]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        main()
    print(" ".join(said.getvalue().split()), [name for name in ("jax", "flax", "orbax", "transformers") if name in sys.modules])
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("place")
    (place / "notes.txt").write_text("not an artifact")
    (place / "summarizer").mkdir()
    manifest = Manifest(
        quikjax="0", config={"model_type": "bart"}, recipe=None, provenance={}, dtype="float32", parts={}, files={}
    )
    (place / "summarizer" / "quikjax.json").write_text(seal(manifest.with_fingerprint()))
    lines = [line for line, _ in MISTAKES]
    done = subprocess.run([sys.executable, "-c", RUN, *lines], capture_output=True, text=True, check=True, cwd=place)
    assert sorted(path.name for path in Path(place).iterdir()) == ["notes.txt", "summarizer"]
    return done.stdout.splitlines()


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_said_at_once(said: list[str], number: int) -> None:
    _, words = MISTAKES[number]
    assert words in said[number]
    assert said[number].endswith(" []"), "something heavy was imported for it"
