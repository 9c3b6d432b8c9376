"""Directories that appear whole or not at all: flush to disk, rename, exchange, lock; and disk errors told in a sentence."""

import contextlib
import ctypes
import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from quikjax.checkpoint.manifest import MANIFEST, FileRow
from quikjax.errors import QuikError

RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100


def files_below(directory: Path) -> list[str]:
    """Every file below `directory`, as sorted relative paths. Directories alone do not count."""
    found = []
    for parent, _, names in os.walk(directory):
        found += [(Path(parent) / name).relative_to(directory).as_posix() for name in names]
    return sorted(found)


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_row(path: Path) -> FileRow:
    """Size and SHA-256 of a file."""
    return FileRow(bytes=path.stat().st_size, sha256=sha256_file(path))


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(directory: Path) -> None:
    """Wait until everything below `directory` is on disk, files before the directories that name them."""
    walked = [(Path(parent), names) for parent, _, names in os.walk(directory, topdown=False)]
    # Side by side, because a disk writes many waiting files in the time of one.
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync, [parent / name for parent, names in walked for name in names]))
        list(pool.map(sync, [parent for parent, _ in walked]))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, or a restart, sees the old text or the new one, whole."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


def discard(directory: Path) -> None:
    """Delete an artifact, its manifest first: killed half way, what is left no longer claims to be one."""
    (directory / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(directory)


def publish(finished: Path, target: Path, *, replace: bool, carry: Callable[[Path, Path], None] | None = None) -> None:
    """Give a finished directory its name. At every moment `target` is the old one, whole, or the new one, whole.

    `carry(old, new)` may save something of the old one before it is deleted.

    With `replace`, an existing target is exchanged for the new one in one step and deleted afterwards. Where the system or the
    file system has no exchange, the old one steps aside as `TARGET.previous` first: killed between the two renames, nothing has
    the name `target`, both are whole, and `recover` puts the old one back.

    Raises:
        QuikError: something appeared under the name meanwhile; `finished` stays.
    """
    if replace and target.exists():
        if not _exchange(finished, target):
            previous = _previous(target)
            os.rename(target, previous)
            os.rename(finished, target)
            os.rename(previous, finished)
        sync(target.parent)
        if carry is not None:
            carry(finished, target)
        discard(finished)
    else:
        try:
            os.rename(finished, target)
        except (FileExistsError, NotADirectoryError, OSError) as error:
            if isinstance(error, FileExistsError | NotADirectoryError) or error.errno == errno.ENOTEMPTY:
                raise QuikError(f"{target} appeared while this was written; the finished artifact is in {finished}") from None
            raise
    sync(target.parent)


def recover(target: Path) -> None:
    """Undo a replacement that was killed half way on a system without an exchange."""
    previous = _previous(target)
    if not target.exists() and (previous / MANIFEST).is_file():
        os.rename(previous, target)
        sync(target.parent)


def _previous(target: Path) -> Path:
    return target.with_name(target.name + ".previous")


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where that does not exist."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def lock(directory: Path) -> int:
    """Hold a directory against other writers until the returned descriptor is closed or the process ends.

    Raises:
        QuikError: another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise QuikError(f"another process is writing {directory}; wait for it or choose another directory") from None
    except (ImportError, OSError):
        pass  # no such locks on this system or file system: two writers at once are then the user's to avoid
    return descriptor


# Tensorstore tells system errors as text: "... No space left on device ... [os_error_code='28']".
_CODES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file became larger than the system allows",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOTDIR: "a file is where a directory is needed",
    errno.ENAMETOOLONG: "a name is too long",
    errno.ELOOP: "links lead in a circle",
    errno.EIO: "the disk has an error",
    errno.ESTALE: "the network file system lost a file",
}


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found.group(1)) if found else None


@contextlib.contextmanager
def disk_errors(doing: str, consequence: str = "") -> Iterator[None]:
    """Turn an error of the disk into one sentence, `doing` before it and `consequence` behind it; others pass."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        seen: BaseException | None = error
        while seen is not None and _code(seen) not in _CODES:
            seen = seen.__cause__ or seen.__context__
        if seen is None:
            raise
        reason = _CODES[_code(seen) or 0]
        raise QuikError(f"{doing}: {reason}{consequence}") from error
