"""Existing directories, replacement, resuming, and a disk that refuses."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_writer import PARTS, part
from tiny_artifacts import SMALL, build, pack, random_params, read_directory

from quikjax import checkpoint
from quikjax.checkpoint import atomic
from quikjax.errors import QuikError


def small_model(seed: int = 0) -> Any:
    return build(random_params(seed, config=SMALL), SMALL)


def test_an_existing_artifact_is_replaced_only_with_force(tmp_path: Path) -> None:
    one = checkpoint.save(tmp_path / "a", small_model(0))
    with pytest.raises(QuikError, match="a exists; choose another directory, or replace it with force"):
        checkpoint.save(tmp_path / "a", small_model(1))
    assert checkpoint.read_manifest(tmp_path / "a").fingerprint == one
    two = checkpoint.save(tmp_path / "a", small_model(1), force=True)
    assert checkpoint.read_manifest(tmp_path / "a").fingerprint == two != one
    assert os.listdir(tmp_path) == ["a"]
    # A damaged artifact is still ours to replace.
    (tmp_path / "a/quikjax.json").write_text("{")
    checkpoint.save(tmp_path / "a", small_model(1), force=True)
    checkpoint.restore(tmp_path / "a")


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("cat")
    (tmp_path / "file").write_text("text")
    cases = {"photos": "it holds cat.jpg and no quikjax.json", "file": "a file"}
    for name, reason in cases.items():
        with pytest.raises(QuikError, match=f"is not an artifact of quikjax .*{reason}"):
            checkpoint.save(tmp_path / name, small_model(1), force=True)
    assert (tmp_path / "photos/cat.jpg").read_text() == "cat"
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial/mine").write_text("mine")
    with pytest.raises(QuikError, match=r"new\.partial is needed to write .*new but holds mine"):
        checkpoint.save(tmp_path / "new", small_model())
    assert (tmp_path / "new.partial/mine").read_text() == "mine"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere two renames stand in for the exchange")
def test_the_exchange_is_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"from_{name}").write_text("")
    assert atomic._exchange(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["from_b"]
    assert os.listdir(tmp_path / "b") == ["from_a"]
    with pytest.raises(FileNotFoundError):
        atomic._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_replacing_without_an_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that refuses, the two renames give the same end, and a kill between them is undone."""
    checkpoint.save(tmp_path / "a", small_model(0))
    monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    two = checkpoint.save(tmp_path / "a", small_model(1), force=True)
    assert checkpoint.read_manifest(tmp_path / "a").fingerprint == two
    assert os.listdir(tmp_path) == ["a"]
    os.rename(tmp_path / "a", tmp_path / "a.previous")  # as a kill between the renames leaves it
    with pytest.raises(QuikError, match=r'there is no directory .*a; did you mean "a\.previous"|known: a\.previous'):
        checkpoint.restore(tmp_path / "a")
    with pytest.raises(QuikError, match="exists"):
        checkpoint.save(tmp_path / "a", small_model(0))
    assert checkpoint.read_manifest(tmp_path / "a").fingerprint == two


def test_a_link_is_followed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "real", small_model(0))
    (tmp_path / "link").symlink_to("real")
    two = checkpoint.save(tmp_path / "link", small_model(1), force=True)
    assert (tmp_path / "link").is_symlink()
    assert checkpoint.read_manifest(tmp_path / "real").fingerprint == two
    checkpoint.restore(tmp_path / "link")


def unfinished(path: Path, parts: list[str], **inputs: Any) -> None:
    """What a resumable run leaves that came to an end after these parts."""
    with checkpoint.Writer(path, resume=True, **inputs) as writer:
        for name in parts:
            writer.write_part(name, part(name))


