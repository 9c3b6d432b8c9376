"""Labelled texts, and batches of them: files in, tokens padded to few lengths out."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from quikjax.errors import QuikError, did_you_mean
from quikjax.files import read_text, user_path

LABEL = "label"
# Columns that are no text.
_ASIDE = ("idx", "id", "index", "guid")
# Batches are padded to these lengths, then to multiples of the last: one compiled program each.
LENGTHS = (16, 32, 64, 128)
# So many batches' examples are sorted by length together before they are cut into batches.
_POOL = 50


class Labelled(NamedTuple):
    """Texts, one or two each, and their labels as the file spells them."""

    texts: list[tuple[str, ...]]
    labels: list[str]


class Examples(NamedTuple):
    """Tokenized texts, their token types (of pairs; else `None`), and the numbers of their labels."""

    ids: list[Int32[np.ndarray, " length"]]
    types: list[Int32[np.ndarray, " length"]] | None
    labels: Int32[np.ndarray, " examples"]


class Batch(NamedTuple):
    """Examples padded to one length. `weights` are 1, and 0 for rows that only fill the batch up."""

    ids: Int32[np.ndarray, "batch length"]
    mask: Int32[np.ndarray, "batch length"]
    types: Int32[np.ndarray, "batch length"] | None
    labels: Int32[np.ndarray, " batch"]
    weights: Float32[np.ndarray, " batch"]


def read_labelled(path: str | Path) -> Labelled:
    """Labelled texts of a file: `.tsv` or `.csv` with a header, or `.jsonl`, an object a line.

    One column (field) is called `label`; the others, in order, are the text or the two texts of a pair.

    Raises:
        QuikError: the file is none of these, has no labels, no texts or more than two, or a line is damaged, which is named.
    """
    where = user_path(path)
    content = read_text(where)
    if where.suffix == ".jsonl":
        rows = list(_json_rows(where, content))
    elif where.suffix in (".tsv", ".csv"):
        rows = list(_table_rows(where, content, "\t" if where.suffix == ".tsv" else ","))
    else:
        raise QuikError(f"{where} is no .tsv, .csv or .jsonl file; labelled texts are read from one of these")
    if not rows:
        raise QuikError(f"{where} has no rows")
    fields = [name for name in rows[0][1] if name != LABEL and name not in _ASIDE]
    if LABEL not in rows[0][1]:
        raise QuikError(f"{where} has no column {LABEL!r}; it has {', '.join(rows[0][1])}: {did_you_mean(LABEL, rows[0][1])}")
    if not 1 <= len(fields) <= 2:
        raise QuikError(f"{where} has {len(fields)} columns beside {LABEL!r} ({', '.join(fields)}); a text or a pair is expected")
    texts, labels = [], []
    for line, row in rows:
        missing = [name for name in (*fields, LABEL) if row.get(name) is None or not str(row[name]).strip()]
        if missing:
            raise QuikError(f"{where}, line {line}: there is no {missing[0]}")
        texts.append(tuple(str(row[name]).strip() for name in fields))
        labels.append(str(row[LABEL]).strip())
    return Labelled(texts, labels)


def _json_rows(where: Path, content: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise QuikError(f"{where}, line {number}: a JSON object is expected")
        yield number, row


def _table_rows(where: Path, content: str, separator: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    # In GLUE's files quotes are part of the text.
    lines = io.StringIO(content)
    if separator == "\t":
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=separator)
    header: list[str] | None = None
    for row in reader:
        if not row:
            continue
        if header is None:
            header = [name.strip() for name in row]
            continue
        if len(row) != len(header):
            raise QuikError(f"{where}, line {reader.line_num}: {len(row)} columns, the first line names {len(header)}")
        yield reader.line_num, dict(zip(header, row, strict=True))


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels in order, numbers by their value."""
    distinct = sorted(set(labels))
    return tuple(sorted(distinct, key=int)) if all(name.isdecimal() for name in distinct) else tuple(distinct)


