"""Train models of equal shape on equal data, for `quikjax study failure` to compare: seeds fixed, bytes for tokens.

    python benchmarks/same_shape.py --text train.txt --out same

writes, as Hugging Face directories (they are made, not committed), models of 4 blocks of width 128 (MLP 512, 4 heads, GELU,
learned positions, biases) and one byte tokenizer:

    decoder-pre     causal, norms before attention and MLP (OPT)              predicts every next byte
    decoder-post    causal, norms behind the sums (OPT as its 350m)           predicts every next byte
    encoder-post    no causal mask, norms behind the sums (BERT)              predicts the 15 % of bytes that are masked

The first two differ in their norms, the last two in their mask and in what they predict. All see the same bytes in the same
order, from weights of the same spread. Same machine and arguments, same bytes; `--minutes` as in `scaling_family.py`.
"""

import argparse
import json
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float32, Int32
from scaling_family import FIGURES, as_tokens, drawn, options, publish, successor_loss, train

from quikjax.models.encoder import Encoder
from quikjax.models.registry import abstract_model
from quikjax.testing import tiny_tokenizer

MASK = "<|mask|>"
SHARE = 0.15  # of the bytes, as BERT's
PEAK = 2e-3

_SHAPE: dict[str, Any] = {
    "vocab_size": 258,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 256,
}
_OPT: dict[str, Any] = {
    **_SHAPE,
    "model_type": "opt",
    "architectures": ["OPTForCausalLM"],
    "activation_function": "gelu",
    "ffn_dim": 512,
    "word_embed_proj_dim": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "decoder-pre": {**_OPT, "do_layer_norm_before": True},
    "decoder-post": {**_OPT, "do_layer_norm_before": False},
    "encoder-post": {
        **_SHAPE,
        "model_type": "bert",
        "architectures": ["BertForMaskedLM"],
        "hidden_act": "gelu",
        "intermediate_size": 512,
        "type_vocab_size": 1,
    },
}


def tokenizer() -> Any:
    """Bytes, an end, and a mask."""
    made = tiny_tokenizer()
    made.add_special_tokens({"mask_token": MASK})
    return made


def masked(
    tokens: Int32[np.ndarray, " bytes"], index: int, mask: int, args: argparse.Namespace
) -> tuple[Int32[np.ndarray, "batch length"], Int32[np.ndarray, "batch length"], Bool[np.ndarray, "batch length"]]:
    """The bytes of step `index` with some of them masked, the bytes themselves, and which are masked."""
    ids = drawn(tokens, index, args)[:, 1:]
    chosen = np.random.default_rng((args.seed, index, 1)).random(ids.shape) < SHARE
    return np.where(chosen, mask, ids).astype(np.int32), ids, chosen


def masked_loss(
    model: Encoder, ids: Int32[Array, "batch length"], right: Int32[Array, "batch length"], chosen: Bool[Array, "batch length"]
) -> Float32[Array, ""]:
    """Mean cross-entropy of the bytes that are masked."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids), right)
    return jnp.sum(jnp.where(chosen, losses, 0.0)) / jnp.sum(chosen)


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(steps=600, batch=4)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    args = parser.parse_args(namespace=argparse.Namespace(started=time.perf_counter()))
    tokens, bytes_ = as_tokens(args.text.read_text(encoding="utf-8")), tokenizer()
    mask = bytes_.mask_token_id
    for name in args.models:
        directory = args.out / name
        if not (directory / FIGURES).exists():
            model = abstract_model(MODELS[name])
            if isinstance(model, Encoder):
                trained, figures = train(name, model, PEAK, lambda index: masked(tokens, index, mask, args), masked_loss, args)
            else:
                trained, figures = train(name, model, PEAK, lambda index: (drawn(tokens, index, args),), successor_loss, args)
            publish(directory, MODELS[name], trained, bytes_, {"model": name, **figures})
        print(json.dumps(json.loads((directory / FIGURES).read_text())), flush=True)


if __name__ == "__main__":
    main()
