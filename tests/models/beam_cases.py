"""What `make_beam_golden.py` asks transformers for, and `test_beams.py` asks here. Imports nothing: one side has no JAX."""

from typing import Any

MODELS = ("gpt2", "bart-summarizer")
NEW = 16
# So many tokens end a text that some beams end early and others never.
STOPS = (7, 11, 23, 38, 52)
CASES: dict[str, dict[str, Any]] = {
    "two": {"beams": 2},
    "sums": {"beams": 4, "length_penalty": 0.0},
    "as-bart-large-cnn": {"beams": 4, "length_penalty": 2.0, "early_stopping": True, "no_repeat_ngram": 3, "min_new_tokens": 6},
    "never": {"beams": 3, "length_penalty": 0.7, "early_stopping": "never", "repetition_penalty": 1.2},
    "short": {"beams": 3, "length_penalty": -1.0, "no_repeat_ngram": 1},
    "endless": {"beams": 5, "stops": ()},
    "greedy": {"beams": 1, "no_repeat_ngram": 2, "min_new_tokens": 9},
}


def texts(name: str) -> list[list[int]]:
    """Three texts of unequal lengths, which repeat themselves."""
    ending = [2] if name.startswith("bart") else []
    return [[(5 * i) % 13 + 3 * k + 3 for i in range(6 + 5 * k)] + ending for k in range(3)]
