"""Reading an artifact, part by part, nothing handed out before it is checked."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from quikjax.checkpoint import atomic, parts
from quikjax.checkpoint.locate import locate, refuse_foreign
from quikjax.checkpoint.manifest import MANIFEST, FileRow, Json, Manifest, Part, checksum, unseal_manifest
from quikjax.checkpoint.output import ARRAYS, REPORT, TOKENIZER
from quikjax.errors import QuikError, did_you_mean
from quikjax.files import read_json
from quikjax.loading.source import GENERATION_CONFIG
from quikjax.loading.tokenizer import read_tokenizer


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the artifact `path` (a directory or a hub name), its own checksum and fingerprint verified.

    Raises:
        QuikError: there is no artifact, it is unfinished, from a newer format, or its manifest is damaged.
    """
    directory = locate(path)
    refuse_foreign(directory)
    with atomic.disk_errors(f"cannot read {directory}"):
        manifest = unseal_manifest(directory / MANIFEST)
    if not isinstance(manifest, Manifest):
        raise QuikError(f"{directory} is an unfinished artifact; run what was writing it again")
    if manifest.with_fingerprint() != manifest:
        raise QuikError(f"{directory / MANIFEST} is damaged: the fingerprint does not match its contents")
    for name in manifest.parts:
        if not parts.valid_name(name):
            raise QuikError(f'{directory / MANIFEST} names a part "{name}", which no artifact has')
    return manifest


class Reader:
    """An artifact, opened: the manifest is read, and every file is there with its recorded size. Parts are read one by one.

    `path` is its directory, or its hub name. Files that the manifest does not list are not looked at.

    Raises:
        QuikError: there is no artifact, it is from a newer format, or a file is missing, truncated or damaged.
    """

    def __init__(self, path: str | os.PathLike[str], *, verify: bool = True) -> None:
        self.path = locate(path)
        self.verify = verify
        self.manifest = read_manifest(self.path)
        with atomic.disk_errors(f"cannot read {self.path}"):
            self.parts = self._read_labels()
            self._check_listing()

    def _read_labels(self) -> dict[str, Part]:
        found = {}
        for name, row in self.manifest.parts.items():
            label = self.path / ARRAYS / f"{name}.json"
            if not label.is_file():
                raise QuikError(f"{label} is missing")
            found[name] = parts.read_label(self.path / ARRAYS, name)
            if checksum(found[name]) != row.checksum:
                raise QuikError(f"{label} is not the one that {MANIFEST} was written with")
        return found

    def _check_listing(self) -> None:
        rows: dict[str, FileRow] = dict(self.manifest.files)
        for name, part in self.parts.items():
            rows.update({f"{ARRAYS}/{name}/{path}": row for path, row in part.files.items()})
        self.files = (MANIFEST, *(f"{ARRAYS}/{name}.json" for name in self.parts), *rows)
        parts.compare_files(self.path, rows, contents=False)
        if self.verify:
            parts.compare_files(self.path, self.manifest.files, contents=True)

    @property
    def disk_bytes(self) -> int:
        """The size of all files of the artifact together."""
        return sum((self.path / path).stat().st_size for path in self.files)

    def read_part(self, name: str) -> dict[str, Any]:
        """One part, checked: full parameter names to host arrays and packed weights.

        Raises:
            QuikError: there is no such part, or what is on disk is not what was saved.
        """
        if name not in self.parts:
            raise QuikError(f'{self.path} has no part "{name}"; {did_you_mean(name, self.parts)}')
        with atomic.disk_errors(f"cannot read {self.path}"):
            return parts.read(self.path / ARRAYS, name, self.parts[name], verify=self.verify)

    def tokenizer(self, *, plain: bool = False) -> Any:
        """The tokenizer, or `None` if the artifact has none. `plain`: see `read_tokenizer`."""
        listed = [path for path in self.manifest.files if path.startswith(f"{TOKENIZER}/")]
        if not listed:
            return None
        if len(listed) == len(atomic.files_below(self.path / TOKENIZER)):
            return read_tokenizer(self.path / TOKENIZER, self.manifest.config, plain=plain)
        # A file that was not there at saving must not change what the others say, whatever its name means to transformers.
        with tempfile.TemporaryDirectory(prefix="quikjax-tokenizer-") as apart:
            for path in listed:
                copy = Path(apart) / path
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.path / path, copy)
            return read_tokenizer(Path(apart) / TOKENIZER, self.manifest.config, plain=plain)

    def generation_config(self) -> Json | None:
        """The content of the source's `generation_config.json`, or `None` if the artifact has none."""
        return read_json(self.path / GENERATION_CONFIG) if GENERATION_CONFIG in self.manifest.files else None

    def report(self) -> list[Json]:
        """The lines of the report, empty if the artifact has none."""
        if REPORT not in self.manifest.files:
            return []
        return [json.loads(line) for line in (self.path / REPORT).read_text(encoding="utf-8").splitlines()]
