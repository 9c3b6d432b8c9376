"""Greedy generation from the exported programs beside this file: python run.py TEXT [NEW_TOKENS].

Needs jax, flatbuffers (with which jax reads programs), numpy and tokenizers; export.json says how the programs are called.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np


def open_export(directory: Path) -> tuple[dict[str, Any], dict[str, jax.Array], Any, Any]:
    """The content of export.json, the parameters, and the two programs for this machine."""
    spec = json.loads((directory / "export.json").read_text(encoding="utf-8"))
    platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if platform not in spec["programs"]:
        raise SystemExit(f"exported for {', '.join(spec['programs'])}, not for {platform}; set JAX_PLATFORMS or export again")
    stored, params = np.load(directory / "params.npz"), {}
    for name, of in spec["parameters"].items():
        array = stored[name]
        if of["dtype"] == "int4":  # two codes in a byte, the first in its lower half
            array = np.stack([array << 4 >> 4, array >> 4], axis=-1).reshape(-1)[: math.prod(of["shape"])]
            params[name] = jnp.asarray(array.reshape(of["shape"])).astype(jnp.int4)
        else:  # bytes of what NumPy does not know are stored as integers
            params[name] = jnp.asarray(array.view(jnp.dtype(of["dtype"])))
    files = [(directory / spec["programs"][platform][name]).read_bytes() for name in ("prefill", "decode")]
    prefill, decode = (jax.export.deserialize(bytearray(file)).call for file in files)
    return spec, params, jax.jit(prefill), jax.jit(decode, donate_argnums=1)


def generate(opened: Any, prompts: list[list[int]], new: int) -> list[list[int]]:
    """Continue up to `batch` prompts of tokens greedily, each by at most `new` tokens."""
    spec, params, prefill, decode = opened
    longest = max(map(len, prompts))
    if len(prompts) > spec["batch"] or not 0 < min(map(len, prompts)) <= longest <= spec["length"]:
        raise SystemExit(f"at most {spec['batch']} prompts of 1 to {spec['length']} tokens can be read; export again for more")
    if new < 1 or longest + new > spec["context"]:
        raise SystemExit(f"at least 1 new token, and with the prompt at most {spec['context']}; export again for more")
    ids, lengths = np.zeros((spec["batch"], spec["length"]), np.int32), np.zeros(spec["batch"], np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    stops = np.array(spec["stops"], np.int32)
    tokens, state = prefill(params, ids, lengths, lengths > 0, stops)
    parts, left = [np.asarray(tokens)], new - 1
    while left > 0 and state["running"].any():
        tokens, state = decode(params, state, stops, np.int32(min(left, spec["chunk"])))
        parts.append(np.asarray(tokens))
        left -= spec["chunk"]
    rows = np.concatenate(parts, axis=1)[: len(prompts)].tolist()
    return [[token for token in row if token >= 0 and token not in spec["stops"]] for row in rows]


def tokens_of(tokenizer: Any, text: str, before: list[int]) -> list[int]:
    """The text's tokens behind those of `before`, less what the text begins with itself: BOS is not doubled."""
    inner = tokenizer.encode(text, add_special_tokens=False).ids
    typed = next((n for n in range(len(before), 0, -1) if inner[:n] == before[-n:]), 0)
    return before[: len(before) - typed] + inner


def text_behind(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text of `new`: decoded alone, the first word would lose its space, or half a character."""
    known, whole = tokenizer.decode(prompt), tokenizer.decode(prompt + new)
    pairs = zip(known, whole, strict=False)
    common = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(known), len(whole)))
    return whole[common:]


if __name__ == "__main__":
    from tokenizers import Tokenizer

    if len(sys.argv) not in (2, 3) or (len(sys.argv) == 3 and not sys.argv[2].isdigit()):
        raise SystemExit("usage: python run.py TEXT [NEW_TOKENS]")
    if hasattr(sys.stdout, "reconfigure"):  # a text is not lost because a terminal lacks its letters
        sys.stdout.reconfigure(errors="backslashreplace")
    here = Path(__file__).resolve().parent
    if not (here / "tokenizer.json").is_file():
        raise SystemExit("the model was exported without a tokenizer.json; import run.py and call generate with tokens")
    tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))
    opened = open_export(here)
    tokens = tokens_of(tokenizer, sys.argv[1], opened[0]["before"])
    new = int(sys.argv[2]) if len(sys.argv) == 3 else max(1, min(64, opened[0]["context"] - len(tokens)))
    print(text_behind(tokenizer, tokens, generate(opened, [tokens], new)[0]))
