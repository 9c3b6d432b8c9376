"""Files that are not an artifact's own, and outputs that are there already: empty directories, mount points, files in the way."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_artifacts import SMALL, build, random_params, read_directory, tiny_tokenizer

from quikjax import checkpoint
from quikjax.checkpoint import atomic, output
from quikjax.checkpoint.export.dequantized import export_safetensors
from quikjax.errors import QuikError
from quikjax.reports.artifact import read_report
from quikjax.reports.sizes import size_of_artifact

STRANGERS = (
    ".DS_Store",
    "README.md",
    ".gitattributes",
    ".git/HEAD",
    ".cache/huggingface/download/x.lock",
    "arrays/.DS_Store",
    "arrays/rest/.DS_Store",
    "arrays/rest/model.norm.weight/._0",
    "arrays/other/x",
    "tokenizer/._tokenizer.json",
    "notes.txt",
    "log.jsonl",
)


def small_model(seed: int = 0) -> Any:
    return build(random_params(seed, config=SMALL), SMALL)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "a"
    checkpoint.save(path, small_model(), tokenizer=tiny_tokenizer(), report=[])
    return path


@pytest.fixture
def visited(original: Path, tmp_path: Path) -> Path:
    """An artifact that file managers, git and the hub have been in."""
    shutil.copytree(original, tmp_path / "a")
    for name in STRANGERS:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"\x00stranger\xff")
    return tmp_path / "a"


def test_strangers_are_no_damage(visited: Path, original: Path, tmp_path: Path) -> None:
    model, tokenizer = checkpoint.restore(visited)
    assert tokenizer("hello world")["input_ids"] == [1, 2]
    assert model.config.vocab_size == SMALL["vocab_size"]
    assert size_of_artifact(visited) == checkpoint.sizes(visited).disk_bytes == size_of_artifact(original)
    assert read_report(visited).fingerprint == read_report(original).fingerprint
    export_safetensors(visited, tmp_path / "hf")


def test_a_strangers_tokenizer_file_changes_no_token(visited: Path) -> None:
    """transformers would read it if it lay beside the tokenizer's own files."""
    (visited / "tokenizer" / "added_tokens.json").write_text('{"hello world": 9}')
    (visited / "tokenizer" / "special_tokens_map.json").write_text('{"bos_token": "world"}')
    assert checkpoint.restore(visited)[1]("hello world")["input_ids"] == [1, 2]


def test_damage_is_found_among_strangers(visited: Path) -> None:
    for path in ("tokenizer/tokenizer.json", "arrays/rest/model.norm.weight/0", "arrays/rest.json"):
        before = (visited / path).read_bytes()
        (visited / path).write_bytes(before[:-2] + b"!!")
        with pytest.raises(QuikError, match=path):
            checkpoint.restore(visited)
        (visited / path).unlink()
        with pytest.raises(QuikError, match=f"{path} is missing"):
            checkpoint.restore(visited)
        (visited / path).write_bytes(before)
    (visited / "arrays/rest/model.norm.weight/0").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(QuikError, match=r"model\.norm\.weight/0 is a git-lfs pointer"):
        checkpoint.restore(visited)


def test_strangers_stay_when_an_artifact_is_replaced(visited: Path) -> None:
    two = checkpoint.save(visited, small_model(1), force=True)
    assert checkpoint.read_manifest(visited).fingerprint == two
    assert {name for name in STRANGERS if (visited / name).exists()} == {
        name for name in STRANGERS if name.split("/")[0] not in ("arrays", "tokenizer", "log.jsonl")
    }
    assert [path.name for path in visited.parent.iterdir()] == ["a"]


