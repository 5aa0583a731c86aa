"""What the tasks of corpus preparation do to a block of rows. A block holds rows and, beside them, tallies of what was dropped."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from cluster import sources
from cluster.kinds import label_of, needs_label
from cluster.reading import Unit
from distillation import encoding
from distillation.config import ImageClassification, TaskConfig

SPLITS = ("train", "validation", "test")
"""From weak to strong: a text that several splits name belongs to the last of them."""

PLACES = 1 << 60
"""A place is the first 15 digits of an id as a number below this: what Ray Data sorts by."""
_TALLY = (("label", pa.string()), ("split", pa.string()), ("fact", pa.string()), ("count", pa.int64()))
NOTHING: Mapping[Any, Any] = {pa.string(): "", pa.binary(): b"", pa.int32(): 0, pa.int64(): 0}
"""What stands in the other columns of a tally; in lists []."""

ENCODE_ROWS, ENCODE_IMAGES = 1024, 64

Tallies = Counter[tuple[str, str | None, str | None]]
"""(fact, split, label) -> rows."""


def read_schema(task: TaskConfig) -> pa.Schema:
    """Of rows as they were read, with their ids."""
    content = pa.binary() if isinstance(task, ImageClassification) else pa.string()
    return pa.schema([("place", pa.int64()), ("id", pa.string()), ("text", content), *_TALLY])


def encoded_schema(task: TaskConfig, stored: pa.Schema) -> pa.Schema:
    """Of rows as they are stored, but the label still by its name."""
    made = set(encoding.label_columns(task, [], []))
    return pa.schema([*(column for column in stored if column.name not in made), *_TALLY])


def read_bundle(batch: Mapping[str, Any], task: TaskConfig, shares: tuple[float, float]) -> Iterator[pa.Table]:
    yield read_schema(task).empty_table()
    for unit in (Unit(**fields) for fields in json.loads(batch["units"][0])):
        for table in sources.read(unit, task):
            yield identify(table, shares)


def identify(table: pa.Table, shares: tuple[float, float]) -> pa.Table:
    """Rows with id and split; empty ones become a tally."""
    contents = table["text"].to_pylist()
    keep = [i for i, content in enumerate(contents) if content]
    ids = [hashlib.sha256(content if isinstance(content, bytes) else content.encode()).hexdigest()[:32] for content in contents if content]
    splits, labels = table["split"].to_pylist(), table["label"].to_pylist()
    schema = pa.schema([("place", pa.int64()), ("id", pa.string()), table.schema.field("text"), *_TALLY])
    kept = {
        "place": [int(id_[:15], 16) for id_ in ids], "id": ids, "text": [contents[i] for i in keep], "label": [labels[i] for i in keep],
        "split": [split_of(id_, splits[i], shares) for id_, i in zip(ids, keep, strict=True)],
        "fact": [None] * len(keep), "count": [1] * len(keep),
    }  # fmt: skip
    tallies: Tallies = Counter({("rows_read", None, None): len(contents), ("empty", None, None): len(contents) - len(keep)})
    return pa.concat_tables([pa.table(kept, schema=schema), _tally_table(tallies, schema)])


def split_of(id_: str, given: str | None, shares: tuple[float, float]) -> str:
    """The split of a text by its content alone, where the source leaves it open; rows given as train make up the missing splits."""
    if given not in (None, "train"):
        return str(given)
    place = fraction("split", id_)
    validation, test = shares
    return "test" if place < test else "validation" if place < test + validation else "train"


def fraction(purpose: str, id_: str) -> float:
    """A number in [0, 1) that depends on an id, and differs from purpose to purpose."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {id_}".encode()).digest()[:7], "big") / 2**56


def encode_block(
    table: pa.Table, task: TaskConfig, labelled: float, tokenizers: ray.ObjectRef[Any] | None, stored: pa.Schema
) -> Iterator[pa.Table]:
    """The rows of a range of ids, in their order: settled between copies, then with token ids or pixels.

    tokenizers: the one that decides what a row is, and the one whose tokens it is read in (None: the same). stored: columns of a part.
    """
    table = table.sort_by("id")
    ids, labels, splits = (table[name].to_pylist() for name in ("id", "label", "split"))
    tallies: Tallies = Counter()
    kept: list[tuple[int, str | None, str]] = []
    for id_, group in itertools.groupby(range(table.num_rows), key=ids.__getitem__):
        members = list(group)
        if id_ == "":
            for i in members:
                tallies[table["fact"][i].as_py(), splits[i], labels[i]] += table["count"][i].as_py()
            continue
        label, split = settle([labels[i] for i in members], [splits[i] for i in members], tallies, needs_label(task))
        if split is not None and label is not None and split == "train" and fraction("labelled", id_) >= labelled:
            tallies["hidden", split, None] += 1
            for name in encoding.classes(task, label):
                tallies["hidden_label", split, name] += 1
            label = None
        if split is not None:
            kept.append((members[0], label, split))
    pair, schema = (None, None) if tokenizers is None else _tokenizers(tokenizers), encoded_schema(task, stored)
    rows = ENCODE_IMAGES if isinstance(task, ImageClassification) else ENCODE_ROWS
    for start in range(0, len(kept), rows):
        some = kept[start : start + rows]
        part = table.select(["id", "text"]).take(pa.array([i for i, _, _ in some], pa.int64()))
        yield _encode(part, [label for _, label, _ in some], [split for _, _, split in some], task, pair, tallies, schema)
    yield _tally_table(tallies, schema)


