"""Make BART's golden values: what Hugging Face's PyTorch models compute, in float32, for `bart_variants.py`.

As `make_golden.py`, which says what to install:

    /tmp/torchvenv/bin/python tests/models/make_bart_golden.py [NAME ...]

Each `golden/NAME.npz` holds
- `config` (JSON), `seed` and `checksum` of the weights (`random_weights.py`);
- `ids` and `mask` [2, length]: a whole text, and one padded on the right, an end token behind either;
- of a classifier `output`, its logits; of any other `target` [2, written], the decoder's tokens, and `output` [2, written, ...],
  logits, or the last hidden states of a model without a head;
- of a summarizer `tokens` [2, new]: its own greedy texts of these two, with the tokens that it forces, under the repetition
  `penalty` (a random model whose norms stand last says one word over and over without).
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from bart_variants import VARIANTS, VOCABULARY
from make_encoder_golden import build
from make_golden import is_telling

GOLDEN = Path(__file__).parent / "golden"
LENGTH, SHORT, WRITTEN, NEW, PENALTY = 24, 15, 12, 20, 3.0


def greedy(model: Any, fields: dict[str, Any], given: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """`NEW` greedy tokens of each text without the start token, and the scores that each free one was chosen by."""
    import transformers

    names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "eos_token_id", "pad_token_id")
    settings = transformers.GenerationConfig(
        **{name: fields[name] for name in names if name in fields},
        max_new_tokens=NEW,
        num_beams=1,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        repetition_penalty=PENALTY,
    )
    found = model.generate(**given, generation_config=settings)
    tokens = found.sequences.numpy()[:, 1:]
    free = slice(1 if "forced_bos_token_id" in fields else 0, NEW - 1)
    return tokens, np.stack([step.numpy() for step in found.scores])[free]


def make(name: str) -> None:
    """Write `golden/NAME.npz`."""
    import torch  # type: ignore[import-not-found, unused-ignore]

    fields = VARIANTS[name]
    rng = np.random.default_rng(len(name))
    ids = rng.integers(3, VOCABULARY, (2, LENGTH))
    mask = np.ones_like(ids)
    mask[1, SHORT:] = 0
    ids[1, SHORT:] = fields["pad_token_id"]
    ids[0, -1] = ids[1, SHORT - 1] = fields["eos_token_id"]
    target = rng.integers(3, VOCABULARY, (2, WRITTEN))
    target[:, 0] = fields["decoder_start_token_id"]
    given = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    head = fields["architectures"][0]
    kept: dict[str, Any] = {}
    for seed in range(200):
        model, crc = build(fields, seed)
        if head != "BartForConditionalGeneration":
            break
        tokens, steps = greedy(model, fields, given)
        if tokens.shape[1] == NEW and all(is_telling(tokens[row], steps[:, row], variety=9) for row in (0, 1)):
            kept |= {"tokens": tokens.astype(np.int16), "penalty": PENALTY}
            break
    else:
        raise SystemExit(f"{name}: no seed gives text worth comparing")
    with torch.no_grad():
        if head == "BartForSequenceClassification":
            output = model(**given).logits
        else:
            found = model(**given, decoder_input_ids=torch.from_numpy(target))
            output = found.last_hidden_state if head == "BartModel" else found.logits
            kept["target"] = target.astype(np.int16)
    np.savez_compressed(
        GOLDEN / f"{name}.npz",
        config=json.dumps(fields, sort_keys=True),
        seed=seed,
        checksum=crc,
        ids=ids.astype(np.int16),
        mask=mask.astype(np.int8),
        output=output.numpy(),
        **kept,
    )
    print(f"{name}: seed {seed}, {tuple(output.shape)}, {(GOLDEN / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VARIANTS:
        make(chosen)
