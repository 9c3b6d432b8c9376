"""Tasks over local rows through the harness: its accuracies against counting by hand, and what is wrong with rows."""

import json
import logging
import math
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quikjax.errors import QuikError
from quikjax.evaluation.scoring import Scorer
from quikjax.evaluation.tasks import find_tasks, harness_model, run_tasks, undisturbed
from quikjax.testing import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra: tasks)")

PIQA: list[dict[str, Any]] = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
    {"goal": "dry hands", "sol1": "use water, a lot of it", "sol2": "use a towel", "label": 1},
    {"goal": "read", "sol1": "a", "sol2": "with both eyes open", "label": 1},
]
ARC: list[dict[str, Any]] = [
    {"question": "Which?", "choices": {"text": ["this", "that", "those"], "label": ["A", "B", "C"]}, "answerKey": "B"},
    {"question": "How?", "choices": {"text": ["so", "not"], "label": ["1", "2"]}, "answerKey": "1"},
]
LAMBADA = [{"text": "the cat sat on the mat"}, {"text": "one two three four"}]
RTE = {"sentence_1": "It rains.", "sentence_2": "It is wet.", "label": "entailment"}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks")
    for name, rows in (("piqa_validation", PIQA), ("arc_easy_test", ARC), ("lambada_openai_test", LAMBADA), ("rte_dev", [RTE])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "rte_train.jsonl").write_text(json.dumps({**RTE, "label": "not_entailment"}) + "\n")
    (path / "sst2_dev.tsv").write_text('sentence\tlabel\na "good" film \t1\nbad \t0\n')
    return path


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(tiny_model(num_hidden_layers=1), tiny_tokenizer())


def test_figures_are_those_counted_by_hand(directory: Path, scorer: Scorer) -> None:
    tasks = find_tasks(["piqa", "arc_easy", "lambada", "sst2", "rte"], directory)
    found = {(score.task, score.metric): score for score in run_tasks(scorer, tasks)}

    def best(context: str, choices: list[str], *, by_bytes: bool = False) -> int:
        scores = [scorer.loglikelihoods([(context, " " + choice)])[0][0] for choice in choices]
        return int(np.argmax([score / (len(choice) if by_bytes else 1) for score, choice in zip(scores, choices, strict=True)]))

    for metric, by_bytes in (("acc", False), ("acc_norm", True)):
        chosen = [best(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], by_bytes=by_bytes) for row in PIQA]
        right = [choice == row["label"] for choice, row in zip(chosen, PIQA, strict=True)]
        score = found["piqa", metric]
        assert score.value == pytest.approx(np.mean(right))
        assert score.stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(3))
        assert (score.rows, score.fewshot, score.data) == (3, 0, "piqa_validation.jsonl")
        chosen = [best(f"Question: {row['question']}\nAnswer:", row["choices"]["text"], by_bytes=by_bytes) for row in ARC]
        assert found["arc_easy", metric].value == pytest.approx(np.mean([chosen[0] == 1, chosen[1] == 0]))
    logs = scorer.loglikelihoods([("the cat sat on the", " mat"), ("one two three", " four")])
    assert found["lambada", "acc"].value == pytest.approx(np.mean([greedy for _, greedy in logs]))
    assert found["lambada", "perplexity"].value == pytest.approx(np.exp(-np.mean([log for log, _ in logs])), rel=1e-4)
    sentiment = [
        best(f"{text}\nQuestion: Is this sentence positive or negative?\nAnswer:", ["negative", "positive"])
        for text in ('a "good" film ', "bad ")
    ]
    assert found["sst2", "acc"].value == pytest.approx(np.mean([sentiment[0] == 1, sentiment[1] == 0]))
    entails = best("It rains.\nQuestion: It is wet. True or False?\nAnswer:", ["True", "False"]) == 0
    assert found["rte", "acc"].value == entails


def test_examples_come_from_the_training_rows_and_rows_can_be_limited(directory: Path, scorer: Scorer) -> None:
    seen: list[Any] = []

    class Watched(Scorer):
        def loglikelihoods(self, pairs: Any) -> list[tuple[float, bool]]:
            seen.extend(pairs)
            return [(0.0, False)] * len(pairs)

    watched = Watched(scorer.model, scorer.tokenizer)
    scores = run_tasks(watched, find_tasks(["rte"], directory), fewshot=1, limit=1)
    assert (scores[0].rows, scores[0].fewshot) == (1, 1)
    question = "It rains.\nQuestion: It is wet. True or False?\nAnswer:"
    assert seen[0][0] == f"{question} False\n\n{question}"


