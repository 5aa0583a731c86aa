"""What the tasks of corpus preparation do to a block of rows. A block holds rows and, beside them, tallies of what was dropped."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import ray

from cluster import sources
from cluster.reading import Unit
from distillation.config import TaskConfig

SPLITS = ("train", "validation", "test")
"""From weak to strong: a text that several splits name belongs to the last of them."""

PART_SCHEMA = pa.schema(
    [("id", pa.string()), ("text", pa.string()), ("label", pa.int32()), ("length", pa.int32()), ("input_ids", pa.list_(pa.int32()))]
)
PLACES = 1 << 60
"""A place is the first 15 digits of an id as a number below this: what Ray Data sorts by."""
_TALLY = [("label", pa.string()), ("split", pa.string()), ("fact", pa.string()), ("count", pa.int64())]
READ = pa.schema([("place", pa.int64()), ("id", pa.string()), ("text", pa.string()), *_TALLY])
ENCODED = pa.schema([("id", pa.string()), ("text", pa.string()), ("length", pa.int32()), ("input_ids", pa.list_(pa.int32())), *_TALLY])

ENCODE_ROWS = 1024

Tallies = Counter[tuple[str, str | None, str | None]]
"""(fact, split, label) -> rows."""


def read_bundle(batch: Mapping[str, Any], task: TaskConfig, shares: tuple[float, float]) -> Iterator[pa.Table]:
    yield READ.empty_table()
    for unit in (Unit(**fields) for fields in json.loads(batch["units"][0])):
        for table in sources.read(unit, task):
            yield identify(table, shares)


def identify(table: pa.Table, shares: tuple[float, float]) -> pa.Table:
    """Normalised texts with id and split; empty ones become a tally."""
    texts = [unicodedata.normalize("NFC", text).strip() for text in table["text"].to_pylist()]
    keep = [i for i, text in enumerate(texts) if text]
    ids = [hashlib.sha256(texts[i].encode()).hexdigest()[:32] for i in keep]
    splits, labels = table["split"].to_pylist(), table["label"].to_pylist()
    kept = {
        "place": [int(id_[:15], 16) for id_ in ids], "id": ids, "text": [texts[i] for i in keep], "label": [labels[i] for i in keep],
        "split": [split_of(id_, splits[i], shares) for id_, i in zip(ids, keep, strict=True)],
        "fact": [None] * len(keep), "count": [1] * len(keep),
    }  # fmt: skip
    tallies: Tallies = Counter({("rows_read", None, None): len(texts), ("empty", None, None): len(texts) - len(keep)})
    return pa.concat_tables([pa.table(kept, schema=READ), _tally_table(tallies, READ)])


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


def encode_block(table: pa.Table, task: TaskConfig, labelled: float, tokenizer: ray.ObjectRef[Any]) -> Iterator[pa.Table]:
    """One row for each text of a range of ids, in their order, with token ids."""
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
        label, split = settle([labels[i] for i in members], [splits[i] for i in members], tallies)
        if split is not None and label is not None and split == "train" and fraction("labelled", id_) >= labelled:
            tallies["hidden", split, label] += 1
            label = None
        if split is not None:
            kept.append((members[0], label, split))
    encode = _tokenizer(tokenizer)
    for start in range(0, len(kept), ENCODE_ROWS):
        rows = kept[start : start + ENCODE_ROWS]
        part = table.select(["id", "text"]).take(pa.array([i for i, _, _ in rows], pa.int64()))
        yield _encode(part, [label for _, label, _ in rows], [split for _, _, split in rows], task, encode, tallies)
    yield _tally_table(tallies, ENCODED)


def settle(labels: Sequence[str | None], splits: Sequence[str], tallies: Tallies) -> tuple[str | None, str | None]:
    """Label and split of a text from all its copies; no split if it is dropped. A label beats none; two different ones are none."""
    split = max(splits, key=SPLITS.index)
    different = {label for label in labels if label is not None}
    tallies["duplicates", None, None] += len(labels) - 1
    if len(different) > 1:
        tallies["conflicting", split, None] += 1
        if split != "train":
            tallies["conflicting_dropped", split, None] += 1
            return None, None
        return None, split
    if not different and split != "train":
        tallies["unlabelled_dropped", split, None] += 1
        return None, None
    return next(iter(different), None), split


def _encode(table: pa.Table, labels: list[str | None], splits: list[str], task: TaskConfig, tokenizer: Any, tallies: Tallies) -> pa.Table:
    texts = table["text"].to_pylist()
    ids = tokenizer(texts, verbose=False)["input_ids"]
    long = [i for i, row in enumerate(ids) if len(row) > task.max_length]
    if task.too_long == "truncate" and long:
        shortened = tokenizer([texts[i] for i in long], truncation=True, max_length=task.max_length)["input_ids"]
        for i, row in zip(long, shortened, strict=True):
            ids[i] = row
            tallies["truncated", splits[i], None] += 1
        long = []
    for i in long:
        tallies["too_long", splits[i], None] += 1
        ids[i] = []
    columns = {
        "id": table["id"], "text": table["text"], "length": pa.array([len(row) for row in ids], pa.int32()),
        "input_ids": pa.array(ids, pa.list_(pa.int32())), "label": pa.array(labels, pa.string()), "split": pa.array(splits, pa.string()),
        "fact": pa.nulls(len(ids), pa.string()), "count": pa.array([1] * len(ids), pa.int64()),
    }  # fmt: skip
    encoded = pa.table(columns, schema=ENCODED)
    return encoded.take(pa.array(sorted(set(range(len(ids))).difference(long)), pa.int64())) if long else encoded


def _tally_table(tallies: Tallies, schema: pa.Schema) -> pa.Table:
    """Tallies as rows whose id is ""."""
    entries: list[dict[str, Any]] = [
        {"place": 0, "id": "", "text": "", "length": 0, "input_ids": [], "label": label, "split": split, "fact": fact, "count": count}
        for (fact, split, label), count in tallies.items()
        if count
    ]
    return pa.Table.from_pylist([{name: entry[name] for name in schema.names} for entry in entries], schema=schema)


def count_block(table: pa.Table) -> pa.Table:
    kinds = pa.array(
        [
            fact or ("unlabelled" if label is None else "kept")
            for fact, label in zip(*(table[c].to_pylist() for c in ("fact", "label")), strict=True)
        ],
        pa.string(),
    )
    counted = pa.table({"fact": kinds, **{name: table[name] for name in ("split", "label", "count", "length")}})
    groups = counted.group_by(["fact", "split", "label"]).aggregate([("count", "sum"), ("length", "sum")])
    return groups.rename_columns({"count_sum": "count", "length_sum": "tokens"})


def select(table: pa.Table, split: str, labels: tuple[str, ...]) -> pa.Table:
    """Rows of one split as they are stored."""
    here = [
        i
        for i, (s, fact) in enumerate(zip(table["split"].to_pylist(), table["fact"].to_pylist(), strict=True))
        if s == split and fact is None
    ]
    rows = table.take(pa.array(here, pa.int64()))
    number: dict[str | None, int] = {None: -1, **{label: i for i, label in enumerate(labels)}}
    label = pa.array([number[name] for name in rows["label"].to_pylist()], pa.int32())
    return pa.table({**{name: rows[name] for name in PART_SCHEMA.names if name != "label"}, "label": label}).select(PART_SCHEMA.names)


@functools.lru_cache(maxsize=1)
def _tokenizer(reference: ray.ObjectRef[Any]) -> Any:
    """The tokenizer, unpacked once a process. One thread: Ray runs as many processes as there are CPUs."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return ray.get(reference)
