"""Labelled texts are read as they stand, refused with the line where they do not, and batched so that none is lost."""

from pathlib import Path

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.testing import tiny_tokenizer
from quikjax.training.examples import (
    Examples,
    bucket,
    class_names,
    in_order,
    numbers_of,
    padded,
    plan_batches,
    read_labelled,
    tokenized,
)


def test_files_of_every_kind(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("sentence\tlabel\r\nit 's \"good \t1\r\nbad\t0\r\n")
    assert read_labelled(tmp_path / "a.tsv") == ([("it 's \"good",), ("bad",)], ["1", "0"])
    (tmp_path / "a.csv").write_text('idx,premise,hypothesis,label\n0,"a, b",c,yes\n')
    assert read_labelled(tmp_path / "a.csv") == ([("a, b", "c")], ["yes"])
    (tmp_path / "a.jsonl").write_text('{"text": "x", "label": 1}\n\n{"text": "y", "label": 0}\n')
    assert read_labelled(tmp_path / "a.jsonl") == ([("x",), ("y",)], ["1", "0"])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x", r"a.txt is no .tsv, .csv or .jsonl file"),
        ("a.tsv", "", "has no rows"),
        ("a.tsv", "sentence\tlabels\nx\t1\n", "has no column 'label'; it has sentence, labels"),
        ("a.tsv", "a\tb\tc\tlabel\n1\t2\t3\t4\n", "has 3 columns beside 'label'"),
        ("a.tsv", "sentence\tlabel\nx\t1\ny\n", "line 3: 1 columns, the first line names 2"),
        ("a.tsv", "sentence\tlabel\nx\t1\n  \t0\n", "line 3: there is no sentence"),
        ("a.jsonl", '{"text": "x", "label": 1}\n[1]\n', "line 2: a JSON object is expected"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y"}\n', "line 2: there is no label"),
    ],
)
def test_damage_is_named(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(QuikError, match=said):
        read_labelled(tmp_path / name)


def test_labels_are_classes() -> None:
    assert class_names(["10", "2", "2"]) == ("2", "10")
    assert class_names(["no", "yes", "no"]) == ("no", "yes")
    assert numbers_of(["Yes", "0"], ("no", "yes"), 2, "file").tolist() == [1, 0]
    with pytest.raises(QuikError, match="file has the label '2', which the classifier does not know; its classes are 0 to 1"):
        numbers_of(["2"], (), 2, "file")


def test_every_example_comes_once_a_pass_in_batches_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 60, 40).tolist()
    plan = plan_batches(lengths, 8, 10, seed=3)
    assert sorted(np.concatenate(plan[:5]).tolist()) == list(range(40)) == sorted(np.concatenate(plan[5:]).tolist())
    assert any((a != b).any() for a, b in zip(plan[:5], plan[5:], strict=True))
    spread = np.mean([np.std([lengths[i] for i in batch]) for batch in plan])
    assert spread < np.std(lengths) / 2
    assert [bucket(n) for n in (1, 16, 17, 128, 129)] == [16, 16, 32, 128, 256]


def test_batches_are_padded_and_filled() -> None:
    found = tokenized([("ab",), ("abc",), ("a",)], np.array([0, 1, 0], np.int32), tiny_tokenizer(), 3)
    assert [len(ids) for ids in found.ids] == [2, 3, 1]
    batch = padded(found, [1, 2], 4)
    assert batch.mask.sum(1).tolist() == [3, 1, 3, 3]
    assert batch.weights.tolist() == [1, 1, 0, 0]
    assert batch.labels.tolist() == [1, 0, 1, 1]
    assert batch.types is None
    batches = list(in_order(Examples(found.ids, None, found.labels), 2))
    assert sum(batch.weights.sum() for batch in batches) == 3
