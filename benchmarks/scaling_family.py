"""Train a family of small LLaMAs on a text, for `quikjax study scaling` where there is no network: seeds fixed, bytes for tokens.

    python benchmarks/scaling_family.py --text train.txt --held-out test.txt --out family --sizes 0.4 1 3 8

writes `family/0.4m`, `family/1m`, ... as Hugging Face directories (they are made, not committed), each with the same byte
tokenizer, and one JSON line per model on stdout: parameters, tokens seen, losses, perplexity on the held-out text, seconds.
Same machine and arguments, same bytes. Every model sees the same tokens in the same order.

With `--minutes` a model that is not finished by then is left in `family/8m.part.npz`; the same command goes on from there, to the
same bytes, and a model that is there is not trained again.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Int32

from quikjax.evaluation import evaluate, windows
from quikjax.models.base import CausalLM, Transformer, count_parameters
from quikjax.models.registry import abstract_model, dotted, nested, pure_params
from quikjax.testing import END, tiny_config, tiny_tokenizer

# Millions of parameters: width, MLP width, blocks, heads, peak learning rate.
SIZES: dict[str, tuple[int, int, int, int, float]] = {
    "0.1": (48, 144, 3, 4, 6e-3),
    "0.4": (96, 288, 3, 4, 4e-3),
    "1": (144, 384, 4, 4, 3e-3),
    "3": (192, 512, 7, 6, 2e-3),
    "8": (288, 768, 8, 8, 1.5e-3),
}
WARMUP = 50
FIGURES = "figures.json"


def configuration(size: str) -> dict[str, Any]:
    """The `config.json` of one member of the family."""
    hidden, intermediate, layers, heads, _ = SIZES[size]
    return tiny_config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=512,
    )


# The last layer of attention or of the MLP in LLaMA, OPT and BERT: its result is added to the residual.
_WRITES = ("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight", "output.dense.weight")


def initial(model: Transformer, seed: int, spread: float = 0.02) -> dict[str, Any]:
    """Normal weights of deviation `spread`, those that write to the residual smaller by its depth; norms 1, biases 0."""
    params, key = {}, jax.random.key(seed)
    depth = (2 * model.config.layers) ** -0.5
    for path, leaf in sorted(dotted(pure_params(model)).items()):
        key, own = jax.random.split(key)
        deviation = spread * (depth if path.endswith(_WRITES) else 1)
        if len(leaf.shape) == 1:
            params[path] = jnp.zeros(leaf.shape) if path.endswith("bias") else jnp.ones(leaf.shape)
        else:
            params[path] = deviation * jax.random.normal(own, leaf.shape)
    return nested(params)


def drawn(tokens: Int32[np.ndarray, " bytes"], index: int, args: argparse.Namespace) -> Int32[np.ndarray, "batch _"]:
    """The windows of step `index`, each of one token more than `args.length`."""
    starts = np.random.default_rng((args.seed, index)).integers(0, len(tokens) - args.length - 1, args.batch)
    return np.stack([tokens[start : start + args.length + 1] for start in starts])


def successor_loss(model: CausalLM, ids: Int32[Array, "batch _"]) -> Float32[Array, ""]:
    """Mean cross-entropy of every token but the first, given those before it."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]), ids[:, 1:]))


