"""Writing an artifact part by part, so that memory stays flat and a killed run can go on."""

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from quikjax.checkpoint import atomic, parts, tokenizers
from quikjax.checkpoint.manifest import (
    MANIFEST,
    ArrayRow,
    Inputs,
    Json,
    Manifest,
    Part,
    PartRow,
    Unfinished,
    canonical,
    checksum,
    seal,
    to_json,
    unseal_manifest,
)
from quikjax.checkpoint.output import (
    ARRAYS,
    LOG,
    OURS,
    REPORT,
    SEALED,
    TOKENIZER,
    beside,
    publish,
    real_path,
    refuse_existing,
    refuse_taken,
    remove,
)
from quikjax.checkpoint.shapes import check_parameters, shapes_of
from quikjax.errors import QuikError
from quikjax.files import finite
from quikjax.loading.source import GENERATION_CONFIG
from quikjax.models.registry import abstract_model
from quikjax.version import __version__

# What a sentence about the inputs of an earlier run shows: so many places, so many characters of each value.
NAMED_DIFFERENCES = 4
SHOWN_CHARACTERS = 60


class Writer:
    """Write the artifact `path`: parts in any order, then `finish`. Until then everything is in `PATH.partial`.

        with Writer(path, config=config, recipe=recipe) as writer:
            for name, params in blocks:
                writer.write_part(name, params)
            fingerprint = writer.finish(tokenizer=tokenizer)

    At every moment `path` is what it was before, or the new artifact, whole. Each part is on disk when `write_part` returns.

    With `resume`, parts that an earlier run finished are kept (`completed_parts`), and so is what this run has finished when
    it ends in an error. Without, the directory `PATH.partial` is emptied first, and removed when the block ends in an error.

    Args:
        path: the artifact's directory. It may exist if it is empty (`output.beside` says where parts then are) or, with `force`,
            if it is an artifact, which is replaced at the end.
        config: the published configuration, from which `restore` rebuilds the model; `None` for parameters of another kind.
        recipe: how the parameters came to be, as JSON.
        provenance: what they came from (fingerprints of source and calibration tokens, seeds), as JSON: no time, no path.
        expected_bytes: refuse at once if the disk has less room than this.

    Raises:
        QuikError: `path` exists and may not be replaced, the disk has too little room, another process writes the same artifact,
            or, with `resume`, the earlier run had other inputs: the first that differ are named.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        config: Mapping[str, Any] | None = None,
        recipe: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        force: bool = False,
        resume: bool = False,
        expected_bytes: int | None = None,
    ) -> None:
        # A link is followed: what it points to is replaced. Orbax wants absolute paths.
        self.path = real_path(path)
        refuse_existing(self.path, force=force)
        self.partial = beside(self.path, "partial")
        self._force, self._resume = force, resume
        self._keep = resume  # whether an end without `finish` leaves what there is
        self._inputs = Inputs(
            quikjax=__version__,
            config=None if config is None else to_json(dict(config), "configuration"),
            recipe=None if recipe is None else to_json(dict(recipe), "recipe"),
            provenance=to_json(dict(provenance or {}), "provenance"),
        )
        config = self._inputs.config
        self._shapes = None if config is None else shapes_of(abstract_model(config))
        self._parts: dict[str, Part] = {}
        with atomic.disk_errors(f"cannot write {self.partial}"):
            self.partial.parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.partial.parent).free
            if expected_bytes is not None and free < expected_bytes:
                need, have = expected_bytes / 1e6, free / 1e6
                raise QuikError(f"{self.path} needs about {need:.0f} MB, the disk has {have:.0f} MB left; nothing was written")
            self.partial.mkdir(exist_ok=True)
            strangers = sorted(set(os.listdir(self.partial)) - OURS)
            if strangers:
                raise QuikError(f"{self.partial} is needed to write {self.path} but holds {strangers[0]}; move it away")
            self._lock = atomic.lock(self.partial)
            try:
                self._open()
            except BaseException as error:
                self.__exit__(type(error), error, None)
                raise

    def _open(self) -> None:
        """Take over what an earlier run left, or empty the directory."""
        manifest = self.partial / MANIFEST
        if self._resume and manifest.exists():
            self._compare_inputs(manifest)
            self._take_over()
        else:
            for entry in os.listdir(self.partial):
                remove(self.partial / entry)
        (self.partial / ARRAYS).mkdir(exist_ok=True)
        atomic.write_text(manifest, seal(Unfinished(**self._inputs.model_dump())))
        atomic.sync(self.partial.parent)

    def _compare_inputs(self, manifest: Path) -> None:
        before, now = unseal_manifest(manifest).model_dump(), self._inputs.model_dump()
        different = differences({key: before[key] for key in now}, now)
        if different:
            raise QuikError(
                f"{self.partial} was left by a run with other inputs ({different}); "
                "repeat that run's inputs to go on, or begin again without resuming (--restart)"
            )

    def _take_over(self) -> None:
        """Keep the parts that are whole, remove everything else: it is written again."""
        arrays = self.partial / ARRAYS
        for entry in os.listdir(self.partial):
            if entry not in (MANIFEST, ARRAYS, LOG):
                remove(self.partial / entry)
        entries = set(os.listdir(arrays)) if arrays.exists() else set()
        for name in sorted(entry.removesuffix(".json") for entry in entries if entry.endswith(".json")):
            try:
                part = parts.read_label(arrays, name)
                parts.check_files(arrays, name, part, contents=True)
            except QuikError:
                continue  # damaged since: it counts as not written
            self._parts[name] = part
        kept = {*self._parts, *(f"{name}.json" for name in self._parts)}
        for entry in entries - kept:
            remove(arrays / entry)

    def completed_parts(self) -> dict[str, Part]:
        """The parts that are finished, by name: this run's, and with `resume` those of earlier runs, found whole."""
        return dict(self._parts)

    def read_part(self, name: str) -> dict[str, Any]:
        """Read a finished part back: full parameter names to host arrays and packed weights.

        Raises:
            QuikError: it was never finished, or is damaged.
        """
        if name not in self._parts:
            raise QuikError(f'part "{name}" of {self.path} is not finished')
        return parts.read(self.partial / ARRAYS, name, self._parts[name])

    def check_whole(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare the shapes of all parameters with the configuration's, before any is written. `finish` does it in any case.

        Raises:
            QuikError: naming parameters that are missing, unknown, or of another shape.
        """
        if self._shapes is not None:
            check_parameters(self._shapes, shapes, whole=True)

    def write_part(self, name: str, params: Mapping[str, Any]) -> Part:
        """Write a part: full parameter names to arrays or packed weights. An earlier part of that name is replaced.

        Raises:
            QuikError: a parameter does not belong to the configuration, is in another part already, or cannot be stored;
                the disk is full or refuses.
        """
        if not parts.valid_name(name):
            raise QuikError(f'a part cannot be called "{name}"')
        shapes = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in params.items()}
        if self._shapes is not None:
            check_parameters(self._shapes, shapes, whole=False)
        for other, part in self._parts.items():
            twice = sorted(set(stored_shapes(part)) & set(shapes)) if other != name else []
            if twice:
                raise QuikError(f'{twice[0]} is in part "{other}" already and cannot be in "{name}" too')
        self._parts.pop(name, None)
        with atomic.disk_errors(f"cannot save {self.path}", self._consequence()):
            part = parts.write(self.partial / ARRAYS, name, params)
        self._parts[name] = part
        return part

    def finish(
        self,
        *,
        tokenizer: Any = None,
        generation_config: Mapping[str, Any] | None = None,
        report: Iterable[Mapping[str, Any]] | None = None,
    ) -> str:
        """Write tokenizer, generation's configuration, report and manifest, give the artifact its name; return its fingerprint.

        Args:
            tokenizer: anything with `save_pretrained`, or the files of a published one (`Source.tokenizer_files`), to be copied.
            generation_config: what the source's `generation_config.json` says: above all, which tokens end a text.
            report: one JSON object per line, deterministic; numbers that are not finite become null.

        Raises:
            QuikError: parameters of the configuration are missing; the disk is full or refuses.
        """
        self.check_whole({path: shape for part in self._parts.values() for path, shape in stored_shapes(part).items()})
        with atomic.disk_errors(f"cannot save {self.path}", self._consequence()):
            if tokenizer is not None:
                tokenizers.save(tokenizer, self.partial / TOKENIZER)
            if generation_config is not None:
                fields = to_json(dict(generation_config), "generation's configuration")
                atomic.write_text(self.partial / GENERATION_CONFIG, canonical(fields))
            if report is not None:
                atomic.write_text(self.partial / REPORT, "".join(_report_line(row) for row in report))
            sealed = [path for path in atomic.files_below(self.partial) if path.split("/")[0] in SEALED]
            manifest = Manifest(
                **self._inputs.model_dump(),
                dtype=_main_dtype(self._parts.values()),
                parts={
                    name: PartRow(fingerprint=part.fingerprint, checksum=checksum(part)) for name, part in self._parts.items()
                },
                files={path: atomic.file_row(self.partial / path) for path in sealed},
            ).with_fingerprint()
            atomic.write_text(self.partial / MANIFEST, seal(manifest))
            # From here on it is whole: should its name be taken after all, it stays where it is.
            self._keep = True
            try:
                refuse_taken(self.path, force=self._force)
            except QuikError as error:
                raise QuikError(f"{error}; the finished artifact is in {self.partial}") from None
            publish(self.partial, self.path, replace=self._force)
        return manifest.fingerprint

    def _consequence(self) -> str:
        if self._resume:
            return f"; the {len(self._parts)} finished parts stay in {self.partial}, run the same again to go on"
        return "; nothing was changed, and the unfinished copy is removed"

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # Held until after the removal: nobody else may begin in a directory that is about to go.
        try:
            if not self._keep and self.partial.exists():
                atomic.discard(self.partial)
        finally:
            os.close(self._lock)


def stored_shapes(part: Part) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter in a part; of a packed weight, the shape of the array it stands for."""
    shapes = {path: row.shape for path, row in part.arrays.items() if path.rpartition(".")[0] not in part.packed}
    return shapes | {path: tuple(static["shape"]) for path, static in part.packed.items()}


def differences(before: Json, now: Json) -> str:
    """Say how two JSON objects differ, each place as `path: before, now`; empty if they are equal.

    It goes into one sentence, so only the first few places are named, and long values are cut.
    """
    found = list(_differing(before, now, ""))
    more = [f"and {len(found) - NAMED_DIFFERENCES} more"] if len(found) > NAMED_DIFFERENCES else []
    return "; ".join([f"{name}: {_short(old)} before, {_short(new)} now" for name, old, new in found[:NAMED_DIFFERENCES]] + more)


def _differing(old: object, new: object, path: str) -> Iterator[tuple[str, object, object]]:
    """The places where two JSON values differ, as deep inside as both have one."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differing(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from _differing(*pair, f"{path}[{index}]")
    elif old != new:
        yield path, old, new


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."


def _main_dtype(written: Iterable[Part]) -> str:
    """The float dtype of most dense elements: what the model is said to be in. Each array keeps its own."""
    counts: Counter[str] = Counter()
    for part in written:
        dense: list[ArrayRow] = [row for path, row in part.arrays.items() if path.rpartition(".")[0] not in part.packed]
        for row in dense:
            counts[row.dtype] += math.prod(row.shape) if "float" in row.dtype else 0
    return max(sorted(counts), key=lambda dtype: counts[dtype], default="float32")


def _report_line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(row)), sort_keys=True, allow_nan=False) + "\n"
