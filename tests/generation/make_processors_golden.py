"""Write golden/processors.npz: random logits through transformers' own logits processors. Needs PyTorch, which quikjax does not.

pip install torch==2.13.0 transformers==5.24.0
python tests/generation/make_processors_golden.py
"""

from pathlib import Path
from typing import Any

import numpy as np

# temperature, top-k, top-p, min-p, repetition penalty
CASES = [
    (0.7, 0, 1.0, 0.0, 1.0),
    (1.0, 5, 1.0, 0.0, 1.0),
    (1.0, 0, 0.8, 0.0, 1.0),
    (1.0, 0, 1.0, 0.1, 1.0),
    (1.0, 0, 1.0, 0.0, 1.3),
    (0.6, 40, 0.9, 0.05, 1.1),
    (1.5, 300, 0.5, 0.0, 0.8),
    (0.2, 1000, 0.99, 0.3, 1.0),
    (2.0, 1, 0.01, 0.0, 1.2),
]


def main() -> None:
    import torch  # type: ignore[import-not-found, unused-ignore]
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    rng = np.random.default_rng(0)
    logits = (4 * rng.standard_normal((6, 1000))).astype(np.float32)
    ids = rng.integers(0, 1000, (6, 40))
    seen = np.zeros(logits.shape, bool)
    seen[np.arange(6)[:, None], ids] = True
    arrays: dict[str, Any] = {"logits": logits, "seen": seen}
    for i, (temperature, top_k, top_p, min_p, penalty) in enumerate(CASES):
        processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        processors.append(TopPLogitsWarper(top_p))
        if min_p:
            processors.append(MinPLogitsWarper(min_p))
        arrays[f"case{i}/settings"] = np.asarray([temperature, top_k, top_p, min_p, penalty])
        arrays[f"case{i}/expected"] = processors(torch.tensor(ids), torch.tensor(logits)).numpy()
    np.savez_compressed(Path(__file__).parent / "golden" / "processors.npz", **arrays)


if __name__ == "__main__":
    main()
