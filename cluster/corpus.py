"""From a source to a corpus in the storage: read, identify, drop duplicates, split, tokenise, write parts. Ray Data does the work.

    units -> read, normalise, id -> ranges of ids -> one row a text, in order -> token ids -> count -> parts of a fixed number of rows

What is dropped on the way travels beside the rows as tallies (`fact`, `count`), so a task that Ray repeats is never counted twice. The
parts do not depend on the number of CPUs, on the order of files or on how rows are spread over them: all is decided by a row's content.
"""

from __future__ import annotations

import contextlib
import copy
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
from ray.data.context import ShuffleStrategy
from ray.exceptions import RayError

from cluster import sources
from cluster.config import CorpusConfig
from cluster.kinds import label_of
from cluster.reading import Unit
from cluster.session import unwrap
from cluster.shaping import PLACES, SPLITS, Tallies, count_block, encode_block, read_bundle, select
from distillation import encoding
from distillation.config import Embedding, ImageClassification, Regression, TaskConfig
from distillation.errors import InputError
from distillation.models import tokenizer_fingerprint
from distillation.storage import Storage
from distillation.store import FileRecord, Manifest, commit, find, write_part
from distillation.store import fingerprint as fingerprint_of

FACTS = (
    "rows_read", "empty", "duplicates", "conflicting", "conflicting_dropped", "unlabelled_dropped", "truncated", "too_long", "hidden",
    "nothing_scored", "split", "pieces", "rests",
)  # fmt: skip
DROPPED = ("empty", "duplicates", "conflicting_dropped", "unlabelled_dropped", "too_long", "nothing_scored")
BLOCK_BYTES = 8 << 20
"""Of what passes between tasks: small, so that a task needs little memory."""
MOST_PARTS = 16_384
"""That are written as large as they are asked for."""
LEAST_RANGES = 4
"""Of ids: some work for every CPU also where the corpus is small."""


def corpus_fingerprint(corpus: CorpusConfig, task: TaskConfig, tokenizer_dir: Path | None) -> tuple[str, dict[str, Any]]:
    """Fingerprint of a corpus and everything it is made from. Reads no rows; raises InputError for a source that cannot be read.

    tokenizer_dir: what lies there is left out of account for images.
    """
    shares = {name: share for name, share in (("validation", corpus.validation), ("test", corpus.test)) if isinstance(share, float)}
    made_from = {
        "source": sources.describe(corpus, task),
        "task": task.model_dump(mode="json"),
        "split": {"shares": shares, "labelled": corpus.labelled, "part_rows": corpus.part_rows},
        "encoding": encoding.VERSION,
        "tokenizer": _tokenizer_print(task, tokenizer_dir),
    }
    return fingerprint_of(made_from), made_from


def reading_fingerprint(corpus: str, made_from: Mapping[str, Any], reader_dir: Path) -> tuple[str, dict[str, Any]]:
    """Of the reading of a corpus by the tokenizer in a folder, see `prepare`. made_from: what the corpus is made from."""
    reader = {"reads": corpus, "reader": tokenizer_fingerprint(reader_dir), "reading": encoding.READINGS}
    return fingerprint_of({**made_from, **reader}), {**made_from, **reader}


def prepare(
    corpus: CorpusConfig,
    task: TaskConfig,
    tokenizer_dir: Path | None,
    storage: Storage,
    *,
    fingerprint: str,
    made_from: Mapping[str, Any],
    progress: Callable[[str], None] = print,
    nodes: Mapping[str, str] | None = None,
    reader_dir: Path | None = None,
) -> Manifest:
    """Write the corpus to corpora/<fingerprint> unless it is there already, on the nodes with these labels. Ray must be initialised.

    Facts of the manifest, in rows: rows_read + pieces = the sum of `DROPPED` + the splits' rows. `conflicting` are texts whose copies carry
    different labels: unlabelled in train (of an embedding task everywhere), else dropped. `hidden` are labels that `corpus.labelled` takes
    away; truncated rows are kept. Of language models `split` are texts that became several rows, `pieces` the rows beyond the first of
    each, `rests` the ends of texts in which nothing was left to score. `nothing_scored` are texts without any row.
    For each split `labelled` and `unlabelled` count rows, `scored` and `labelled_positions` positions, `label_counts` labels by name.

    reader_dir: of a tokenizer in whose tokens the rows are written instead, which makes a reading of the corpus `made_from["reads"]`: the
    same rows in the same parts, so that answers to the one belong to the other, too (`encoding.read_again`).

    Raises InputError naming file and row, or the counts of what is left; or if a tokenizer does not serve the task.
    """
    folder = f"corpora/{fingerprint}"
    if (existing := find(storage, folder)) is not None:
        return existing
    shares = (_share(corpus.validation), _share(corpus.test))
    tokenizers, token_types = _load_tokenizers(task, tokenizer_dir, reader_dir)
    schema = encoding.fields(task, token_types, reader_dir is not None)
    with _settings(nodes):
        rows = _encoded_rows(sources.units(corpus, task), task, shares, corpus.labelled, tokenizers, schema)
        tallies, sums = _count(rows, task)
        facts = _facts(tallies, sums)
        labels = _labels(tallies, facts, task)
        progress(f"corpus: {facts['rows_read']:,} rows read, {sum(sums['length'].values()):,} tokens, {len(labels)} labels")
        each = rows_of_a_part(corpus.part_rows, sum(facts[name][split] for name in ("labelled", "unlabelled") for split in SPLITS), task)
        parts = {split: _write_split(rows, split, labels, each, storage, folder, task, schema) for split in SPLITS}
    for split, records in parts.items():
        assert all(record.rows == each for record in records[:-1]), "parts of a fixed number of rows"
        assert len({record.name for record in records}) == len(records), "each part has a name of its own"
        assert sum(record.rows for record in records) == facts["labelled"][split] + facts["unlabelled"][split], "every row is written once"
    facts["labels"] = list(labels)
    facts["tokenizer"] = _tokenizer_print(task, reader_dir or tokenizer_dir)
    facts["columns"] = {field.name: str(field.type) for field in schema}
    if reader_dir is not None:
        _require_same_rows(storage, made_from["reads"], parts)
        facts["reads"] = made_from["reads"]
    splits = {split: tuple(records) for split, records in parts.items()}
    manifest = Manifest(kind="corpus", fingerprint=fingerprint, made_from=dict(made_from), splits=splits, facts=facts)
    progress("corpus: " + ", ".join(f"{split} {manifest.rows(split):,} rows in {len(splits[split])} parts" for split in SPLITS))
    return commit(storage, folder, manifest)


