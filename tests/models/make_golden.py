"""Make the golden values: what Hugging Face's PyTorch models compute, in float32, for every row of `model_variants.py`.

PyTorch is no dependency of this project; these values were made with

    python3 -m venv /tmp/torchvenv
    /tmp/torchvenv/bin/pip install torch==2.13.0 transformers==5.23.0
    /tmp/torchvenv/bin/python tests/models/make_golden.py [NAME ...]

Each `golden/NAME.npz` holds
- `config` (JSON), `seed` and `checksum` of the weights (`random_weights.py`);
- `ids` [2, length] and `logits` of the positions in `kept`, [2, kept, vocabulary];
- `short`, and `left` and `right` [short, vocabulary]: the second row cut to `short` tokens and padded on that side;
- `prompt`, `tokens` [64] and `steps` [64, vocabulary]: greedy generation with a cache, and the logits it chose from;
- `bfloat16` and `float16`: PyTorch's own error in those types, root mean square relative to the logits'.
"""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from model_variants import VARIANTS, VOCABULARY
from random_weights import checksum, random_weights

GOLDEN = Path(__file__).parent / "golden"
LENGTH, SHORT, PROMPT, NEW = 40, 29, 8, 64
# ALiBi is rounded to bfloat16, which only shows beyond 256 positions.
LONG = 300


def build(fields: dict[str, Any], seed: int) -> tuple[Any, int]:
    """The PyTorch model with its random weights (float32, evaluation mode), and their checksum."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    import transformers

    # A copy: transformers writes into nested fields.
    config = transformers.AutoConfig.for_model(**copy.deepcopy(fields))
    # Not "eager": its Falcon adds ALiBi twice. But only "eager" knows GPT-2's other order.
    attention = "eager" if fields.get("reorder_and_upcast_attn") else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).eval()
    assert model.config._attn_implementation == attention
    parameters = dict(model.named_parameters())
    weights = random_weights({name: tuple(value.shape) for name, value in parameters.items()}, seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model, checksum(weights)


def run(model: Any, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """float32 logits [batch, length, vocabulary]. Positions count the tokens that `mask` lets through."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    mask = np.ones_like(ids) if mask is None else mask
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        output = model(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            use_cache=False,
        )
    return output.logits.float().numpy()


def greedy(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`NEW` greedy tokens with a cache, and the logits [NEW, vocabulary] that each was chosen from."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    ids, cache, steps, tokens = torch.from_numpy(prompt[None]), None, [], []
    with torch.no_grad():
        for _ in range(NEW):
            output = model(ids, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits[0, -1].numpy())
            ids = output.logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
    return np.array(tokens), np.stack(steps)


def is_telling(tokens: np.ndarray, steps: np.ndarray, variety: int) -> bool:
    """No choice so close that rounding could turn it, and not one phrase over and over."""
    ordered = np.sort(steps, axis=1)
    margin = (ordered[:, -1] - ordered[:, -2]).min() / steps.std()
    return bool(margin > 2e-3 and len(set(tokens.tolist())) >= variety)


def make(name: str) -> None:
    """Write `golden/NAME.npz`."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    fields = VARIANTS[name]
    rng = np.random.default_rng(len(name))
    length = LONG if fields.get("alibi") else LENGTH
    ids = rng.integers(0, VOCABULARY, (2, length))
    prompt = rng.integers(0, VOCABULARY, PROMPT)
    for seed in range(200):
        model, crc = build(fields, seed)
        tokens, steps = greedy(model, prompt)
        # ALiBi leaves a random model little but the last tokens to go by.
        if is_telling(tokens, steps, variety=10 if fields.get("alibi") else 12):
            break
    else:
        raise SystemExit(f"{name}: no seed gives text worth comparing")

    # A fresh model for every run: dynamic rotary scaling remembers the longest call.
    kept = np.unique(np.append(np.arange(0, length, 1 if length == LENGTH else 8), length - 1))
    logits = run(build(fields, seed)[0], ids)
    padded = {}
    for side in ("left", "right"):
        mask = np.ones_like(ids)
        mask[1] = np.arange(length) >= length - SHORT if side == "left" else np.arange(length) < SHORT
        placed = ids.copy()
        placed[1] = 0
        placed[1][mask[1] == 1] = ids[1, :SHORT]
        padded[side] = run(build(fields, seed)[0], placed, mask)[1][mask[1] == 1]
    if "dynamic" in json.dumps(fields):
        # There the base depends on the longest row of a batch; what a row alone gives is the one answer that makes sense.
        alone = run(build(fields, seed)[0], ids[1:, :SHORT])[0]
        padded = {"left": alone, "right": alone}

    error = {}
    for dtype in ("bfloat16", "float16"):
        half = run(build(fields, seed)[0].to(getattr(torch, dtype)), ids)
        error[dtype] = np.sqrt(np.mean((half - logits) ** 2) / np.mean(logits**2))
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        config=json.dumps(fields, sort_keys=True),
        seed=seed,
        checksum=crc,
        ids=ids.astype(np.int16),
        kept=kept.astype(np.int16),
        logits=logits[:, kept],
        short=SHORT,
        **padded,
        prompt=prompt.astype(np.int16),
        tokens=tokens.astype(np.int16),
        steps=steps,
        **error,
    )
    size = (GOLDEN / f"{name}.npz").stat().st_size
    print(f"{name}: seed {seed}, {len(set(tokens.tolist()))} different tokens, {size} bytes, " + str(error))


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VARIANTS:
        make(chosen)
