"""all-MiniLM-L6-v2 from its wheel, the one real encoder that is on every machine that ran `make test`."""

import importlib.util

import numpy as np
import pytest

import quikjax
from quikjax.loading.locate import DEMO_MODELS
from quikjax.models.bert import BertModel

NAME = "all-minilm-l6-v2"
TEXTS = ["The cat sits on the mat.", "A kitten is lying on a rug.", "Stock markets fell sharply on Monday."]
TEXTS += ["Shares dropped at the start of the week.", "How do I reset my password?"]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec(DEMO_MODELS[NAME].package) is None, reason=f"not installed: {DEMO_MODELS[NAME].command}"
)


def test_embeddings_are_those_of_pytorch() -> None:
    """Cosines that transformers' PyTorch model gives, mean over the tokens; its embeddings were equal to 2e-7."""
    model, tokenizer = quikjax.load(NAME)
    assert isinstance(model, BertModel)
    assert (model.config.layers, model.config.hidden_size, model.config.context_length) == (6, 384, 512)
    vectors, work = quikjax.embed(model, tokenizer, TEXTS)
    assert vectors.shape == (5, 384)
    assert work.buckets == (16,)
    cosines = vectors @ vectors.T
    np.testing.assert_allclose(cosines[[0, 2, 0, 1], [1, 3, 2, 4]], [0.5587, 0.5890, 0.027, 0.021], atol=6e-4)