def rows_of_a_part(asked: int, rows: int, task: TaskConfig) -> int:
    """`asked`, doubled until there are no more than 16,384 parts times the factor: their number grows as the root of the rows.

    Everything that the driver does once a part would else grow with the rows. Of images a part stays small enough for one Arrow column.
    """
    factor = 1
    while rows > asked * MOST_PARTS * factor**2 and not isinstance(task, ImageClassification):
        factor *= 2
    return asked * factor


# ------------------------------------------------------------------------------------------------------------------- ray


@contextlib.contextmanager
def _settings(labels: Mapping[str, str] | None = None) -> Iterator[None]:
    """How Ray Data runs here: in order, quiet, in small pieces (a task of a shuffle takes 1 GB else); our errors come out as themselves."""
    context, logger = DataContext.get_current(), logging.getLogger("ray.data")
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "shuffle_input_batch_bytes": 4 * BLOCK_BYTES,
        "target_max_block_size": BLOCK_BYTES,
        # The newer one heeds no labels in Ray 2.60.
        "shuffle_strategy": ShuffleStrategy.SORT_SHUFFLE_PULL_BASED if labels else context.shuffle_strategy,
    }
    before, options, level = {name: getattr(context, name) for name in wanted}, context.execution_options, logger.level
    for name, value in wanted.items():
        setattr(context, name, value)
    context.execution_options = copy.deepcopy(options)
    context.execution_options.preserve_order = True
    context.execution_options.label_selector = dict(labels) if labels else None
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
        context.execution_options = options
        logger.setLevel(level)


