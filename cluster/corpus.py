"""From a source to a corpus in the storage: read, identify, drop duplicates, split, tokenise, write parts. Ray Data does the work.

    units -> read, normalise, id -> ranges of ids -> one row a text, in order -> token ids -> count -> parts of a fixed number of rows

What is dropped on the way travels beside the rows as tallies (`fact`, `count`), so a task that Ray repeats is never counted twice. The
parts do not depend on the number of CPUs, on the order of files or on how rows are spread over them: all is decided by a row's content.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.data import DataContext, Dataset
from ray.exceptions import RayError

from cluster import sources
from cluster.config import CorpusConfig
from cluster.reading import Unit
from cluster.session import unwrap
from cluster.shaping import PART_SCHEMA, PLACES, SPLITS, Tallies, count_block, encode_block, read_bundle, select
from distillation.config import TaskConfig
from distillation.errors import InputError
from distillation.models import tokenizer_fingerprint
from distillation.storage import Storage
from distillation.store import FileRecord, Manifest, commit, find, write_part
from distillation.store import fingerprint as fingerprint_of

FACTS = ("rows_read", "empty", "duplicates", "conflicting", "conflicting_dropped", "unlabelled_dropped", "truncated", "too_long", "hidden")
BLOCK_BYTES = 8 << 20
"""Of what passes between tasks: small, so that a task needs little memory."""
LEAST_RANGES = 4
"""Of ids: some work for every CPU also where the corpus is small."""


def corpus_fingerprint(corpus: CorpusConfig, task: TaskConfig, tokenizer_dir: Path) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a corpus and everything it is made from. Reads no rows; raises InputError for a source that cannot be read."""
    shares = {name: share for name, share in (("validation", corpus.validation), ("test", corpus.test)) if isinstance(share, float)}
    made_from = {
        "source": sources.describe(corpus, task),
        "task": task.model_dump(mode="json"),
        "split": {"shares": shares, "labelled": corpus.labelled, "part_rows": corpus.part_rows},
        "tokenizer": tokenizer_fingerprint(tokenizer_dir),
    }
    return fingerprint_of(made_from), made_from


def prepare(
    corpus: CorpusConfig,
    task: TaskConfig,
    tokenizer_dir: Path,
    storage: Storage,
    *,
    fingerprint: str,
    made_from: Mapping[str, Any],
    progress: Callable[[str], None] = print,
) -> Manifest:
    """Write the corpus to corpora/<fingerprint> unless it is there already. Ray must be initialised.

    Facts of the manifest, in rows: rows_read = empty + duplicates + conflicting_dropped + unlabelled_dropped + too_long + the splits' rows.
    `conflicting` are texts whose copies carry different labels: unlabelled in train, dropped elsewhere. `hidden` are labels that
    `corpus.labelled` takes away; truncated rows are kept. Raises InputError naming file and row, or the counts of what is left.
    """
    folder = f"corpora/{fingerprint}"
    if (existing := find(storage, folder)) is not None:
        return existing
    shares = (_share(corpus.validation), _share(corpus.test))
    with _settings():
        rows = _encoded_rows(sources.units(corpus, task), task, shares, corpus.labelled, _load_tokenizer(tokenizer_dir))
        tallies, tokens = _count(rows)
        facts = _facts(tallies)
        labels = _labels(tallies, facts, task)
        progress(f"corpus: {facts['rows_read']} rows read, {sum(tokens.values())} tokens, {len(labels)} labels")
        parts = {split: _write_split(rows, split, labels, corpus.part_rows, storage, folder) for split in SPLITS}
    for split, records in parts.items():
        assert all(record.rows == corpus.part_rows for record in records[:-1]), "parts of a fixed number of rows"
        assert sum(record.rows for record in records) == facts["labelled"][split] + facts["unlabelled"][split], "every row is written once"
    facts["labels"] = list(labels)
    facts["tokenizer"] = tokenizer_fingerprint(tokenizer_dir)
    facts["columns"] = {field.name: str(field.type) for field in PART_SCHEMA}
    splits = {split: tuple(records) for split, records in parts.items()}
    manifest = Manifest(kind="corpus", fingerprint=fingerprint, made_from=dict(made_from), splits=splits, facts=facts)
    progress("corpus: " + ", ".join(f"{split} {manifest.rows(split)} rows in {len(splits[split])} parts" for split in SPLITS))
    return commit(storage, folder, manifest)


# ------------------------------------------------------------------------------------------------------------------- ray


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """How Ray Data runs here: in order, quiet, in small pieces (a task of a shuffle takes 1 GB else); our errors come out as themselves."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "shuffle_input_batch_bytes": 4 * BLOCK_BYTES,
        "target_max_block_size": BLOCK_BYTES,
    }
    before, in_order, level = {name: getattr(context, name) for name in wanted}, context.execution_options.preserve_order, logger.level
    for name, value in wanted.items():
        setattr(context, name, value)
    context.execution_options.preserve_order = True
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except RayError as error:
        if (original := unwrap(error)) is None:
            raise
        raise original from None
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        context.execution_options.preserve_order = in_order
        logger.setLevel(level)


def _encoded_rows(
    units: Sequence[Unit], task: TaskConfig, shares: tuple[float, float], labelled: float, tokenizer: ray.ObjectRef[Any]
) -> Dataset:
    """All rows of the corpus in the order of their ids, and the tallies, held in Ray's object store (on disk where it is full).

    Reading comes to an end first: only then is it known in how many ranges of ids the rows have to be cut to be small. Ids are hashes, so
    even ranges hold even shares. Ray Data would cut the output of a sort by size, through the copies of a text, so that is switched off.
    """
    bundles = [{"units": json.dumps([asdict(unit) for unit in bundle])} for bundle in _bundles(units)]
    rows = (
        ray.data.from_items(bundles, override_num_blocks=len(bundles))
        .map_batches(read_bundle, batch_size=1, fn_kwargs={"task": task, "shares": shares})
        .materialize()
    )
    ranges = max(LEAST_RANGES, math.ceil(rows.size_bytes() / BLOCK_BYTES))
    DataContext.get_current().target_max_block_size = None
    return (
        ray.data.from_arrow_refs(rows.to_arrow_refs())
        .sort("place", boundaries=[PLACES * i // ranges for i in range(1, ranges + 1)])
        .map_batches(
            encode_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"task": task, "labelled": labelled, "tokenizer": tokenizer}
        )
        .materialize()
    )


def _bundles(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Units for one task each: many small files share one, else thousands of tiny blocks have to be shuffled."""
    bundle: list[Unit] = []
    size = 0
    for unit in units:
        bundle.append(unit)
        size += unit.bytes
        if size >= BLOCK_BYTES:
            yield bundle
            bundle, size = [], 0
    if bundle or not units:
        yield bundle


