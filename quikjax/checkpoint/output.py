"""Where an artifact or an export is written, and what may stand there before.

What is being written has a directory of its own until it is whole:

    OUT.partial             beside OUT, where OUT does not exist or is an artifact that will be replaced
    OUT/quikjax.partial     inside, where OUT is a directory already: an empty one, or a mount point, which keeps its place

The one takes its name in one step. The other moves up entry by entry, its manifest last, so that a directory whose manifest
is there is whole in both cases; killed in between, the next writer of the same OUT ends the move first.
"""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from quikjax.checkpoint import atomic
from quikjax.checkpoint.manifest import MANIFEST, Manifest, unseal_manifest
from quikjax.errors import QuikError
from quikjax.files import user_path
from quikjax.loading.source import GENERATION_CONFIG

ARRAYS, TOKENIZER, REPORT, LOG = "arrays", "tokenizer", "report.jsonl", "log.jsonl"
# What stands beside the arrays and is sealed by the manifest, each only where there is something to put in it.
SEALED = (TOKENIZER, REPORT, GENERATION_CONFIG)
# What this package writes into an artifact. Everything else in it is a stranger: left alone, and carried over when replaced.
OURS = {MANIFEST, f"{MANIFEST}.tmp", ARRAYS, *SEALED, f"{REPORT}.tmp", f"{GENERATION_CONFIG}.tmp", LOG}
# What stands in a directory that is empty to its owner: file systems, file managers, git and the hub put it there.
NOBODYS = {
    "lost+found",
    ".DS_Store",
    "Thumbs.db",
    "desktop.ini",
    ".directory",
    ".git",
    ".gitattributes",
    ".gitignore",
    ".gitkeep",
}
NOBODYS |= {".cache", ".huggingface", ".keep", ".snapshot", "README.md", "LICENSE", "LICENSE.txt"}


def real_path(path: Any) -> Path:
    """An output or an artifact's directory as a person gives it: `~` expanded, links followed, absolute."""
    return Path(os.path.realpath(user_path(path)))


def is_empty(directory: Path) -> bool:
    """Whether a directory holds nothing of anybody's but, perhaps, what an earlier run began there."""
    return all(name in NOBODYS or (name.startswith("quikjax.") and name != MANIFEST) for name in os.listdir(directory))


def beside(target: Path, kind: str) -> Path:
    """The directory `kind` ("partial", "work") that belongs to the output `target`: beside it, or inside (see above)."""
    inside = target / f"quikjax.{kind}"
    if target.is_dir() and (inside.exists() or is_empty(target) or os.path.ismount(target)):
        return inside
    return target.with_name(f"{target.name}.{kind}")


def refuse_existing(path: Any, *, force: bool) -> None:
    """Say, before anything is read, that an output is taken or cannot be a directory.

    Raises:
        QuikError: it exists and is not to be replaced, is not ours to replace, or a file is in the way.
    """
    target = real_path(path)
    refuse_file_in_the_way(target)
    atomic.recover(target)
    if _half_moved(target):
        _end_move(target)
    refuse_taken(target, force=force)


def refuse_taken(target: Path, *, force: bool) -> None:
    """`refuse_existing` without ending first what a killed run left half done."""
    for kind in ("partial", "work"):
        place = beside(target, kind)
        if os.path.lexists(place) and not place.is_dir():
            raise QuikError(f"{place} is needed as a directory to write {target}, but is a file; move it away")
    if not os.path.lexists(target):
        return
    foreign = foreign_entry(target)
    if foreign is not None:
        raise QuikError(f"{target} exists and is not an artifact of quikjax ({foreign}); choose another directory")
    if (target / MANIFEST).exists() and not force:
        raise QuikError(f"{target} exists; choose another directory, or replace it with force (--force)")


def refuse_file_in_the_way(target: Path) -> None:
    """Refuse an output below something that is no directory.

    Raises:
        QuikError: naming it.
    """
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise QuikError(f"{parent} is a file, so {target} cannot be made in it; choose another directory")
            return


def foreign_entry(path: Path) -> str | None:
    """Why an existing path cannot become an artifact, or `None`: it is one (damaged or not), or empty."""
    if not path.is_dir():
        return "it is a file"
    with atomic.disk_errors(f"cannot read {path}"):
        if MANIFEST in os.listdir(path) or is_empty(path) or _half_moved(path):
            return None
        return f"it holds {sorted(set(os.listdir(path)) - NOBODYS)[0]} and no {MANIFEST}"


def remove(path: Path) -> None:
    """Delete a file or a directory."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def publish(partial: Path, target: Path, *, replace: bool) -> None:
    """Give a finished artifact its place, replacing an artifact of ours there if `replace`; strangers in it stay.

    Raises:
        QuikError: something appeared under the name meanwhile; `partial` stays.
    """
    if partial.parent == target:
        _move_up(partial, target)
        return
    replaced = replace and target.exists()
    try:
        atomic.publish(partial, target, replace=replace, carry=_carry_strangers)
    except OSError as error:
        # A mount point that looks like any other directory (a bind mount): it keeps its place, what is in it changes.
        if error.errno not in (errno.EBUSY, errno.EXDEV) or not (replaced or is_empty(target)):
            raise
        _move_up(partial, target)


def _end_move(target: Path) -> None:
    """End what a run began that was killed while its finished artifact moved up into `target`."""
    partial = target / "quikjax.partial"
    held = atomic.lock(partial)
    try:
        _move_up(partial, target)
    finally:
        os.close(held)


def _half_moved(target: Path) -> bool:
    manifest = target / "quikjax.partial" / MANIFEST
    try:
        return manifest.is_file() and isinstance(unseal_manifest(manifest), Manifest)
    except QuikError:
        return False  # damaged: an unfinished artifact, which is begun again


def _move_up(partial: Path, target: Path) -> None:
    """Move the finished artifact in `partial` into `target`; may be repeated after being killed at any point."""
    manifest = unseal_manifest(partial / MANIFEST)
    assert isinstance(manifest, Manifest)
    (target / MANIFEST).unlink(missing_ok=True)  # what was there no longer claims to be an artifact
    wanted = {ARRAYS, LOG, *(path.split("/")[0] for path in manifest.files)}
    entries = sorted(set(os.listdir(partial)) - {MANIFEST})
    for name in sorted(OURS & set(os.listdir(target))):
        if name in entries or name not in wanted:
            remove(target / name)
    for name in [*entries, MANIFEST]:
        shutil.move(partial / name, target / name)
        atomic.sync_tree(target / name) if (target / name).is_dir() else atomic.sync(target / name)
        atomic.sync(target)
    shutil.rmtree(partial)
    atomic.sync(target)


def _carry_strangers(old: Path, new: Path) -> None:
    for name in sorted(set(os.listdir(old)) - OURS):
        if not os.path.lexists(new / name):
            os.rename(old / name, new / name)
