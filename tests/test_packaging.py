"""What is built and installed: every way of building carries the linked folders under the one import name."""

import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = {
    "quikjax/__init__.py",
    "quikjax/py.typed",
    "quikjax/reports/templates/page.html",
    "quikjax/cli/__main__.py",
    "quikjax/checkpoint/store.py",
    "quikjax/models/llama.py",
    "quikjax/models/registry.py",
    "quikjax/pallas_kernels/reference.py",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an sdist, and a wheel built from the unpacked sdist, as an installer does."""
    out = tmp_path_factory.mktemp("dist")
    # No isolation: hatchling is installed with the tests, and building asks no registry.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return out


def test_the_sdist_carries_the_folders_once(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {
        "models/llama.py",
        "pallas_kernels/reference.py",
        "quikjax/weights/quik.py",
        "README.md",
        "LICENSE",
        "Makefile",
    } <= names
    assert not {name for name in names if name.startswith(("quikjax/models/", "quikjax/pallas_kernels/"))}


def test_the_wheel_carries_everything_under_one_name(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= NEEDED
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"quikjax"}
    # What the working tree has below the linked folders, the wheel has too: code and package data.
    for folder in ("models", "pallas_kernels"):
        present = {
            f"quikjax/{file.relative_to(ROOT)}"
            for file in (ROOT / folder).rglob("*")
            if file.suffix in (".py", ".json") and "__pycache__" not in file.parts
        }
        assert present <= names


def test_the_wheel_imports_by_itself(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = (
        "import json, quikjax, quikjax.models.llama, quikjax.pallas_kernels.reference as r\n"
        "from quikjax.testing import tiny_model\n"
        "print(json.dumps([quikjax.__file__, r.__file__, tiny_model().config.layers]))"
    )
    # Started elsewhere with that folder first on the path: the editable install must not answer.
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{script}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    package, kernels, layers = json.loads(done.stdout.splitlines()[-1])
    assert package.startswith(str(tmp_path))
    assert kernels.startswith(str(tmp_path))
    assert layers == 3


def test_a_git_install_follows_the_links(tmp_path: Path) -> None:
    """`pip install git+...` builds from a clone: the links must be in the repository, as links."""
    listed = subprocess.run(
        ["git", "ls-files", "-s", "quikjax/models", "quikjax/pallas_kernels"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout (an unpacked sdist)")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["120000", "120000"]


def test_public_names_exist_and_are_listed() -> None:
    import quikjax

    assert set(quikjax.__all__) == {"__version__", *quikjax._HOME}
    for name in quikjax._HOME:
        assert getattr(quikjax, name).__doc__ or name == "RECIPES"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        quikjax.nonsense  # noqa: B018