def _count(rows: Dataset) -> tuple[Tallies, Counter[str]]:
    """Tallies of all blocks and tokens of each split; a kept row counts under "kept" (labelled) or "unlabelled"."""
    tallies: Tallies = Counter()
    tokens: Counter[str] = Counter()
    for row in rows.map_batches(count_block, batch_size=None, batch_format="pyarrow").take_all():
        tallies[row["fact"], row["split"], row["label"]] += row["count"]
        tokens[row["split"] or ""] += row["tokens"]
    return tallies, tokens


def _write_split(rows: Dataset, split: str, labels: tuple[str, ...], part_rows: int, storage: Storage, folder: str) -> list[FileRecord]:
    written = (
        rows.map_batches(select, batch_size=None, batch_format="pyarrow", fn_kwargs={"split": split, "labels": labels})
        .repartition(target_num_rows_per_block=part_rows, strict=True)
        .map_batches(
            _write_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"split": split, "storage": storage, "folder": folder}
        )
    )
    return sorted((FileRecord.model_validate_json(row["record"]) for row in written.take_all()), key=lambda record: record.name)


def _write_block(table: pa.Table, split: str, storage: Storage, folder: str) -> dict[str, list[str]]:
    if table.num_rows == 0:
        return {"record": []}
    # Taking all rows copies them into buffers of their own: a view on a larger block would be written with other bytes.
    rows = table.select(PART_SCHEMA.names).cast(PART_SCHEMA).take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()
    name = f"part-{rows['id'][0].as_py()[:12]}-{split}"
    record = write_part(storage, folder, name, rows, tokens=sum(rows["length"].to_pylist()))
    return {"record": [record.model_dump_json()]}


def _load_tokenizer(folder: Path) -> ray.ObjectRef[Any]:
    """The tokenizer in the object store: workers on other machines may not see the folder."""
    from transformers import AutoTokenizer

    try:
        return ray.put(AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True))
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "DST-3445", "tokenizer cannot be loaded", where=str(folder), expected="files as save_pretrained writes them",
            found=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- facts


def _share(value: str | tuple[str, ...] | float) -> float:
    return value if isinstance(value, float) else 0.0


def _facts(tallies: Tallies) -> dict[str, Any]:
    """Counts for the manifest."""
    totals: Counter[str] = Counter()
    for (fact, _, _), count in tallies.items():
        totals[fact] += count
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for fact, split, label in sorted(tallies, key=str):
        if fact == "kept":
            counts[str(split)][str(label)] = tallies[fact, split, label]
    return {
        **{name: totals[name] for name in FACTS},
        "label_counts": counts,
        "labelled": {split: sum(counts[split].values()) for split in SPLITS},
        "unlabelled": {split: tallies["unlabelled", split, None] for split in SPLITS},
    }


def _labels(tallies: Tallies, facts: Mapping[str, Any], task: TaskConfig) -> tuple[str, ...]:
    """Names of the labels in order. Raises InputError for an empty split, and for labels that training would not know."""
    left = {split: facts["labelled"][split] + facts["unlabelled"][split] for split in SPLITS}
    if missing := [split for split in SPLITS if not left[split]]:
        dropped = {n: facts[n] for n in ("empty", "duplicates", "conflicting_dropped", "unlabelled_dropped", "too_long") if facts[n]}
        raise InputError(
            "DST-3440", f"split {', '.join(missing)} is empty", where="corpus", expected="at least one row in each split",
            found=f"{', '.join(f'{split} {n}' for split, n in left.items())} of {facts['rows_read']} rows read"
            + (f", without {', '.join(f'{n} {name}' for name, n in dropped.items())}" if dropped else ""),
            do="Give more rows, or larger shares of validation and test",
        )  # fmt: skip
    if task.labels is not None:
        return task.labels
    trained = {label for (fact, split, label) in tallies if fact in ("kept", "hidden") and split == "train" and label is not None}
    for split in ("validation", "test"):
        if unknown := sorted(facts["label_counts"][split].keys() - trained):
            raise InputError(
                "DST-3441", "label does not occur in training", where=f"corpus, split {split}",
                expected=", ".join(sorted(trained)) or "none",
                found=", ".join(unknown), do="Correct the rows, or name all labels in task.labels",
            )  # fmt: skip
    if len(trained) < 2:
        raise InputError(
            "DST-3442", "too few labels", where="corpus, split train", expected="two or more different labels",
            found=", ".join(sorted(trained)) or "none", do="Check task.label, or name the labels in task.labels",
        )  # fmt: skip
    # Numbers in their own order: 2 before 10, as a classifier counts them.
    return tuple(sorted(trained, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))
