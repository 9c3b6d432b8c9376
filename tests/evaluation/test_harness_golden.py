"""The demo model's tasks against lm-eval's own Hugging Face class on the same rows, made by `make_harness_golden.py`."""

import json
from pathlib import Path

import pytest

import quikjax
from quikjax.evaluation.local_tasks import LOCAL_TASKS, find_rows
from quikjax.evaluation.scoring import Scorer
from quikjax.evaluation.tasks import find_tasks, run_tasks

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: tasks)")

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "golden" / "harness.json").read_text())


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    model, tokenizer = quikjax.load("smollm2-135m")
    return Scorer(model, tokenizer)


@pytest.mark.slow
def test_accuracies_are_equal_and_log_likelihoods_close(scorer: Scorer) -> None:
    tasks = find_tasks(list(GOLDEN["figures"]), HERE / "rows")
    found = {(score.task, score.metric): score.value for score in run_tasks(scorer, tasks)}
    for task, figures in GOLDEN["figures"].items():
        for metric, value in figures.items():
            assert found[task, metric] == pytest.approx(value, rel=1e-3 if metric == "perplexity" else 1e-9)
    rows = find_rows("piqa", HERE / "rows")
    assert rows is not None
    pairs = [(f"Question: {row['goal']}\nAnswer:", f" {row[choice]}") for row in rows.rows for choice in ("sol1", "sol2")]
    expected = [log for answers in GOLDEN["loglikelihoods"]["piqa"] for log in answers]
    for (log, _), right in zip(scorer.loglikelihoods(pairs), expected, strict=True):
        assert log == pytest.approx(right, rel=1e-4)


def test_the_golden_figures_are_of_the_rows_that_are_here() -> None:
    for task, answers in GOLDEN["loglikelihoods"].items():
        rows = find_rows(task, HERE / "rows")
        assert rows is not None
        assert len(rows.rows) == len(answers)
        assert set(GOLDEN["figures"][task]) == {metric["metric"] for metric in LOCAL_TASKS[task].config["metric_list"]}
