"""Rows of one split with what the teacher said about them, memory-mapped, and batches of them."""

from __future__ import annotations

import numpy as np
import torch

from distillation import store
from distillation.errors import InputError
from distillation.signals import Batch, TeacherSignal
from distillation.storage import Storage
from distillation.store import Columns, Manifest
from distillation.tasks import TextClassificationTask


class Rows:
    """A split of a corpus, row-aligned with a target store. Reads are views on the files: every process of a node shares the pages."""

    def __init__(self, corpus: Columns, targets: Columns | None, task: TextClassificationTask, layers: tuple[int, ...] = ()) -> None:
        self._corpus, self._targets, self.task, self.layers = corpus, targets, task, layers
        self.lengths = corpus.whole("length")
        self.labels = corpus.whole("label")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def labelled(self) -> np.ndarray:
        """Numbers of the rows that have a label."""
        return np.flatnonzero(self.labels >= 0)

    def ids(self, rows: np.ndarray) -> list[str]:
        return self._corpus.strings("id", rows)

    def batch(self, rows: np.ndarray) -> Batch:
        return self.task.collate(self.ids(rows), self._corpus.ragged("input_ids", rows), self.labels[rows], self._signal(rows))

    def _signal(self, rows: np.ndarray) -> TeacherSignal:
        if self._targets is None:
            return TeacherSignal()
        there = set(self._targets.schema.names)

        def read(name: str) -> torch.Tensor:
            assert self._targets is not None
            return torch.from_numpy(np.ascontiguousarray(self._targets.fixed(name, rows)))

        hidden = torch.stack([read(f"hidden_{layer}") for layer in self.layers], dim=1) if self.layers else None
        return TeacherSignal(read("logits"), hidden, self.layers, read("pooled") if "pooled" in there else None)


def open_rows(storage: Storage, corpus: str, targets: str | None, split: str, task: TextClassificationTask) -> Rows:
    """Open a split, every file checked. Raises InputError where parts are missing, altered or do not belong together."""
    manifest, columns = open_columns(storage, corpus, "corpus", split)
    if targets is None:
        return Rows(columns, None, task)
    target_manifest, target_columns = open_columns(storage, targets, "targets", split)
    if target_manifest.facts["corpus"] != manifest.fingerprint or len(target_columns) != len(columns):
        raise InputError(
            "DST-3110", "targets belong to another corpus", where=storage.path(targets), expected=manifest.fingerprint,
            found=str(target_manifest.facts["corpus"]), do="Run `distill teach` again",
        )  # fmt: skip
    return Rows(columns, target_columns, task, tuple(target_manifest.facts["layers"]))


def open_columns(storage: Storage, folder: str, kind: store.Kind, split: str) -> tuple[Manifest, Columns]:
    """Manifest and columns of one split of an artifact."""
    manifest, paths = store.open_artifact(storage, folder, kind, split)
    return manifest, Columns([paths[part.name] for part in manifest.splits.get(split, ())])