def test_the_callers_random_numbers_logs_and_surroundings_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    before = random.getstate(), str(np.random.get_state()), logging.getLogger("lm_eval").level
    with undisturbed():
        random.seed(0)
        np.random.seed(0)
        assert os.environ["DISABLE_MULTIPROC"] == "1"
    assert (random.getstate(), str(np.random.get_state()), logging.getLogger("lm_eval").level) == before
    assert "DISABLE_MULTIPROC" not in os.environ


def test_the_harness_model_is_one_of_the_harness(scorer: Scorer) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM

    model = harness_model(scorer)
    assert isinstance(model, LM)
    rolling = Instance("loglikelihood_rolling", {}, ("some text",), 0)
    assert model.loglikelihood_rolling([rolling]) == scorer.rolling_loglikelihoods(["some text"])
    until = Instance("generate_until", {}, ("some text", {"max_gen_toks": 2}), 0)
    assert model.generate_until([until]) == scorer.continuations([("some text", {"max_gen_toks": 2})])


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "piqa",
            '{"goal": "a", "sol1": "b", "label": 0}',
            "line 1 of .*piqa_test.jsonl lacks sol2; a row needs goal, sol1, sol2",
        ),
        ("piqa", '{"goal": "a", "sol1": "b", "sol2": "c", "label": 2}', "line 1 of .*: label is 2, not one of 0, 1"),
        ("piqa", "{}\n", "lacks goal"),
        ("piqa", "no json", "line 1 of .* is not JSON"),
        ("piqa", "[1]", "is not a JSON object"),
        ("piqa", "\n", "has no rows"),
        ("arc_easy", '{"question": "a", "choices": ["b"], "answerKey": "A"}', "choices is not"),
        ("arc_easy", '{"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "C"}', "is none of its choices"),
        ("lambada", '{"text": "word"}', "has no last word to predict"),
        ("rte", '{"sentence_1": "a", "sentence_2": "b", "label": "yes"}', "label is 'yes', not one of 'entailment'"),
    ],
)
def test_wrong_rows_are_found_before_any_work(tmp_path: Path, name: str, rows: str, message: str) -> None:
    (tmp_path / f"{name}_test.jsonl").write_text(rows)
    with pytest.raises(QuikError, match=message):
        find_tasks([name], tmp_path)


def test_tasks_that_do_not_exist(tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Manager:
        def __init__(self, **_: Any) -> None:
            self.all_tasks = ["hellaswag", "arc_challenge"]

    # The harness's own index takes half a minute to read.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Manager)
    with pytest.raises(QuikError, match='there is no task "helaswag"; did you mean "hellaswag"'):
        find_tasks(["helaswag"])
    with pytest.raises(QuikError, match=r'there is no task "piqua" with rows in .*; did you mean "piqa"'):
        find_tasks(["piqua"], directory)
    with pytest.raises(QuikError, match=r"its rows go in a file piqa_test\.jsonl"):
        find_tasks(["piqa"], tmp_path)
    with pytest.raises(QuikError, match="there is no directory"):
        find_tasks(["piqa"], tmp_path / "absent")
    with pytest.raises(QuikError, match="no task is named"):
        find_tasks([])
    assert find_tasks(["hellaswag"]).registered == ("hellaswag",)


def test_numbers_out_of_range_and_a_missing_package(directory: Path, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = find_tasks(["piqa"], directory)
    with pytest.raises(QuikError, match="limit must be at least 1"):
        run_tasks(scorer, tasks, limit=0)
    with pytest.raises(QuikError, match="cannot be negative"):
        run_tasks(scorer, tasks, fewshot=-1)
    with pytest.raises(QuikError, match="no chat template"):
        run_tasks(scorer, tasks, chat=True)
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.evaluator", None)
    with pytest.raises(QuikError, match=r"pip install 'quikjax\[tasks\]'"):
        find_tasks(["piqa"], directory)