def settle(labels: Sequence[str | None], splits: Sequence[str], tallies: Tallies, strict: bool = True) -> tuple[str | None, str | None]:
    """Label and split of a text from all its copies; no split if it is dropped. A label beats none; two different ones are none.

    strict: what has no label is dropped from validation and test.
    """
    split = max(splits, key=SPLITS.index)
    different = {label for label in labels if label is not None}
    tallies["duplicates", None, None] += len(labels) - 1
    if len(different) > 1:
        tallies["conflicting", split, None] += 1
        if split != "train" and strict:
            tallies["conflicting_dropped", split, None] += 1
            return None, None
        return None, split
    if not different and split != "train" and strict:
        tallies["unlabelled_dropped", split, None] += 1
        return None, None
    return next(iter(different), None), split


def _encode(
    table: pa.Table,
    labels: list[str | None],
    splits: list[str],
    task: TaskConfig,
    pair: tuple[Any, Any],
    tallies: Tallies,
    schema: pa.Schema,
) -> pa.Table:
    (tokenizer, reader), ids, contents = pair, table["id"].to_pylist(), table["text"].to_pylist()
    if reader is None:
        made = encoding.encode(task, tokenizer, ids, contents, labels)
    else:
        made = encoding.read_again(task, tokenizer, reader, ids, contents, labels)
    for (fact, i), count in made.tallies.items():
        tallies[fact, splits[i], None] += count
    own = {
        "label": made.labels,
        "split": [splits[i] for i in made.source],
        "fact": [None] * len(made.source),
        "count": [1] * len(made.source),
    }
    columns = {**made.columns, **own}
    return pa.table([pa.array(columns.get(field.name, []), field.type) for field in schema], schema=schema)


def _tally_table(tallies: Tallies, schema: pa.Schema) -> pa.Table:
    """Tallies as rows whose id is ""."""
    entries: list[dict[str, Any]] = [
        {"label": label, "split": split, "fact": fact, "count": count} for (fact, split, label), count in tallies.items() if count
    ]
    blank = {field.name: NOTHING.get(field.type, []) for field in schema}
    return pa.Table.from_pylist([{**blank, **entry} for entry in entries], schema=schema)


COUNTED = pa.schema(
    [("fact", pa.string()), ("split", pa.string()), ("label", pa.string()), *((name, pa.int64()) for name in ("count", *encoding.SUMS))]
)


def count_block(table: pa.Table, task: TaskConfig) -> pa.Table:
    """Tallies of a block: those that came with it, its rows as "labelled" or "unlabelled", and under "class" how often each label occurs.

    Of labels that are sequences the entries are counted, so that there are never more tallies than classes.
    """
    found: dict[tuple[str, str | None, str | None], list[int]] = {}
    columns = [table[name].to_pylist() for name in ("fact", "split", "label", "count", *encoding.SUMS)]
    for fact, split, label, *numbers in zip(*columns, strict=True):
        known = label is not None or label_of(task) is None
        key = (fact, split, label) if fact else ("labelled" if known else "unlabelled", split, None)
        found[key] = [one + other for one, other in zip(found.get(key, [0] * len(numbers)), numbers, strict=True)]
        for name in [] if fact else encoding.classes(task, label):
            found.setdefault(("class", split, name), [0] * len(numbers))[0] += 1
    rows = [dict(zip(COUNTED.names, [*key, *numbers], strict=True)) for key, numbers in found.items()]
    return pa.Table.from_pylist(rows, schema=COUNTED)


def select(table: pa.Table, split: str, labels: tuple[str, ...], task: TaskConfig, schema: pa.Schema) -> pa.Table:
    """Rows of one split as they are stored, with these columns."""
    here = [
        i
        for i, (s, fact) in enumerate(zip(table["split"].to_pylist(), table["fact"].to_pylist(), strict=True))
        if s == split and fact is None
    ]
    rows = table.take(pa.array(here, pa.int64()))
    made = encoding.label_columns(task, rows["label"].to_pylist(), labels, rows["scored"].to_pylist())
    return pa.table([made[name] if name in made else rows[name] for name in schema.names], schema=schema)


@functools.lru_cache(maxsize=1)
def _tokenizers(reference: ray.ObjectRef[Any]) -> Any:
    """Unpacked once a process. One thread: Ray runs as many processes as there are CPUs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return ray.get(reference)