def test_finished_parts_are_kept_and_the_end_is_the_same(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path / "at_once", recipe={"name": "r"}) as writer:
        for name in PARTS:
            writer.write_part(name, part(name))
        writer.finish()
    unfinished(tmp_path / "a", PARTS[:2], recipe={"name": "r"})
    with pytest.raises(QuikError, match=r"a\.partial is an unfinished artifact"):
        checkpoint.restore(tmp_path / "a.partial")
    arrays = tmp_path / "a.partial/arrays"
    (arrays / f"{PARTS[1]}.json").unlink()  # as if killed before that part was whole
    (arrays / "stray.tmp").write_text("")
    with checkpoint.Writer(tmp_path / "a", recipe={"name": "r"}, resume=True) as writer:
        assert set(writer.completed_parts()) == {PARTS[0]}
        assert set(writer.read_part(PARTS[0])) == set(part(PARTS[0]))
        with pytest.raises(QuikError, match=f'part "{PARTS[1]}" .* is not finished'):
            writer.read_part(PARTS[1])
        for name in PARTS[1:]:
            writer.write_part(name, part(name))
        writer.finish()
    assert read_directory(tmp_path / "a") == read_directory(tmp_path / "at_once")
    assert sorted(os.listdir(tmp_path)) == ["a", "at_once"]


def test_a_part_damaged_since_is_written_again(tmp_path: Path) -> None:
    unfinished(tmp_path / "a", PARTS[:2])
    file = tmp_path / f"a.partial/arrays/{PARTS[0]}/_METADATA"
    file.write_bytes(file.read_bytes().replace(b"t", b"u", 1))
    with checkpoint.Writer(tmp_path / "a", resume=True) as writer:
        assert set(writer.completed_parts()) == {PARTS[1]}
        assert os.listdir(tmp_path / "a.partial/arrays") != []
        assert not file.exists()


def test_other_inputs_are_refused_with_what_differs(tmp_path: Path) -> None:
    unfinished(tmp_path / "a", PARTS[:1], recipe={"name": "quik-4b", "outliers": 16}, provenance={"tokens": "x"})
    with pytest.raises(QuikError) as refused:
        checkpoint.Writer(tmp_path / "a", recipe={"name": "quik-4b", "outliers": 8}, provenance={"seed": 1}, resume=True)
    for difference in (
        "recipe.outliers: 16 before, 8 now",
        'provenance.tokens: "x" before, null now',
        "provenance.seed: null before",
    ):
        assert difference in str(refused.value)
    assert (tmp_path / f"a.partial/arrays/{PARTS[0]}.json").exists(), "a refusal loses nothing"
    with checkpoint.Writer(tmp_path / "a") as writer:  # starting again is another matter
        assert writer.completed_parts() == {}


def test_what_differs_is_said_in_one_short_sentence(tmp_path: Path) -> None:
    def recipe(damping: float, match: str) -> dict[str, Any]:
        return {"name": "mine", "rules": [{"match": match, "damping": damping, "bits": bits} for bits in (4, 8)]}

    unfinished(tmp_path / "a", PARTS[:1], recipe=recipe(0.01, "w"))
    with pytest.raises(QuikError) as refused:
        checkpoint.Writer(tmp_path / "a", recipe=recipe(0.5, "q_proj|" * 100), provenance={"seed": 1}, resume=True)
    sentence = str(refused.value)
    assert "recipe.rules[0].damping: 0.01 before, 0.5 now" in sentence
    assert 'recipe.rules[0].match: "w" before, "q_proj|' in sentence
    assert "and 1 more" in sentence
    assert "bits" not in sentence
    assert len(sentence) < 600 + len(str(tmp_path))


def test_the_same_parameter_in_two_parts_is_refused(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path / "a") as writer:
        writer.write_part("one", {"w": pack(np.random.default_rng(0), (4, 4))})
        with pytest.raises(QuikError, match='w is in part "one" already and cannot be in "two" too'):
            writer.write_part("two", {"w": np.zeros(3, np.float32)})
        writer.write_part("one", {"w": np.zeros(3, np.float32)})  # writing a part again is fine
        writer.finish()
    assert checkpoint.restore_params(tmp_path / "a")["w"].shape == (3,)


