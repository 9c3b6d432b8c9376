"""Make the figures of lm-eval's own Hugging Face class on local rows, for `test_harness_golden.py`.

Two steps in two environments, as PyTorch is no dependency of this library:

    python tests/evaluation/make_harness_golden.py export DIR                     (quikjax: the demo model in float32, as
    published) python tests/evaluation/make_harness_golden.py measure DIR ROWS LIMIT OUT     (torch, transformers, lm-eval[hf])

ROWS is a directory with `piqa_validation.jsonl`, `arc_easy_test.jsonl` and `lambada_openai_test.jsonl`; the first LIMIT rows of
each are measured, under the prompts and metrics of lm-eval's tasks of these names. The rows in `tests/evaluation/rows` are of our
own making.
"""

import json
import sys
from pathlib import Path
from typing import Any

TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "piqa": (
        "piqa_validation.jsonl",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{goal}}\nAnswer:",
            "doc_to_target": "label",
            "doc_to_choice": "{{[sol1, sol2]}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "arc_easy": (
        "arc_easy_test.jsonl",
        {
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
            "doc_to_choice": "{{choices.text}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "lambada": (
        "lambada_openai_test.jsonl",
        {
            "output_type": "loglikelihood",
            "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
            "doc_to_target": "{{' '+text.split(' ')[-1]}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        },
    ),
}


def export(directory: Path) -> None:
    """Write the demo model as a Hugging Face directory."""
    import numpy as np
    from safetensors.numpy import save_file

    import quikjax
    from quikjax.models.registry import dotted, pure_params

    model, tokenizer = quikjax.load("smollm2-135m")
    directory.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.published or "{}") | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: np.asarray(leaf) for name, leaf in dotted(pure_params(model)).items()}, directory / "model.safetensors")
    assert tokenizer is not None  # the demo model has one
    tokenizer.save_pretrained(str(directory))


def measure(directory: Path, rows: Path, limit: int, out: Path) -> None:
    """Run lm-eval's own class over the rows and write its figures."""
    from datasets import Dataset
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    def task(name: str, file: str, config: dict[str, Any]) -> dict[str, Any]:
        kept = [json.loads(line) for line in (rows / file).read_text().splitlines()[:limit]]
        return {"task": name, "custom_dataset": lambda **_: {"test": Dataset.from_list(kept)}, "test_split": "test", **config}

    found = simple_evaluate(
        model=HFLM(pretrained=str(directory), dtype="float32", device="cpu", batch_size=8),
        tasks=[task(name, file, config) for name, (file, config) in TASKS.items()],
        task_manager=TaskManager(include_defaults=False),
        bootstrap_iters=0,
    )
    figures = {
        name: {
            key.split(",")[0]: value
            for key, value in found["results"][name].items()
            if key.endswith(",none") and "stderr" not in key
        }
        for name in TASKS
    }
    answers = {
        name: [[float(answer[0]) for answer in row["filtered_resps"]] for row in found["samples"][name]]
        for name in TASKS
        if name != "lambada"
    }
    answers["lambada"] = [[float(row["filtered_resps"][0][0])] for row in found["samples"]["lambada"]]
    out.write_text(json.dumps({"rows": limit, "figures": figures, "loglikelihoods": answers}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "export":
        export(Path(sys.argv[2]))
    else:
        measure(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
