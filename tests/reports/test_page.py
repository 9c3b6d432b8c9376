"""The page of an artifact: well-formed, complete, asking nothing of any server, and refused early where it cannot be written."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from flax import nnx
from typer.testing import CliRunner

from quikjax.checkpoint import Reader, read_manifest, save
from quikjax.cli.report import report
from quikjax.errors import QuikError
from quikjax.evaluation import evaluate
from quikjax.evaluation.layers import errors_by_depth
from quikjax.loading import open_source
from quikjax.models.registry import pure_params
from quikjax.quantizing.params import quantize_params
from quikjax.quantizing.recipe import find_recipe
from quikjax.reports.codes import codes_use
from quikjax.reports.evaluations import EvaluationRecord, add_evaluation, check_writable
from quikjax.reports.page import check_page, json_beside, read_page, render
from quikjax.reports.reproduce import reproduction
from quikjax.testing import tiny_model, tiny_tokenizer
from quikjax.texts import calibration_text, tokenize, tokens_fingerprint
from quikjax.weights.quik import QuikWeight

VOID = {"meta", "link", "br"}


class Checked(HTMLParser):
    """Collects the page's parts and holds it to closing what it opens."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.buttons = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {str(found["id"])} if "id" in found else set()
        self.links += [str(found[name]) for name in ("href", "src", "action") if name in found]
        self.buttons += tag == "button"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A data-free artifact that says it was calibrated on pydoc, with an evaluation on record."""
    path = tmp_path_factory.mktemp("page") / "rtn <b>"
    original = tiny_model(num_hidden_layers=2)
    rows: list[dict[str, Any]] = []
    packed = quantize_params(pure_params(original), "rtn-w4a4", on_layer=lambda layer: rows.append(layer.as_json()))
    quantized = nnx.merge(nnx.split(original)[0], packed)
    tokens = tokenize(tiny_tokenizer(), calibration_text("pydoc").content)[: 4 * 64].reshape(4, 64)
    save(
        path,
        quantized,
        config=json.loads(original.published or "{}"),
        tokenizer=tiny_tokenizer(),
        recipe=find_recipe("rtn-w4a4").model_dump(mode="json"),
        provenance={
            "source": open_source(tiny_checkpoint).fingerprint(),
            "tokens": {"sha256": tokens_fingerprint(tokens), "shape": [4, 64]},
            "dtype": "float32",
        },
        report=rows,
    )
    ids = tokens[:2, :32]
    figures = evaluate(quantized, ids, original).as_json() | {"by_layer": errors_by_depth(quantized, original, ids).as_json()}
    del figures["seconds"], figures["tokens_per_second"]
    protocol = {
        "text": "<i>text",
        "window": 32,
        "windows": 2,
        "stride": 32,
        "bos": "none",
        "against": "a&b",
        "own_original": True,
    }
    fingerprint = read_manifest(path).fingerprint
    record = EvaluationRecord(
        fingerprint=fingerprint, kind="perplexity", protocol=protocol, result=figures, command="quikjax eval"
    )
    add_evaluation(path, record)
    score = {"task": "piqa", "metric": "acc", "value": 0.5, "stderr": None, "rows": 2, "fewshot": 0, "data": "piqa.jsonl"}
    tasks = {"tasks": ["piqa"], "fewshot": None, "limit": 2, "chat": False}
    add_evaluation(
        path,
        EvaluationRecord(
            fingerprint=fingerprint, kind="tasks", protocol=tasks, result={"scores": [score]}, command="quikjax eval"
        ),
    )
    return path


def test_the_page_holds_everything_and_asks_for_nothing(artifact: Path) -> None:
    page = read_page(artifact)
    text = render(page)
    checked = Checked(text)
    assert {link for link in checked.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in checked.links if link.startswith("#")} <= checked.ids
    assert "http://" not in text
    assert "https://" not in text
    assert "<b>" not in text.replace('<div class="card"><b>', "")
    assert "&lt;i&gt;text" in text
    assert checked.buttons > 30
    for row in page.report.rows:
        assert str(row["path"]).removesuffix(".weight") in text
    for shown in (page.report.fingerprint, "W4A4", "piqa", "teacher-forced", "no rule of the recipe matches", "entropy"):
        assert shown in text
    figures = json.loads(json.dumps(page.as_json(), allow_nan=False))
    assert len(figures["layers"]) == 14
    assert figures["evaluations"][0]["result"]["kl"] > 0


def test_without_evaluations_the_page_says_how_to_add_them(artifact: Path) -> None:
    page = read_page(artifact)._replace(evaluations=[])
    text = render(page)
    assert "None is on record." in text
    assert "--by-layer --save</code> measures them" in text


def test_the_use_of_codes_is_counted(artifact: Path) -> None:
    reader = Reader(artifact)
    uses, outliers = codes_use(reader)
    codes = [
        np.asarray(leaf.qweight, np.int8).reshape(-1)
        for name in reader.parts
        for path, leaf in reader.read_part(name).items()
        if isinstance(leaf, QuikWeight) and path.endswith("up_proj.weight")
    ]
    joined = np.concatenate(codes)
    (use,) = [use for use in uses if use.pattern == "model.layers.*.mlp.up_proj.weight"]
    assert use.counts == tuple(int((joined == code).sum()) for code in range(-8, 8))
    assert use.at_the_ends == pytest.approx((np.abs(joined) >= 7).mean())
    shares = np.bincount(joined + 8, minlength=16) / joined.size
    assert use.entropy == pytest.approx(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
    assert set(map(len, outliers.values())) == {0}


def test_the_command_that_makes_it_again_is_checked_against_fingerprints(artifact: Path, tmp_path: Path) -> None:
    reader = Reader(artifact)
    found = reproduction(reader)
    assert found is not None
    assert found.command == (
        "quikjax quantize MODEL --out DIR --recipe rtn-w4a4 --calibration pydoc --samples 4 --seqlen 64 --dtype float32"
    )
    assert found.open == (f"MODEL is the checkpoint with fingerprint {reader.manifest.provenance['source']}.",)
    recipe = find_recipe("rtn-w4a4").model_dump(mode="json") | {"name": "mine"}
    known = {"source": "0", "tokens": {"sha256": "1", "shape": [4, 64]}}
    save(tmp_path / "other", tiny_model(num_hidden_layers=1), recipe=recipe, provenance=known)
    other = reproduction(Reader(tmp_path / "other"))
    assert other is not None
    assert "--recipe RECIPE.json --calibration TEXT" in other.command
    assert len(other.open) == 3
    save(tmp_path / "none", tiny_model(num_hidden_layers=1))
    assert reproduction(Reader(tmp_path / "none")) is None


def test_the_command_writes_page_and_json(artifact: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(artifact), "--html", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "page.json").read_text())["fingerprint"] == read_manifest(artifact).fingerprint


def test_a_place_that_cannot_be_written_is_said_before_anything_is_read(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    done = CliRunner().invoke(app, [str(tmp_path / "no artifact"), "--html", str(tmp_path / "absent" / "page.html")])
    assert isinstance(done.exception, QuikError)
    assert "there is no directory" in str(done.exception)
    with pytest.raises(QuikError, match="it is a directory; name a file"):
        check_writable(tmp_path)
    with pytest.raises(QuikError, match="give the page another ending"):
        check_page(tmp_path / "page.json")
    assert json_beside("a/page.html") == Path("a/page.json")
    (tmp_path / "page.json").mkdir()
    with pytest.raises(QuikError, match="is a directory"):
        check_page(tmp_path / "page.html")