def test_two_writers_of_one_artifact(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path / "a") as first:
        first.write_part("one", {"w": np.zeros(3, np.float32)})
        with pytest.raises(QuikError, match="another process is writing"):
            checkpoint.Writer(tmp_path / "a")
        first.finish()
    assert os.listdir(tmp_path) == ["a"]


def test_a_name_taken_meanwhile_does_not_cost_the_work(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path / "a") as writer:
        writer.write_part("one", {"w": np.zeros(3, np.float32)})
        (tmp_path / "a").mkdir()
        (tmp_path / "a/mine").write_text("mine")
        with pytest.raises(QuikError, match=r"a exists and is not an artifact .* the finished artifact is in .*a\.partial"):
            writer.finish()
    assert (tmp_path / "a/mine").exists()
    assert checkpoint.restore_params(tmp_path / "a.partial")["w"].shape == (3,)


def test_too_little_room_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(QuikError, match=r"needs about 1000000000000 MB, the disk has \d+ MB left; nothing was written"):
        checkpoint.Writer(tmp_path / "a", expected_bytes=10**18)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("limit", [200, 1000, 3000])
def test_a_write_that_fails_leaves_the_old_artifact(tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond `limit`: the manifest, a part's JSON or an array's chunk is the first that does."""
    checkpoint.save(tmp_path / "a", small_model(0))
    before = read_directory(tmp_path / "a")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = small_model(1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(QuikError, match="a file became larger than the system allows"):
            checkpoint.save(tmp_path / "a", model, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read_directory(tmp_path / "a") == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_write_that_fails_leaves_finished_parts_to_a_resumable_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(directory: Path, tree: Any) -> None:
        raise ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']")

    with checkpoint.Writer(tmp_path / "a", resume=True) as writer:
        writer.write_part(PARTS[0], part(PARTS[0]))
        monkeypatch.setattr("quikjax.checkpoint.store.save_tree", full)
        with pytest.raises(QuikError, match=r"the disk is full; the 1 finished parts stay in .*a\.partial, run the same again"):
            writer.write_part(PARTS[1], part(PARTS[1]))
    monkeypatch.undo()
    with checkpoint.Writer(tmp_path / "a", resume=True) as writer:
        assert set(writer.completed_parts()) == {PARTS[0]}


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a directory that not even root may write in")
def test_permission_denied_is_one_sentence() -> None:
    with pytest.raises(QuikError, match=r"cannot write /sys/kernel/a\.partial: (permission denied|the file system is read-only)"):
        checkpoint.save("/sys/kernel/a", small_model())


def test_nothing_is_said_on_stdout_or_by_orbax(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from tiny_artifacts import build, random_params\n"
        "from quikjax import checkpoint\n"
        "sys.stderr.write('BEGIN'); checkpoint.save('a', build(random_params()))\n"
        "checkpoint.restore('a'); sys.stderr.write('END')\n"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout == ""
    said = run.stderr.partition("BEGIN")[2].partition("END")[0]
    assert "orbax" not in said
    assert "OCDBT" not in said
    assert "sharding" not in said.lower()


@pytest.mark.parametrize("torn", ["quikjax.json.tmp", "report.jsonl.tmp", "arrays/block.1.json.tmp", "report.jsonl"])
def test_a_file_torn_by_a_kill_does_not_stand_in_the_way(tmp_path: Path, torn: str) -> None:
    def write(path: Path) -> None:
        with checkpoint.Writer(path, recipe={"name": "r"}, resume=True) as writer:
            for name in PARTS:
                if name not in writer.completed_parts():
                    writer.write_part(name, part(name))
            writer.finish(report=[{"layer": name} for name in PARTS])

    write(tmp_path / "whole")
    with checkpoint.Writer(tmp_path / "a", recipe={"name": "r"}, resume=True) as writer:
        writer.write_part(PARTS[0], part(PARTS[0]))
    (tmp_path / "a.partial" / torn).write_text('{"lay')
    write(tmp_path / "a")
    assert read_directory(tmp_path / "a") == read_directory(tmp_path / "whole")
