"""Floor 3: one file per published `model_type`, found by `registry`."""