def numbers_of(labels: Sequence[str], names: Sequence[str], count: int, where: object) -> Int32[np.ndarray, " examples"]:
    """The class of each label: by a classifier's `names`, or as a number below `count`.

    Raises:
        QuikError: a label is neither.
    """
    by_name = {name.lower(): index for index, name in enumerate(names)}
    found = []
    for label in labels:
        index = by_name.get(label.lower(), int(label) if label.isdecimal() else -1)
        if not 0 <= index < count:
            known = ", ".join(names) if names else f"0 to {count - 1}"
            raise QuikError(f"{where} has the label {label!r}, which the classifier does not know; its classes are {known}")
        found.append(index)
    return np.asarray(found, np.int32)


def tokenized(texts: Sequence[tuple[str, ...]], labels: Int32[np.ndarray, " examples"], tokenizer: Any, longest: int) -> Examples:
    """Tokens of texts and pairs, with what the tokenizer puts around them, cut to `longest`."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    read = tokenizer(*columns, truncation=True, max_length=longest, verbose=False)
    pair = len(columns) == 2 and "token_type_ids" in read
    ids = [np.asarray(row, np.int32) for row in read["input_ids"]]
    return Examples(ids, [np.asarray(row, np.int32) for row in read["token_type_ids"]] if pair else None, labels)


def bucket(length: int) -> int:
    """The length that a text of `length` tokens is padded to."""
    fitting = [size for size in LENGTHS if size >= length]
    return fitting[0] if fitting else -(-length // LENGTHS[-1]) * LENGTHS[-1]


def plan_batches(lengths: Sequence[int], size: int, steps: int, seed: int) -> list[Int32[np.ndarray, " size"]]:
    """Which examples each step sees: all of them in an order of the seed's, those of like length together; then all again.

    What does not fill a batch at the end of a pass is left out of that pass.

    Raises:
        QuikError: there are fewer examples than a batch has.
    """
    if len(lengths) < size:
        raise QuikError(f"there are {len(lengths)} examples, and a batch has {size}; give more, or lower --batch")
    rng, sizes = np.random.default_rng(seed), np.asarray(lengths)
    plan: list[Int32[np.ndarray, " size"]] = []
    while len(plan) < steps:
        order = rng.permutation(len(sizes))[: len(sizes) // size * size]
        pools = [order[at : at + _POOL * size] for at in range(0, len(order), _POOL * size)]
        batches = [
            pool[np.argsort(sizes[pool], kind="stable")][at : at + size].astype(np.int32)
            for pool in pools
            for at in range(0, len(pool), size)
        ]
        plan += [batches[index] for index in rng.permutation(len(batches))]
    return plan[:steps]


def padded(examples: Examples, chosen: Sequence[int] | np.ndarray, rows: int) -> Batch:
    """The chosen examples as a batch of `rows`, its last rows repeating the first one where there are fewer."""
    index = np.concatenate([np.asarray(chosen, np.int64), np.full(rows - len(chosen), chosen[0], np.int64)])
    length = bucket(max(len(examples.ids[i]) for i in index))
    ids, mask, types = (np.zeros((rows, length), np.int32) for _ in range(3))
    for row, i in enumerate(index):
        count = len(examples.ids[i])
        ids[row, :count], mask[row, :count] = examples.ids[i], 1
        if examples.types is not None:
            types[row, :count] = examples.types[i]
    weights = (np.arange(rows) < len(chosen)).astype(np.float32)
    return Batch(ids, mask, types if examples.types is not None else None, examples.labels[index], weights)


def in_order(examples: Examples, rows: int) -> Iterator[Batch]:
    """All examples once, sorted by length, for evaluation."""
    order = np.argsort([len(row) for row in examples.ids], kind="stable")
    for at in range(0, len(order), rows):
        yield padded(examples, order[at : at + rows], rows)
