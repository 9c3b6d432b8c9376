"""One part of an artifact: a transformer block, or everything that is in none. Written, read and checked on its own.

A part is a flat dictionary of full parameter names to dense arrays or packed weights. On disk it is an Orbax directory
`arrays/NAME/` and, written last, `arrays/NAME.json`: without that file the part is not finished. Packed weights become
dictionaries of their arrays, their static fields go into the JSON; arrays without elements, which Orbax refuses, exist in
the JSON only.
"""

import dataclasses
import hashlib
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from quikjax.checkpoint import atomic, store
from quikjax.checkpoint.manifest import ArrayRow, Json, Part, seal, unseal_part
from quikjax.errors import QuikError
from quikjax.files import refuse_lfs_pointer
from quikjax.models.registry import nested
from quikjax.weights.formats import PACKED, is_packed

REST = "rest"  # the part of everything that is in no transformer block

# What Orbax and JAX both give back with the bits they got. (uint4 does not return; JAX narrows 64-bit numbers.)
DTYPES = frozenset(["bool", "int4", "int8", "int16", "int32", "uint8", "uint16", "uint32"]).union(
    ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"]
)

Leaf = Any  # an array or a packed weight


def fields(kind: type[Any]) -> tuple[list[str], list[str]]:
    """The names of a packed class's data fields and of its static fields."""
    every = dataclasses.fields(kind)
    static = [field.name for field in every if field.metadata.get("static")]
    return [field.name for field in every if field.name not in static], static


def _later_fields(kind: type[Any]) -> set[str]:
    """Static fields that came after the format: where they are `None` they are not written, as they never were."""
    return {field.name for field in dataclasses.fields(kind) if field.metadata.get("static") and field.default is None}


def valid_name(name: str) -> bool:
    """Check that a part's name can be a file's name."""
    return re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name) is not None


def write(arrays: Path, name: str, params: Mapping[str, Leaf]) -> Part:
    """Write a part below `arrays`, replacing an earlier one of that name, and return once it is on disk.

    Raises:
        QuikError: a leaf cannot be stored, or breaks its format's invariant.
    """
    hosted, packed = _take_apart(params)
    rows = {path: array_row(array) for path, array in hosted.items()}
    directory, label = arrays / name, _label(arrays, name)
    label.unlink(missing_ok=True)
    if directory.exists():
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    filled = {path: array for path, array in hosted.items() if array.size}
    if filled:
        store.save_tree(directory, nested(filled))
    atomic.sync_tree(directory)
    atomic.sync(arrays)
    files = {path: atomic.file_row(directory / path) for path in atomic.files_below(directory)}
    part = Part(arrays=rows, packed=packed, files=files)
    atomic.write_text(label, seal(part))
    return part


def read_label(arrays: Path, name: str) -> Part:
    """The part's own JSON.

    Raises:
        QuikError: it is damaged, or from a newer format.
    """
    return unseal_part(_label(arrays, name))


def check_files(arrays: Path, name: str, part: Part, *, contents: bool) -> None:
    """Compare the part's files with its JSON: that they are there, their sizes, and with `contents` their SHA-256.

    Raises:
        QuikError: naming the first file that differs.
    """
    compare_files(arrays / name, part.files, contents=contents)


def compare_files(directory: Path, rows: Mapping[str, Any], *, contents: bool) -> None:
    """Compare files below `directory` with their rows. Files without a row are not looked at.

    Raises:
        QuikError: naming the first file that is missing, of another size, or (with `contents`) changed.
    """
    for path in sorted(rows):
        if not (directory / path).is_file():
            raise QuikError(f"{directory / path} is missing")
    for path, row in sorted(rows.items()):
        file = directory / path
        size = file.stat().st_size
        if size != row.bytes:
            refuse_lfs_pointer(file)
            raise QuikError(f"{file} is damaged: it has {size} bytes instead of {row.bytes}")
        if contents and atomic.sha256_file(file) != row.sha256:
            raise QuikError(f"{file} is damaged: its SHA-256 is not the one recorded when it was saved")


