"""Figures are against the model that an artifact was made from, or it is said that they are not."""

from pathlib import Path

import pytest

from quikjax.checkpoint import save
from quikjax.errors import QuikError
from quikjax.evaluation.original import check_original, check_tokenizers, is_artifact
from quikjax.loading import open_source
from quikjax.testing import tiny_model, tiny_tokenizer, write_tiny_checkpoint


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> dict[str, Path]:
    """The original and another model, and artifacts: two of the original, one of the other, one of no known source."""
    directory = tmp_path_factory.mktemp("originals")
    other = write_tiny_checkpoint(directory / "other", seed=1)
    places = {"original": tiny_checkpoint, "other": other}
    for name, source in (("first", tiny_checkpoint), ("second", tiny_checkpoint), ("others", other), ("unknown", None)):
        places[name] = directory / name
        known = {} if source is None else {"source": open_source(source).fingerprint()}
        save(directory / name, tiny_model(), provenance=known)
    return places


@pytest.mark.parametrize("against", ["original", "second", "first"])
def test_an_artifact_and_what_shares_its_source(places: dict[str, Path], against: str) -> None:
    assert is_artifact(places["first"])
    assert not is_artifact(places["original"])
    assert check_original(places["first"], places[against]) is None
    assert check_original(places["original"], places["other"]) is None


@pytest.mark.parametrize(
    ("model", "against", "message"),
    [
        ("first", "other", "was made from a model with fingerprint .*, and .*other is "),
        ("first", "others", "and .*others was made from"),
        ("unknown", "original", "does not say which model it was made from"),
    ],
)
def test_anything_else_is_an_error_or_said(places: dict[str, Path], model: str, against: str, message: str) -> None:
    with pytest.raises(QuikError, match=f"{message}.*--any-original"):
        check_original(places[model], places[against])
    said = check_original(places[model], places[against], allow_other=True)
    assert said is not None
    assert "fingerprint" in said or "does not say" in said


def test_models_that_read_a_text_as_other_tokens() -> None:
    tokenizer = tiny_tokenizer()
    check_tokenizers(tokenizer, tokenizer, "text", "a", "b")
    check_tokenizers(tokenizer, None, "text", "a", "b")
    with pytest.raises(QuikError, match="b reads this text as other tokens than a"):
        check_tokenizers(tokenizer, lambda text, **_: {"input_ids": [1, 2]}, "text", "a", "b")