def _encoded_rows(
    units: Sequence[Unit],
    task: TaskConfig,
    shares: tuple[float, float],
    labelled: float,
    tokenizers: ray.ObjectRef[Any] | None,
    schema: pa.Schema,
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
    settings = {"task": task, "labelled": labelled, "tokenizers": tokenizers, "stored": schema}
    return (
        ray.data.from_arrow_refs(rows.to_arrow_refs())
        .sort("place", boundaries=[PLACES * i // ranges for i in range(1, ranges + 1)])
        .map_batches(encode_block, batch_size=None, batch_format="pyarrow", fn_kwargs=settings)
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


def _count(rows: Dataset, task: TaskConfig) -> tuple[Tallies, dict[str, Counter[str]]]:
    """Tallies of all blocks, see `count_block`, and the sums of `encoding.SUMS` over each split."""
    tallies: Tallies = Counter()
    sums: dict[str, Counter[str]] = {name: Counter() for name in encoding.SUMS}
    for row in rows.map_batches(count_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"task": task}).take_all():
        tallies[row["fact"], row["split"], row["label"]] += row["count"]
        for name in encoding.SUMS:
            sums[name][row["split"] or ""] += row[name]
    return tallies, sums


def _write_split(
    rows: Dataset, split: str, labels: tuple[str, ...], part_rows: int, storage: Storage, folder: str, task: TaskConfig, schema: pa.Schema
) -> list[FileRecord]:
    settings = {"split": split, "task": task, "schema": schema}
    written = (
        rows.map_batches(select, batch_size=None, batch_format="pyarrow", fn_kwargs={**settings, "labels": labels})
        .repartition(target_num_rows_per_block=part_rows, strict=True)
        .map_batches(_write_block, batch_size=None, batch_format="pyarrow", fn_kwargs={**settings, "storage": storage, "folder": folder})
    )
    return sorted((FileRecord.model_validate_json(row["record"]) for row in written.take_all()), key=lambda record: record.name)


def _write_block(table: pa.Table, split: str, task: TaskConfig, schema: pa.Schema, storage: Storage, folder: str) -> dict[str, list[str]]:
    if table.num_rows == 0:
        return {"record": []}
    # Taking all rows copies them into buffers of their own: a view on a larger block would be written with other bytes.
    rows = table.select(schema.names).cast(schema).take(pa.array(range(table.num_rows), pa.int64())).combine_chunks()
    # Rows of one text differ only in the last digits of their ids, and a long text can fill several parts.
    digits = 32 if label_of(task) is None else 12
    name = f"part-{rows['id'][0].as_py()[:digits]}-{split}"
    record = write_part(storage, folder, name, rows, tokens=sum(rows["length"].to_pylist()))
    return {"record": [record.model_dump_json()]}


def _tokenizer_print(task: TaskConfig, folder: Path | None) -> str | None:
    if isinstance(task, ImageClassification):
        return None
    assert folder is not None, "texts need a tokenizer"
    return tokenizer_fingerprint(folder)


def _load_tokenizers(task: TaskConfig, folder: Path | None, reader: Path | None) -> tuple[ray.ObjectRef[Any] | None, bool]:
    """The tokenizer and the reader in the object store: workers on other machines may not see the folders. And whether there are token_type_ids.

    Nothing for images. Raises InputError if one cannot be loaded or does not serve the task.
    """
    if isinstance(task, ImageClassification):
        return None, False
    assert folder is not None, "texts need a tokenizer"
    pair = _load_tokenizer(task, folder), None if reader is None else _load_tokenizer(task, reader)
    return ray.put(pair), encoding.makes_token_types(task, pair[1] or pair[0])


def _load_tokenizer(task: TaskConfig, folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "DST-3445", "tokenizer cannot be loaded", where=str(folder), expected="files as save_pretrained writes them",
            found=(str(error).splitlines() or [type(error).__name__])[0],
        ) from error  # fmt: skip
    encoding.check(task, tokenizer, str(folder))
    return tokenizer


def _require_same_rows(storage: Storage, corpus: str, parts: Mapping[str, Sequence[FileRecord]]) -> None:
    """Raise InputError unless these are the parts of a corpus, as far as their names and numbers of rows say."""
    first = find(storage, f"corpora/{corpus}")
    assert first is not None, "the corpus is prepared before its readings"
    for split, records in parts.items():
        theirs, mine = ([(record.name, record.rows) for record in each] for each in (first.splits[split], records))
        if theirs != mine:
            raise InputError(
                "DST-3113", "sources have changed since the corpus was made", where=f"corpora/{corpus}, split {split}",
                expected=f"{sum(rows for _, rows in theirs)} rows in {len(theirs)} parts", found=f"{sum(rows for _, rows in mine)} in {len(mine)}",
                do="Run the job again: it reads them anew",
            )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- facts


def _share(value: str | tuple[str, ...] | float) -> float:
    return value if isinstance(value, float) else 0.0


def _facts(tallies: Tallies, sums: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Counts for the manifest."""
    totals: Counter[str] = Counter()
    for (fact, _, _), count in tallies.items():
        totals[fact] += count
    counts: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for fact, split, label in sorted(tallies, key=str):
        if fact == "class":
            counts[str(split)][str(label)] = tallies[fact, split, label]
    return {
        **{name: totals[name] for name in FACTS},
        "label_counts": counts,
        **{name: {split: tallies[name, split, None] for split in SPLITS} for name in ("labelled", "unlabelled")},
        "scored": {split: sums["scored"][split] for split in SPLITS},
        "labelled_positions": {split: sums["labelled"][split] for split in SPLITS},
    }


def _labels(tallies: Tallies, facts: Mapping[str, Any], task: TaskConfig) -> tuple[str, ...]:
    """Names of the labels in order. Raises InputError for an empty split, and for labels that training would not know."""
    left = {split: facts["labelled"][split] + facts["unlabelled"][split] for split in SPLITS}
    if missing := [split for split in SPLITS if not left[split]]:
        dropped = {name: facts[name] for name in DROPPED if facts[name]}
        raise InputError(
            "DST-3440", f"split {', '.join(missing)} is empty", where="corpus", expected="at least one row in each split",
            found=f"{', '.join(f'{split} {n}' for split, n in left.items())} of {facts['rows_read']} rows read"
            + (f", without {', '.join(f'{n} {name}' for name, n in dropped.items())}" if dropped else ""),
            do="Give more rows, or larger shares of validation and test",
        )  # fmt: skip
    if label_of(task) is None or isinstance(task, Regression):
        return ()
    if task.labels is not None:
        return tuple(task.labels)
    trained = {label for (fact, split, label) in tallies if fact in ("class", "hidden_label") and split == "train" and label is not None}
    if isinstance(task, Embedding):  # its labels only judge the result: nobody has to know them all
        return _in_order(trained.union(*facts["label_counts"].values()))
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
    return _in_order(trained)


def _in_order(names: set[str]) -> tuple[str, ...]:
    # Numbers in their own order: 2 before 10, as a classifier counts them.
    return tuple(sorted(names, key=lambda name: (0, int(name), name) if name.isdecimal() else (1, 0, name)))
