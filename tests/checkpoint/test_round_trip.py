"""What is saved comes back, bit for bit."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tiny_artifacts import assert_same_bits, build, random_params

from quikjax import checkpoint
from quikjax.models.registry import pure_params


def test_restored_logits_are_bit_identical(tmp_path: Path) -> None:
    model = build(random_params())
    fingerprint = checkpoint.save(tmp_path / "a", model, recipe={"name": "by hand"})
    restored, tokenizer = checkpoint.restore(tmp_path / "a")
    assert tokenizer is None
    assert_same_bits(pure_params(model), pure_params(restored))
    ids = jnp.arange(24).reshape(2, 12)
    assert np.asarray(model(ids)).tobytes() == np.asarray(restored(ids)).tobytes()
    manifest = checkpoint.read_manifest(tmp_path / "a")
    assert manifest.fingerprint == fingerprint
    assert manifest.recipe == {"name": "by hand"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