def read(arrays: Path, name: str, part: Part, *, verify: bool = True) -> dict[str, Leaf]:
    """Read a part: host arrays, packed weights put together and validated.

    Every array's dtype and shape are compared with the JSON, and with `verify` the SHA-256 of every file and every array.

    Raises:
        QuikError: naming what differs.
    """
    check_files(arrays, name, part, contents=verify)
    directory = arrays / name
    filled = [path for path, row in part.arrays.items() if 0 not in row.shape]
    try:
        stored = store.load_arrays(directory, filled)
    except (ValueError, RuntimeError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise QuikError(f"{directory} cannot be read: {first}") from error
    arrays_by_path: dict[str, np.ndarray] = {}
    for path, row in part.arrays.items():
        array = stored[path] if path in stored else np.zeros(row.shape, jnp.dtype(row.dtype))
        found = array_row(array) if verify else ArrayRow(dtype=array.dtype.name, shape=array.shape, sha256=row.sha256)
        for what in ("dtype", "shape", "sha256"):
            if getattr(found, what) != getattr(row, what):
                raise QuikError(
                    f"{path} in {directory} has {what} {getattr(found, what)}, the manifest says {getattr(row, what)}"
                )
        arrays_by_path[path] = array
    return _put_together(arrays_by_path, part.packed)


def array_row(array: np.ndarray) -> ArrayRow:
    """Dtype, shape and SHA-256 of an array's elements."""
    # int4 sits in a byte whose upper half is not part of the value: widen it, so that equal codes have equal hashes.
    plain = array.astype(np.int8) if array.dtype == jnp.int4 else array
    octets = np.ascontiguousarray(plain).reshape(-1).view(np.uint8)
    return ArrayRow(dtype=array.dtype.name, shape=array.shape, sha256=hashlib.sha256(octets.data).hexdigest())


def rebuild(kind: Json, data: Mapping[str, Any], path: str) -> Any:
    """A packed weight from its static fields as stored (`"class"` among them) and its data, of whatever type.

    Raises:
        QuikError: the class or its fields are not known to this version.
    """
    static = dict(kind)
    name = static.pop("class", None)
    if name not in PACKED:
        raise QuikError(f"{path} is a packed weight of class {name}, which this version of quikjax does not know")
    known_data, known_static = fields(PACKED[name])
    missing = set(known_static) - set(static) - _later_fields(PACKED[name])
    if set(data) != set(known_data) or missing or not set(static) <= set(known_static):
        raise QuikError(f"{path} does not have the fields of a {name}")
    return PACKED[name](**data, **{field: tuple(value) if isinstance(value, list) else value for field, value in static.items()})


def _label(arrays: Path, name: str) -> Path:
    return arrays / f"{name}.json"


def _take_apart(params: Mapping[str, Leaf]) -> tuple[dict[str, np.ndarray], dict[str, Json]]:
    """Host arrays by full name, and the static fields of packed weights."""
    hosted: dict[str, np.ndarray] = {}
    packed: dict[str, Json] = {}
    for path, leaf in params.items():
        if is_packed(leaf):
            leaf.validate(path)
            data, static = fields(type(leaf))
            values = {field: getattr(leaf, field) for field in static}
            unwritten = {field for field in _later_fields(type(leaf)) if values[field] is None}
            packed[path] = {"class": type(leaf).__name__} | {name: values[name] for name in static if name not in unwritten}
            hosted.update({f"{path}.{field}": _host(getattr(leaf, field), f"{path}.{field}") for field in data})
        else:
            hosted[path] = _host(leaf, path)
    return hosted, packed


def _host(leaf: Any, path: str) -> np.ndarray:
    if not isinstance(leaf, jax.Array | np.ndarray) or jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.extended):
        raise QuikError(f"{path} is a {type(leaf).__name__}, which cannot be saved; expected an array or a packed weight")
    if leaf.dtype.name not in DTYPES:
        raise QuikError(
            f"{path} has dtype {leaf.dtype.name}, which cannot be saved; convert it to one of {', '.join(sorted(DTYPES))}"
        )
    array = np.asarray(leaf)
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _put_together(arrays: Mapping[str, np.ndarray], packed: Mapping[str, Json]) -> dict[str, Leaf]:
    params: dict[str, Leaf] = {}
    data: dict[str, dict[str, np.ndarray]] = {path: {} for path in packed}
    for path, array in arrays.items():
        owner, _, field = path.rpartition(".")
        if owner in packed:
            data[owner][field] = array
        else:
            params[path] = array
    for path, static in packed.items():
        weight = rebuild(static, data[path], path)
        weight.validate(path)
        params[path] = weight
    return params
