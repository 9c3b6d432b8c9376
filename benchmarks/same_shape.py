"""Train models of equal shape on equal data, for `quikjax study failure` to compare: seeds fixed, bytes for tokens.

    python benchmarks/same_shape.py --text train.txt --out same

writes, as Hugging Face directories (they are made, not committed), models of 4 blocks of `--width` 128 (an MLP four times as
wide, 4 heads, GELU, learned positions, biases) and one byte tokenizer:

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
from scaling_family import FIGURES, as_tokens, drawn, initial, options, publish, successor_loss, train

from quikjax.models.encoder import Encoder
from quikjax.models.registry import abstract_model
from quikjax.testing import tiny_tokenizer

MASK = "<|mask|>"
SHARE = 0.15  # of the bytes, as BERT's

# Of the learning rate, the same for all. At 1.5e-3 the encoder, which learns from 15 % of the bytes, stays for 1500 steps and
# more where it knows how often each byte occurs (a loss of 3.2) and does not read what is around it.
PEAK = 5e-4
MODELS = ("decoder-pre", "decoder-post", "encoder-post")


def configuration(name: str, width: int) -> dict[str, Any]:
    """The `config.json` of one of `MODELS`."""
    shape = {
        "vocab_size": 258,
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 256,
        "eos_token_id": 256,
    }
    if name == "encoder-post":
        bert = {"model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_act": "gelu", "type_vocab_size": 1}
        return {**shape, **bert, "intermediate_size": 4 * width}
    opt = {"model_type": "opt", "architectures": ["OPTForCausalLM"], "activation_function": "gelu"}
    return {
        **shape,
        **opt,
        "ffn_dim": 4 * width,
        "word_embed_proj_dim": width,
        "do_layer_norm_before": name == "decoder-pre",
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
    parser.set_defaults(steps=4000, batch=32, length=64)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args(namespace=argparse.Namespace(started=time.perf_counter()))
    tokens, bytes_ = as_tokens(args.text.read_text(encoding="utf-8")), tokenizer()
    mask = bytes_.mask_token_id
    for name in args.models:
        directory = args.out / name
        if not (directory / FIGURES).exists():
            config = configuration(name, args.width)
            model = abstract_model(config)
            # Wide enough that the first steps do not make all embeddings alike: from weights of 0.02 models whose norms stand
            # behind the sums learn how often each byte occurs, and no more for hundreds of steps.
            params = initial(model, args.seed, args.width**-0.5)
            if isinstance(model, Encoder):
                trained, figures = train(
                    name, model, params, PEAK, lambda index: masked(tokens, index, mask, args), masked_loss, args
                )
            else:
                trained, figures = train(
                    name, model, params, PEAK, lambda index: (drawn(tokens, index, args),), successor_loss, args
                )
            publish(directory, config, trained, bytes_, {"model": name, **figures})
        print(json.dumps(json.loads((directory / FIGURES).read_text())), flush=True)


if __name__ == "__main__":
    main()
