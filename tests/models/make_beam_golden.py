"""Make the golden values of beam search: what transformers' `generate` finds, for `beam_cases.py`.

As `make_golden.py`, which says what to install:

    /tmp/torchvenv/bin/python tests/models/make_beam_golden.py

`golden/beams-NAME.npz` holds `seed` and `checksum` of the weights, and of every case, for each text and beam, `CASE/tokens`
`[texts, beams, NEW]` (-1 behind the end, stop tokens included) and `CASE/scores` `[texts, beams]`, best first.
"""

from pathlib import Path
from typing import Any

import bart_variants
import make_encoder_golden
import make_golden
import model_variants
import numpy as np
from beam_cases import CASES, MODELS, NEW, STOPS, texts

GOLDEN = Path(__file__).parent / "golden"


def found(model: Any, fields: dict[str, Any], text: list[int], case: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens `[beams, NEW]` and scores `[beams]` of one text."""
    import torch  # type: ignore[import-not-found, unused-ignore]
    import transformers

    stops, beams = case.get("stops", STOPS), case["beams"]
    names = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
    settings = transformers.GenerationConfig(
        **{name: fields[name] for name in names if name in fields},
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        num_beams=beams,
        num_return_sequences=beams,
        eos_token_id=list(stops) or None,
        pad_token_id=1,
        min_new_tokens=case.get("min_new_tokens"),
        no_repeat_ngram_size=case.get("no_repeat_ngram", 0),
        repetition_penalty=case.get("repetition_penalty", 1.0),
        **({"length_penalty": case.get("length_penalty", 1.0)} if beams > 1 else {}),
        **({"early_stopping": case.get("early_stopping", False)} if beams > 1 else {}),
    )
    ids = torch.tensor([text])
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    output = model.generate(**given, generation_config=settings)
    behind = 1 if "decoder_start_token_id" in fields else len(text)
    tokens = np.full((beams, NEW), -1, np.int16)
    for row, whole in enumerate(output.sequences.numpy()[:, behind:]):
        end = next((i + 1 for i, token in enumerate(whole) if token in stops), len(whole))
        tokens[row, :end] = whole[:end]
    scores = output.sequences_scores.numpy() if beams > 1 else np.zeros(1)
    return tokens, scores.astype(np.float32)


def main() -> None:
    for name in MODELS:
        bart = name in bart_variants.VARIANTS
        fields = (bart_variants if bart else model_variants).VARIANTS[name]
        seed = 3
        model, crc = (make_encoder_golden if bart else make_golden).build(fields, seed)
        # What a model says of its own generation must not add to a case's settings.
        model.generation_config = type(model.generation_config)()
        arrays: dict[str, Any] = {"seed": seed, "checksum": crc}
        for key, case in CASES.items():
            pairs = [found(model, fields, text, case) for text in texts(name)]
            arrays[f"{key}/tokens"], arrays[f"{key}/scores"] = (np.stack(part) for part in zip(*pairs, strict=True))
        np.savez_compressed(GOLDEN / f"beams-{name}.npz", **arrays)
        print(name, {key: (arrays[f"{key}/tokens"] >= 0).sum(-1).tolist() for key in CASES})


if __name__ == "__main__":
    main()