def train(
    name: str,
    model: Transformer,
    params: dict[str, Any],
    peak: float,
    draw: Callable[[int], tuple[np.ndarray, ...]],
    loss: Callable[..., Float32[Array, ""]],
    args: argparse.Namespace,
) -> tuple[Transformer, dict[str, Any]]:
    """A trained model, and its figures.

    Args:
        name: of the model, and of the file of an unfinished training in `args.out`.
        model: abstract.
        params: to begin with.
        peak: the highest learning rate.
        draw: gives the arrays of a step by its number.
        loss: of a model on such arrays.
    """
    graphdef = nnx.split(model)[0]
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, WARMUP, max(args.steps, WARMUP + 1), peak / 20)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1, mask=_matrices))
    state = optimizer.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, *arrays: Array) -> tuple[Any, Any, Float32[Array, ""]]:
        value, gradient = jax.value_and_grad(lambda params: loss(nnx.merge(graphdef, params), *arrays))(params)
        updates, state_after = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state_after, value

    part = args.out / f"{name}.part.npz"
    losses: list[float] = []
    first, spent = 0, 0.0
    if part.exists():
        params, state, losses, spent = _resumed(part, (params, state), args)
        first = len(losses)
        print(f"{name} goes on after step {first}", file=sys.stderr, flush=True)
    began = time.perf_counter() - spent
    for index in range(first, args.steps):
        params, state, value = step(params, state, *(jnp.asarray(array) for array in draw(index)))
        losses.append(float(value))
        if (index + 1) % 50 == 0:
            mean, seconds = math.fsum(losses[-50:]) / 50, time.perf_counter() - began
            print(f"{name} step {index + 1} loss {mean:.4f} {seconds:.0f} s", file=sys.stderr, flush=True)
        if time.perf_counter() - args.started > 60 * args.minutes and index + 1 < args.steps:
            _keep(part, (params, state), losses, time.perf_counter() - began, args)
            print(f"{name}: {index + 1} of {args.steps} steps; give the same command again", file=sys.stderr)
            sys.exit(3)
    figures = {
        "parameters": count_parameters(params),
        "tokens": args.steps * args.batch * args.length,
        "train_loss": math.fsum(losses[-50:]) / len(losses[-50:]),
        "seconds": time.perf_counter() - began,
    }
    part.unlink(missing_ok=True)
    return nnx.merge(graphdef, params), figures


def _told(args: argparse.Namespace) -> str:
    """What a part of a training may be resumed with."""
    return json.dumps([str(args.text), args.steps, args.batch, args.length, args.seed])


def _keep(part: Path, tree: Any, losses: list[float], seconds: float, args: argparse.Namespace) -> None:
    """An unfinished training, written and renamed."""
    leaves: dict[str, Any] = {f"leaf{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    part.parent.mkdir(parents=True, exist_ok=True)
    whole = part.with_suffix(".tmp.npz")
    np.savez(whole, losses=np.asarray(losses), seconds=seconds, told=_told(args), **leaves)
    os.replace(whole, part)


def _resumed(part: Path, tree: Any, args: argparse.Namespace) -> tuple[Any, Any, list[float], float]:
    """Parameters, the optimizer's state, losses so far and seconds so far of an unfinished training."""
    kept = np.load(part)
    if str(kept["told"]) != _told(args):
        sys.exit(f"{part} was begun with {kept['told']}, not {_told(args)}; give the same arguments, or remove it")
    leaves = [jnp.asarray(kept[f"leaf{i}"]) for i in range(len(jax.tree.leaves(tree)))]
    params, state = jax.tree.unflatten(jax.tree.structure(tree), leaves)
    return params, state, kept["losses"].tolist(), float(kept["seconds"])


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def as_tokens(text: str) -> Int32[np.ndarray, " bytes"]:
    """The tokens of the family's tokenizer."""
    return np.asarray(tiny_tokenizer()(text.replace(END, ""), verbose=False)["input_ids"], np.int32)


def publish(directory: Path, config: dict[str, Any], model: Transformer, tokenizer: Any, figures: dict[str, Any]) -> None:
    """Write a model as Hugging Face publishes one, its figures beside it and last: where they are, it is whole."""
    from safetensors.numpy import save_file

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    save_file({path: np.asarray(leaf) for path, leaf in dotted(pure_params(model)).items()}, directory / "model.safetensors")
    tokenizer.save_pretrained(str(directory))
    (directory / FIGURES).write_text(json.dumps(figures))


def options(description: str | None) -> argparse.ArgumentParser:
    """The options of a training."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text to train on")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf, help="leave an unfinished model after so many")
    return parser


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--held-out", type=Path, required=True, help="UTF-8 text to report perplexity on")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    args = parser.parse_args(namespace=argparse.Namespace(started=time.perf_counter()))
    tokens, held_out = (as_tokens(path.read_text(encoding="utf-8")) for path in (args.text, args.held_out))
    ids = windows(held_out, args.length, 20)
    for size in args.sizes:
        directory = args.out / f"{size}m"
        if not (directory / FIGURES).exists():
            config = configuration(size)
            abstract = abstract_model(config)
            begin, peak = initial(abstract, args.seed), SIZES[size][4]
            model, figures = train(f"{size}m", abstract, begin, peak, lambda at: (drawn(tokens, at, args),), successor_loss, args)
            figures = {"size": size, **figures, "held_out_perplexity": evaluate(model, ids).perplexity}
            publish(directory, config, model, tiny_tokenizer(), figures)
        print((directory / FIGURES).read_text(), flush=True)


if __name__ == "__main__":
    main()
