"""What Python callers get wrong is told in a sentence: in a process without the type checks that tests otherwise run under."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

# (expression, what the sentence says). `model` is a tiny model, `pair` what load gives, `P` its directory, `q` the package.
CASES = [
    ("q.load(P, dtype='fp32')", 'did you mean "float32"'),
    ("q.load(A, dtype='fp32')", 'did you mean "float32"'),
    ("q.load(P, dtype=int)", 'there is no dtype "int'),
    ("q.load(P, dtype=object())", "a dtype to compute in is expected"),
    ("q.load(P, context=0)", "the context is a number of tokens, at least 1, not 0"),
    ("q.load(A, context='8k')", "the context is a number of tokens, at least 1, not '8k'"),
    ("q.load(3)", "a path is expected, as text or pathlib.Path, not 3"),
    ("q.load(None)", "not None"),
    ("q.load('')", "is not a path"),
    ("q.save(OUT, pair)", "not the pair that load returns"),
    ("q.save(OUT, {})", "a model is expected, as load returns it, not a dict"),
    ("q.save(3, model)", "a path is expected"),
    ("q.restore(None)", "a path is expected"),
    ("q.quantize_model(pair, 'fp', [])", "not the pair that load returns"),
    ("q.quantize_model(model, {'name': 'x'}, [])", "a recipe is expected, or the name of one"),
    ("q.quantize_model(model, None, [])", "a recipe is expected"),
    ("q.quantize_model(model, 'quik-4b', None)", "takes a list of batches of token ids, [batch, length] each, not None"),
    ("q.quantize_model(model, 'quik-4b', 'text')", "takes a list of batches"),
    ("q.quantize_model(model, 'quik-4b', ['text'])", "turn it into tokens first"),
    ("q.quantize_model(model, 'quik-4b', [{'input_ids': [[1]]}])", 'take its "input_ids"'),
    ("q.quantize_model(model, 'quik-4b', [[1, 2, 3]])", "has the shape (3,), where [batch, length] is expected; one row"),
    ("q.quantize_model(model, 'quik-4b', np.zeros((2, 8), int))", "has the shape (8,)"),
    ("q.quantize_model(model, 'quik-4b', [[[1, 2], [3]]])", "rows of different lengths"),
    ("q.quantize_model(model, 'quik-4b', [np.zeros((1, 4))])", "holds float64, where whole numbers"),
    (
        "q.quantize_model(model, 'quik-4b', [np.full((1, 4), 257)])",
        "holds token 257, which is outside the model's vocabulary of 257",
    ),
    ("q.quantize_model(model, 'quik-4b', [np.full((1, 4), -1)])", "holds token -1"),
    ("q.quantize_model(model, 'quik-4b', [np.full((1, 4), 2**40)])", f"holds token {2**40}"),
    ("q.quantize_model(model, 'quik-4b', [np.zeros((1, 0), int)])", "has no tokens"),
    ("q.quantize_model(model, 'quik-4b', [np.zeros((1, 300), int)])", "exceeds the model's context of 256"),
    ("q.calibrate(*nnx.split(model)[:1], pure_params(model), [np.full((1, 4), 257)])", "holds token 257"),
    ("q.evaluate(model, np.arange(8))", "has the shape (8,), where [batch, length] is expected; one row of tokens is ids[None]"),
    ("q.evaluate(model, [[1, 2], [3]])", "rows of different lengths"),
    ("q.evaluate(model, 'text')", "turn it into tokens first"),
    ("q.evaluate(model, np.full((1, 8), 257))", "a set of windows holds token 257"),
    ("q.evaluate(model, np.zeros((1, 1), int))", "at least 2 tokens"),
    ("q.evaluate(pair, np.zeros((1, 8), int))", "not the pair that load returns"),
    ("q.evaluate(model, np.zeros((2, 8), int), Reference(model, []))", "made from 0 windows, not from these 2"),
    ("q.reference(model, np.arange(8))", "has the shape (8,)"),
    ("q.windows('text', 4)", "windows are cut from one row of token ids, not from 'text'"),
    ("q.windows(np.zeros((2, 8), int), 4)", "of shape (2, 8)"),
    ("q.windows([1.5, 2.5], 2)", "windows are cut from one row of token ids"),
    ("G.generate('hello')", "turn it into tokens first: quikjax.texts.tokenize"),
    ("G.generate(['hello'])", "a prompt is 'hello' (str), where token ids are expected"),
    ("G.generate(tokenizer('hi'))", 'take its "input_ids"'),
    ("G.generate([1, 2, 3])", "prompts are rows of token ids; one row of tokens is [ids]"),
    ("G.generate(np.arange(3))", "one row of tokens is [ids]"),
    ("G.generate(np.ones((1, 2, 2), int))", "a prompt holds a ndarray, where whole numbers"),
    ("G.generate([[1.5]])", "a prompt holds 1.5 (float), where whole numbers"),
    ("G.generate(None)", "prompts are rows of token ids, such as [[1, 2, 3]], not None"),
    ("G.generate([[2**40]])", "outside the model's vocabulary of 257"),
    ("G.generate([[1]], max_new_tokens='3')", "max_new_tokens must be a whole number, not '3' (str)"),
    ("G.generate([[1]], max_new_tokens=2.5)", "max_new_tokens must be a whole number, not 2.5 (float)"),
    ("G.generate([[1]], step=0)", "step must be at least 1, not 0"),
    ("G.generate([[1]], seed=1.5)", "a seed must be a whole number, not 1.5"),
    ("G.generate([[1]], seed=True)", "a seed must be a whole number, not True"),
    ("G.generate([[1]], samples=0)", "the number of samples of each prompt must be at least 1"),
    ("G.generate([[1]], sampling=0.7)", "sampling is a quikjax.Sampling, such as Sampling(temperature=0.7), not 0.7"),
    ("G.generate([[1]], stop_strings=[5])", "stop strings are texts; tokens that end a text are given as stop"),
    ("q.Sampling(temperature='hot')", "temperature is a number, not 'hot'"),
    ("q.Sampling(temperature=1, top_k=1.5)", "top-k keeps that many tokens, a whole number, not 1.5"),
    ("q.Generator(pair)", "not the pair that load returns"),
    ("q.Generator(model, context='9')", "the context must be a whole number, not '9'"),
    ("q.generate(model, pure_params(model), [[1]])", "nnx.split(model)[0], not a LlamaForCausalLM"),
    ("q.generate(nnx.split(model)[0], {}, [[1]])", "the parameters are not those of the model's definition"),
    ("model([[1, 2]])", "a model takes an array of token ids [batch, length], not a list"),
    ("model(np.arange(3))", "not int64 of shape (3,); one row of tokens is ids[None]"),
    ("model(np.zeros((1, 2)))", "not float64 of shape (1, 2)"),
    ("q.windows(np.arange(9), '4')", "the tokens of a window must be a whole number, not '4'"),
    ("q.dequantize(pure_params(model))", "a packed weight is expected (QuikWeight, "),
    ("q.load(P, dtype=None)", "a dtype to compute in is expected"),
    ("q.quantize_checkpoint(P, OUT, 'quik-4b', [[1]])", "calibration is a function from a tokenizer to tokens, not a list"),
    ("q.quantize_checkpoint(P, OUT, 'quik-4b', lambda t: np.arange(8))", "has the shape (8,)"),
    ("q.quantize_checkpoint(P, OUT, 'quik-4b', lambda t: np.full((1, 8), 999))", "holds token 999"),
    ("q.quantize_checkpoint(P, OUT, 'fp', dtype='bf16')", 'did you mean "bfloat16"'),
    ("q.quantize_checkpoint(P, None, 'fp')", "a path is expected"),
    ("q.quantize_checkpoint(P, OUT, 5)", "a recipe is expected"),
]
PROGRAM = """
import json, sys, traceback
import numpy as np
import quikjax as q
from flax import nnx
from quikjax.evaluation import Reference
from quikjax.models.registry import pure_params
P, A, OUT, cases = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
pair = q.load(P, dtype="float32")
model, tokenizer = pair
G = q.Generator(model, tokenizer=tokenizer)
q.save(A, model)
said = []
for case in cases:
    try:
        eval(case)
        said.append("nothing")
    except q.QuikError as error:
        said.append(str(error))
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def said(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each case says, all of them in one process."""
    directory = tmp_path_factory.mktemp("callers")
    arguments = [tiny_checkpoint, directory / "a", directory / "out", json.dumps([case for case, _ in CASES])]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True)
    assert not (directory / "out").exists()
    return dict(zip([case for case, _ in CASES], json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize(("case", "words"), CASES)
def test_a_mistake_is_a_sentence(said: dict[str, str], case: str, words: str) -> None:
    assert words in said[case]
    assert "\n" not in said[case]
