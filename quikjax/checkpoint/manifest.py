"""An artifact's manifest: JSON texts that carry their own checksum, so that a changed bit in them is found too.

`quikjax.json` describes the whole and names the parts; `arrays/NAME.json` describes one part. A text is canonical (sorted keys,
one layout), holds no time and no path, and its `checksum` is the SHA-256 of the same text without that line. Reading it
back demands the canonical text exactly, so that not even a space may differ. This scheme is the same in every format version:
a newer artifact is told from a damaged one.

A `fingerprint` is the SHA-256 of contents alone (arrays, configuration, recipe, provenance, tokenizer), never of how files hold
them: two artifacts with one fingerprint compute the same thing, whatever wrote their chunks.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from quikjax.errors import QuikError
from quikjax.files import refuse_lfs_pointer

FORMAT = 1
MANIFEST = "quikjax.json"

Json = dict[str, Any]


class Record(BaseModel):
    """A piece of a manifest: immutable, and no field that this version does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


_R = TypeVar("_R", bound=Record)


class ArrayRow(Record):
    """One array. `sha256` is over its elements in C order, little endian, one byte each for int4."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class FileRow(Record):
    """One file."""

    bytes: int
    sha256: str


class Part(Record):
    """One part: its arrays by full name, the static fields of its packed weights, and the files (relative to its directory)."""

    format: int = FORMAT
    arrays: dict[str, ArrayRow]
    packed: dict[str, Json]
    files: dict[str, FileRow]

    @property
    def fingerprint(self) -> str:
        """Over the arrays and static fields, not over the files."""
        return digest(self.model_dump(mode="json", include={"format", "arrays", "packed"}))


class PartRow(Record):
    """One part as `quikjax.json` names it: its fingerprint, and the checksum of its `arrays/NAME.json`."""

    fingerprint: str
    checksum: str


class Inputs(Record):
    """Everything known before the first weight is written that decides later bytes."""

    format: int = FORMAT
    quikjax: str
    config: Json | None
    recipe: Json | None
    provenance: Json


class Unfinished(Inputs):
    """`quikjax.json` while the artifact is being written: a resumed run must have the same inputs."""

    state: Literal["writing"] = "writing"


class Manifest(Inputs):
    """`quikjax.json` of a finished artifact. `files` are those outside `arrays/`, by path."""

    state: Literal["complete"] = "complete"
    dtype: str
    parts: dict[str, PartRow]
    files: dict[str, FileRow]
    fingerprint: str = ""

    def with_fingerprint(self) -> "Manifest":
        """The same manifest, its fingerprint computed."""
        contents = self.model_dump(mode="json", include={*Inputs.model_fields, "dtype"})
        contents["parts"] = {name: row.fingerprint for name, row in self.parts.items()}
        contents["files"] = {name: row.sha256 for name, row in self.files.items()}
        return self.model_copy(update={"fingerprint": digest(contents)})


def to_json(value: Any, what: str) -> Any:
    """`value` as it comes back from JSON (tuples are lists, keys are strings).

    Raises:
        QuikError: naming `what`, which JSON cannot hold.
    """
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QuikError(f"the {what} cannot be saved as JSON: {error}") from None


def canonical(value: Any) -> str:
    """The one text of a JSON value."""
    return json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n"


def digest(value: Any) -> str:
    """SHA-256 of the canonical text."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def checksum(record: Record) -> str:
    """The `checksum` that `seal` writes into the text of `record`."""
    return digest(record.model_dump(mode="json"))


def seal(record: Record) -> str:
    """The text of a manifest with its checksum in it."""
    return canonical(record.model_dump(mode="json") | {"checksum": checksum(record)})


def unseal(path: Path) -> Json:
    """Read a sealed text and check it, down to the last byte.

    Raises:
        QuikError: the file is damaged, or from a newer format.
    """
    refuse_lfs_pointer(path)
    damaged = QuikError(f"{path} is damaged: its own checksum does not match")
    try:
        text = path.read_bytes().decode()
        body = json.loads(text)
        claimed = body.pop("checksum")
        sound = canonical(body | {"checksum": claimed}) == text and digest(body) == claimed
        version = body.get("format")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise damaged from None
    if not sound:
        raise damaged
    if version != FORMAT:
        raise QuikError(
            f"{path} is in artifact format {version}; this version of quikjax reads format {FORMAT}: use a newer quikjax"
        )
    return body


def unseal_manifest(path: Path) -> Manifest | Unfinished:
    """Read `quikjax.json`, of a finished or an unfinished artifact.

    Raises:
        QuikError: the file is damaged, or from a newer format.
    """
    body = unseal(path)
    return _parse(Unfinished, body, path) if body.get("state") == "writing" else _parse(Manifest, body, path)


def unseal_part(path: Path) -> Part:
    """Read `arrays/NAME.json`.

    Raises:
        QuikError: the file is damaged, or from a newer format.
    """
    return _parse(Part, unseal(path), path)


def _parse(kind: type[_R], body: Mapping[str, Any], path: Path) -> _R:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise QuikError(f"{path} has a sound checksum but is no manifest of ours: {where}: {first['msg']}") from None
