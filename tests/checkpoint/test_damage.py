"""Whatever is wrong with a directory is found and named, and nothing is handed out."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_artifacts import CONFIG, SMALL, build, random_params, read_directory, tiny_tokenizer

from quikjax import checkpoint
from quikjax.checkpoint import atomic, manifest, parts, store
from quikjax.errors import QuikError
from quikjax.models.registry import nested


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """An artifact of one block, with everything an artifact can have."""
    model = build(random_params(config=SMALL), SMALL)
    checkpoint.save(tmp_path / "a", model, tokenizer=tiny_tokenizer(), report=[{"layer": "x", "bits": 4}])
    return tmp_path / "a"


def flip(path: Path, position: int, bit: int) -> None:
    octets = bytearray(path.read_bytes())
    octets[position] ^= 1 << bit
    path.write_bytes(octets)


def test_a_flipped_bit_is_found_in_every_file(artifact: Path) -> None:
    rng = np.random.default_rng(0)
    whole = read_directory(artifact)
    assert len(whole) > 70
    places = [(path, int(rng.integers(len(octets)))) for path, octets in whole.items()]
    # The manifest guards everything else and itself: more places there.
    places += [("quikjax.json", int(position)) for position in rng.integers(len(whole["quikjax.json"]), size=30)]
    for path, position in places:
        bit = int(rng.integers(8))
        flip(artifact / path, position, bit)
        with pytest.raises(QuikError) as found:
            checkpoint.restore_params(artifact)
        assert path in str(found.value), f"bit {bit} of byte {position} of {path}"
        flip(artifact / path, position, bit)
    assert read_directory(artifact) == whole
    checkpoint.restore(artifact)


def test_a_flipped_bit_stops_restore_of_model_and_tokenizer(artifact: Path) -> None:
    for path in ("tokenizer/tokenizer.json", "arrays/rest/model.embed_tokens.weight/0.0"):
        flip(artifact / path, 40, 3)
        with pytest.raises(QuikError, match=path):
            checkpoint.restore(artifact)
        flip(artifact / path, 40, 3)


def test_without_verification_sizes_are_still_compared(artifact: Path) -> None:
    flip(artifact / "tokenizer/tokenizer.json", 1, 0)
    checkpoint.restore_params(artifact, verify=False)
    (artifact / "report.jsonl").write_text("")
    with pytest.raises(QuikError, match=r"report\.jsonl is damaged: it has 0 bytes instead of \d+"):
        checkpoint.restore_params(artifact, verify=False)


def test_missing_and_truncated_files_are_named(artifact: Path) -> None:
    for path, octets in read_directory(artifact).items():
        file = artifact / path
        if len(octets) > 1:
            file.write_bytes(octets[: len(octets) // 2])
            with pytest.raises(QuikError, match=f"{path} is damaged"):
                checkpoint.restore(artifact)
        file.unlink()
        with pytest.raises(QuikError, match="has no quikjax.json" if path == "quikjax.json" else f"{path} is missing"):
            checkpoint.restore(artifact)
        file.write_bytes(octets)


def test_parts_of_another_artifact_are_found(artifact: Path, tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "b", build(random_params(seed=1, config=SMALL), SMALL))
    for name in ("rest", "rest.json"):
        os.rename(artifact / "arrays" / name, tmp_path / f"aside-{name}")
        os.rename(tmp_path / "b" / "arrays" / name, artifact / "arrays" / name)
    with pytest.raises(QuikError, match=r"rest\.json is not the one that quikjax\.json was written with"):
        checkpoint.restore(artifact)


def forge(artifact: Path, change: Callable[[dict[str, Any]], None], path: str = "quikjax.json") -> None:
    """Change a manifest and give it a sound checksum, and the part and manifest above it too."""
    body = json.loads((artifact / path).read_text())
    del body["checksum"]
    change(body)
    checksum = manifest.digest(body)
    (artifact / path).write_text(manifest.canonical(body | {"checksum": checksum}))
    if path != "quikjax.json":
        name = Path(path).name.removesuffix(".json")
        forge(artifact, lambda body: body["parts"][name].update(checksum=checksum))


def rewrite(artifact: Path, name: str, params: dict[str, np.ndarray]) -> None:
    """Put other arrays in a part, and make the manifests describe the new files but the old arrays."""
    directory = artifact / "arrays" / name
    for path in atomic.files_below(directory):
        (directory / path).unlink()
    store.save_tree(directory, nested(params))
    files = {path: atomic.file_row(directory / path).model_dump() for path in atomic.files_below(directory)}
    forge(artifact, lambda body: body.update(files=files), f"arrays/{name}.json")


@pytest.mark.parametrize("verify", [True, False])
def test_arrays_stored_with_another_dtype_or_shape_are_not_cast(artifact: Path, verify: bool) -> None:
    params = {path: np.asarray(leaf) for path, leaf in random_params(config=SMALL).items() if "layers" not in path}
    rewrite(artifact, "rest", params)
    checkpoint.restore(artifact, verify=verify)  # the same arrays in new files are the same artifact
    rewrite(artifact, "rest", params | {"model.norm.weight": params["model.norm.weight"].astype(jnp.bfloat16)})
    with pytest.raises(QuikError, match=r"model\.norm\.weight in .*rest has dtype bfloat16, the manifest says float32"):
        checkpoint.restore(artifact, verify=verify)
    rewrite(artifact, "rest", params | {"model.norm.weight": params["model.norm.weight"][:-1]})
    with pytest.raises(QuikError, match=r"model\.norm\.weight .* has shape \(15,\), the manifest says \(16,\)"):
        checkpoint.restore(artifact, verify=verify)


def test_arrays_with_other_contents_are_found_behind_sound_files(artifact: Path) -> None:
    params = {path: np.asarray(leaf) for path, leaf in random_params(config=SMALL).items() if "layers" not in path}
    params["model.norm.weight"] = -params["model.norm.weight"]
    rewrite(artifact, "rest", params)
    with pytest.raises(QuikError, match=r"model\.norm\.weight .* has sha256"):
        checkpoint.restore(artifact)


def test_a_packed_weight_that_breaks_its_invariant_is_neither_saved_nor_restored(artifact: Path, tmp_path: Path) -> None:
    params = random_params(config=SMALL)
    path = "model.layers.0.mlp.up_proj.weight"
    weight = params[path]
    bad = params | {path: type(weight)(**(vars(weight) | {"scale": -weight.scale}))}
    with pytest.raises(QuikError, match=rf"{path}\.scale has values that are not positive"):
        checkpoint.save(tmp_path / "bad", build(bad, SMALL))
    assert not (tmp_path / "bad").exists()
    assert not (tmp_path / "bad.partial").exists()
    forge(artifact, lambda body: body["packed"][path].update(base=weight.base - 1), "arrays/model.layers.0.json")
    with pytest.raises(QuikError, match=rf"{path}\.qweight has shape"):
        checkpoint.restore(artifact)
    forge(artifact, lambda body: body["packed"][path].update({"class": "Other"}), "arrays/model.layers.0.json")
    with pytest.raises(QuikError, match="class Other, which this version of quikjax does not know"):
        checkpoint.restore(artifact)


def test_a_newer_format_is_told_from_damage(artifact: Path) -> None:
    forge(artifact, lambda body: body.update(format=2, state="other", new={}))
    with pytest.raises(QuikError, match="is in artifact format 2; this version of quikjax reads format 1"):
        checkpoint.restore(artifact)


def test_a_manifest_that_contradicts_itself_is_refused(artifact: Path) -> None:
    before = (artifact / "quikjax.json").read_bytes()
    forge(artifact, lambda body: body.update(recipe={"name": "another"}))
    with pytest.raises(QuikError, match="the fingerprint does not match"):
        checkpoint.restore(artifact)
    (artifact / "quikjax.json").write_bytes(before)
    forge(artifact, lambda body: body.update(surplus=1))
    with pytest.raises(QuikError, match="is no manifest of ours: surplus"):
        checkpoint.read_manifest(artifact)
    (artifact / "quikjax.json").write_bytes(before)
    # Same numbers, another text: an editor's save is a change too.
    (artifact / "quikjax.json").write_text(json.dumps(json.loads(before)))
    with pytest.raises(QuikError, match=r"quikjax\.json is damaged"):
        checkpoint.read_manifest(artifact)


def test_a_configuration_that_is_not_the_parameters_is_refused(tmp_path: Path) -> None:
    params = random_params(config=SMALL)
    with pytest.raises(QuikError, match=r"not those of the configuration: model\.layers\.1\..* is missing; .* and \d+ more"):
        checkpoint.save(tmp_path / "a", build(params, SMALL), config=CONFIG)
    wider = SMALL | {"vocab_size": 65}
    with pytest.raises(QuikError, match=r"model\.embed_tokens\.weight has shape \(64, 16\), the configuration says \(65, 16\)"):
        checkpoint.save(tmp_path / "a", build(params, SMALL), config=wider)
    with checkpoint.Writer(tmp_path / "a", config=SMALL) as writer:
        with pytest.raises(QuikError, match=r"model\.other is not in the configuration"):
            writer.write_part("rest", {"model.other": np.zeros(3, np.float32)})
        with pytest.raises(QuikError, match=r"model\.embed_tokens\.weight is missing"):
            writer.finish()
    assert os.listdir(tmp_path) == []


def test_a_model_without_its_configuration_asks_for_it(tmp_path: Path) -> None:
    model = build(random_params(config=SMALL), SMALL)
    model.published = None
    with pytest.raises(QuikError, match="pass it as config"):
        checkpoint.save(tmp_path / "a", model)
    checkpoint.save(tmp_path / "a", model, config=SMALL)
    assert checkpoint.restore(tmp_path / "a")[0].published == build(random_params(config=SMALL), SMALL).published


def test_parameters_without_a_configuration_are_restored_as_parameters(tmp_path: Path) -> None:
    with checkpoint.Writer(tmp_path / "a") as writer:
        writer.write_part("mine", {"dense.kernel": np.ones((2, 3), np.float32)})
        writer.finish()
    with pytest.raises(QuikError, match="without a model configuration; read it with restore_params"):
        checkpoint.restore(tmp_path / "a")
    assert checkpoint.restore_params(tmp_path / "a")["dense"]["kernel"].shape == (2, 3)


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        (np.zeros(3), "has dtype float64, which cannot be saved"),
        (np.zeros(3, np.int64), "has dtype int64"),
        (3.0, "is a float, which cannot be saved"),
        (np.array(["text"]), "has dtype str"),
    ],
)
def test_leaves_that_would_not_come_back_are_refused(tmp_path: Path, leaf: Any, message: str) -> None:
    with checkpoint.Writer(tmp_path / "a") as writer, pytest.raises(QuikError, match=message):
        writer.write_part("mine", {"x": leaf})


def test_directories_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("")
    checkpoint.save(tmp_path / "smol-quik", build(random_params(config=SMALL), SMALL))
    cases = {
        "smol-qiuk": 'there is no directory .*; did you mean "smol-quik"',
        "published": r"has no quikjax\.json: it is not the directory of an artifact but of a published checkpoint",
        "file": "is a file, not the directory",
        "nowhere/at/all": "there is no directory",
    }
    for name, message in cases.items():
        with pytest.raises(QuikError, match=message):
            checkpoint.restore(tmp_path / name)
    for text in ("", "[]", "null", "{", '{"format": 1}', "\udcff", "[" * 100_000):
        (tmp_path / "published" / "quikjax.json").write_bytes(text.encode(errors="surrogateescape"))
        with pytest.raises(QuikError, match=r"quikjax\.json is damaged"):
            checkpoint.restore(tmp_path / "published")


def test_what_json_cannot_hold_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(QuikError, match="the provenance cannot be saved as JSON"):
        checkpoint.Writer(tmp_path / "a", provenance={"x": float("nan")})
    with pytest.raises(QuikError, match="the recipe cannot be saved as JSON"):
        checkpoint.Writer(tmp_path / "a", recipe={"x": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "a b"])
def test_part_names_are_file_names(tmp_path: Path, name: str) -> None:
    assert not parts.valid_name(name)
    with checkpoint.Writer(tmp_path / "a") as writer, pytest.raises(QuikError, match="a part cannot be called"):
        writer.write_part(name, {})
