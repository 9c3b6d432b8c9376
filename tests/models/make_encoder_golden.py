"""Make the encoders' golden values: what Hugging Face's PyTorch models compute, in float32, for `encoder_variants.py`.

As `make_golden.py`, which says what to install:

    /tmp/torchvenv/bin/python tests/models/make_encoder_golden.py [NAME ...]

Each `golden/NAME.npz` holds
- `config` (JSON), `seed` and `checksum` of the weights (`random_weights.py`);
- `ids`, `mask` and (where the family has more than one) `types`, [3, length]: a whole row, one padded on the right, and one with
  a second text;
- `output`: logits, or the last hidden states of a model without a head, whose pooler's output is `pooled`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from encoder_variants import VARIANTS, VOCABULARY
from random_weights import checksum, random_weights

GOLDEN = Path(__file__).parent / "golden"
TIED = ("decoder.weight", "decoder.bias", "vocab_projector.weight", "embed_tokens.weight", "lm_head.weight")
SEED, LENGTH, SHORT, FIRST = 1, 24, 15, 9


def build(fields: dict[str, Any], seed: int = SEED) -> tuple[Any, int]:
    """The PyTorch model with its random weights (float32, evaluation mode), and their checksum."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    import transformers

    config = transformers.AutoConfig.for_model(**fields)
    model = getattr(transformers, fields["architectures"][0])(config).eval()
    # A head that is tied has the name of what it is tied to.
    every = model.named_parameters(remove_duplicate=False)
    parameters = {name: value for name, value in every if not name.endswith(TIED)}
    # BART's bias of the logits is not trained, but published.
    parameters |= {name: value for name, value in model.named_buffers() if name == "final_logits_bias"}
    weights = random_weights({name: tuple(value.shape) for name, value in parameters.items()}, seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model, checksum(weights)


def make(name: str) -> None:
    """Write `golden/NAME.npz`."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    fields = VARIANTS[name]
    rng = np.random.default_rng(len(name))
    padding = fields["pad_token_id"]
    ids = rng.integers(padding + 1, VOCABULARY, (3, LENGTH))
    mask = np.ones_like(ids)
    mask[1, SHORT:] = 0
    # RoBERTa's positions follow from where its padding token stands.
    ids[1, SHORT:] = padding
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    kinds = fields.get("type_vocab_size", 1)
    types = np.zeros_like(ids)
    if kinds > 1:
        types[2, FIRST:] = kinds - 1
        given["token_type_ids"] = torch.from_numpy(types)
    model, crc = build(fields)
    with torch.no_grad():
        found = model(**given)
    headless = fields["architectures"][0].endswith("Model")
    output = found.last_hidden_state if headless else found.logits
    pooled = getattr(found, "pooler_output", None)
    kept: dict[str, Any] = {"types": types.astype(np.int8)} if kinds > 1 else {}
    if pooled is not None:
        kept["pooled"] = pooled.numpy()
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        config=json.dumps(fields, sort_keys=True),
        seed=SEED,
        checksum=crc,
        ids=ids.astype(np.int16),
        mask=mask.astype(np.int8),
        output=output.numpy(),
        **kept,
    )
    print(f"{name}: {tuple(output.shape)}, {(GOLDEN / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VARIANTS:
        make(chosen)