@pytest.mark.parametrize("inside", [(), ("lost+found",), (".git", "README.md", ".gitattributes")])
def test_an_empty_directory_is_written_into(original: Path, tmp_path: Path, inside: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in inside:
        (out / name).write_text("")
    place = out.stat().st_ino
    checkpoint.save(out, small_model(), tokenizer=tiny_tokenizer(), report=[])
    assert out.stat().st_ino == place  # the directory itself may be a mount point
    found = read_directory(out)
    assert {name: found[name] for name in found if name not in inside} == read_directory(original)
    assert set(inside) <= set(found)
    assert os.listdir(tmp_path) == ["out"]
    checkpoint.restore(out)
    with pytest.raises(QuikError, match="exists; choose another directory"):
        checkpoint.save(out, small_model())


def test_an_unfinished_artifact_in_an_empty_directory_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    params = random_params(config=SMALL)
    parts = checkpoint.split_parts(params, ("model", "layers"))
    with checkpoint.Writer(out, config=SMALL, resume=True) as writer:
        writer.write_part("rest", parts["rest"])
    assert os.listdir(out) == ["quikjax.partial"]
    with pytest.raises(QuikError, match=r"has no quikjax\.json"):
        checkpoint.restore(out)
    with checkpoint.Writer(out, config=SMALL, resume=True) as writer:
        assert list(writer.completed_parts()) == ["rest"]
        writer.write_part("model.layers.0", parts["model.layers.0"])
        writer.finish()
    checkpoint.restore(out)


@pytest.mark.parametrize("force", [False, True])
def test_killed_while_moving_up_the_next_run_ends_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if force:
        checkpoint.save(out, small_model(5), tokenizer=tiny_tokenizer())
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == out)
    whole = checkpoint.save(tmp_path / "whole", small_model(), report=[])
    move = shutil.move
    moves = 0

    def killed(source: Any, target: Any) -> Any:
        nonlocal moves
        moves += 1
        if moves > 1:
            raise KeyboardInterrupt
        return move(source, target)

    monkeypatch.setattr(shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(out, small_model(), report=[], force=force)
    with pytest.raises(QuikError, match=r"has no quikjax\.json"):
        checkpoint.restore(out)
    monkeypatch.setattr(shutil, "move", move)
    with pytest.raises(QuikError, match="exists"):
        output.refuse_existing(out, force=False)
    assert checkpoint.read_manifest(out).fingerprint == whole
    assert read_directory(out) == read_directory(tmp_path / "whole")


def test_a_mount_point_that_looks_like_a_directory_is_replaced_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bind mount: the system refuses to rename it when that is tried, not before."""
    out = tmp_path / "out"
    checkpoint.save(out, small_model(1), tokenizer=tiny_tokenizer())
    (out / "README.md").write_text("mine")

    def refuse(one: Path, other: Path) -> bool:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(atomic, "_exchange", refuse)
    two = checkpoint.save(out, small_model(2), force=True)
    assert checkpoint.read_manifest(out).fingerprint == two
    assert sorted(os.listdir(out)) == ["README.md", "arrays", "quikjax.json"]
    checkpoint.restore(out)
    assert os.listdir(tmp_path) == ["out"]


def test_a_file_in_the_way_is_one_sentence(original: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out, words in (("file", "is a file"), ("file/out", "file is a file, so"), ("file/deep/out", "file is a file, so")):
        with pytest.raises(QuikError, match=words):
            checkpoint.save(tmp_path / out, small_model())
        with pytest.raises(QuikError, match="is a file, so" if "/" in out else "exists"):
            export_safetensors(original, tmp_path / out)
    for kind in ("partial", "work"):
        (tmp_path / f"out.{kind}").write_text("mine")
        with pytest.raises(QuikError, match=rf"out\.{kind} is needed as a directory"):
            checkpoint.save(tmp_path / "out", small_model())
        (tmp_path / f"out.{kind}").unlink()
    (tmp_path / "out.exporting").write_text("mine")
    with pytest.raises(QuikError, match=r"out\.exporting is needed as a directory"):
        export_safetensors(original, tmp_path / "out")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_fills_an_empty_directory(original: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".gitattributes").write_text("mine")
    export_safetensors(original, tmp_path / "out")
    export_safetensors(original, tmp_path / "new")
    assert read_directory(tmp_path / "out") == read_directory(tmp_path / "new") | {".gitattributes": b"mine"}
    assert sorted(os.listdir(tmp_path)) == ["new", "out"]


def test_home_is_expanded_wherever_a_path_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quikjax.checkpoint.load import load
    from quikjax.cli.generation_options import DrawingOptions
    from quikjax.executables import VARIABLE, cache_directory
    from quikjax.loading import open_source
    from quikjax.planning.plan import describe
    from quikjax.quantizing.checkpoint import quantize_checkpoint
    from quikjax.quantizing.recipe import RECIPES, find_recipe
    from quikjax.reports.evaluations import evaluations_file
    from quikjax.reports.page import check_page, read_page, write_page
    from quikjax.study.results import check_directory
    from quikjax.testing import write_tiny_checkpoint
    from quikjax.texts import evaluation_text

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some text")
    (tmp_path / "mine.json").write_text(RECIPES["fp"].model_dump_json())
    write_tiny_checkpoint("~/model", num_hidden_layers=1)
    assert open_source("~/model").names() == open_source(Path("~/model")).names()
    assert describe("~/model/config.json").config["num_hidden_layers"] == 1
    assert evaluation_text("~/text.txt").content == "some text"
    assert find_recipe("~/mine.json") == find_recipe(Path("~/mine.json")) == RECIPES["fp"]
    quantize_checkpoint("~/model", "~/made", "~/mine.json")
    checkpoint.save("~/saved", checkpoint.restore("~/made")[0])
    export_safetensors("~/saved", "~/hf")
    assert load("~/made")[0].config == load("~/hf")[0].config
    assert size_of_artifact("~/saved") == checkpoint.sizes(Path("~/saved")).disk_bytes
    assert checkpoint.read_manifest("~/saved").fingerprint == read_report("~/saved").fingerprint
    assert checkpoint.restore_params("~/saved")
    check_page("~/page.html")
    write_page(read_page("~/saved"), "~/page.html")
    assert (tmp_path / "page.html").is_file()
    assert evaluations_file("~/saved") == tmp_path / "saved.evaluations.jsonl"
    assert cache_directory("~/kept") == tmp_path / "kept"
    # A command that another test ran here may have named a folder.
    monkeypatch.setattr("quikjax.executables._named", None)
    monkeypatch.setenv(VARIABLE, "~/kept too")
    assert cache_directory() == tmp_path / "kept too"
    check_directory("~/study")
    assert (tmp_path / "study").is_dir()
    assert DrawingOptions(template=Path("~/text.txt")).chat_template() == "some text"
    assert not (tmp_path / "~").exists()
