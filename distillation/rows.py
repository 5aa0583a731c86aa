"""Rows of one split with what teachers said about them, memory-mapped, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from distillation import store
from distillation.columns import Columns
from distillation.config import SampledLogits, TargetsConfig, TopKLogits, Unit
from distillation.errors import InputError
from distillation.parts import numbers, total
from distillation.signals import Batch, TeacherSignal
from distillation.storage import Storage
from distillation.tasks import Task

QUANTUM = 8.0
"""Steps of a nat in which log-probabilities are kept as uint8."""


class Targets:
    """What one teacher said about the rows of a split, out of its store."""

    def __init__(self, columns: Columns, config: TargetsConfig) -> None:
        self._columns, self.config = columns, config
        self.layers = config.features.layers if config.features else ()

    def __len__(self) -> int:
        return len(self._columns)

    def signal(self, rows: np.ndarray) -> TeacherSignal:
        logits, features, there = self.config.logits, self.config.features, set(self._columns.schema.names)
        found: dict[str, Any] = {name: self._read(name, rows) for name in ("logits", "ids", "log_p", "weights", "pooled") if name in there}
        if isinstance(logits, TopKLogits):
            found |= {"ids": found["ids"].long(), "temperatures": logits.stored_temperatures}
            found["log_p"] = found["log_p"] / -QUANTUM if logits.dtype == "uint8" else found["log_p"].float()
            if logits.stored_temperatures:
                found["normalisers"] = self._read("normalisers", rows)
        if isinstance(logits, SampledLogits):
            found |= {"ids": found["ids"].long(), "temperatures": (logits.temperature,), "weights": found["weights"] / logits.draws}
        if "label_log_p" in there:
            found["label_log_p"] = self._read("label_log_p", rows)[:, 0].float()
        if features and features.layers:
            found["hidden"] = torch.stack([self._read(f"hidden_{layer}", rows) for layer in features.layers], dim=1)
        if features and features.relations is not None:
            found["relations"] = tuple(self._read(f"relation_{name}", rows).float() for name in ("query", "key", "value"))
        return TeacherSignal(**found, layers=self.layers)

    def _read(self, name: str, rows: np.ndarray) -> torch.Tensor:
        values = self._columns.positions(name, rows)
        return torch.from_numpy(values.astype(np.int32) if values.dtype == np.uint16 else values)


class Rows:
    """A split of a corpus, row-aligned with target stores. Reads are views on the files: every process of a node shares the pages."""

    def __init__(self, corpus: Columns, targets: Mapping[str, Targets], task: Task, table: np.ndarray | None = None) -> None:
        """table: new id of every token for a model with a trimmed vocabulary, -1 for those it has not; None: ids as they are."""
        self._corpus, self.targets, self.task, self._table = corpus, dict(targets), task, table
        self.lengths = corpus.whole("length")
        self.scored, self._labelled = corpus.whole("scored"), corpus.whole("labelled")
        self.other_places = "aligned" in corpus.schema.names
        """Whether they are a language model's in other tokens than the teacher's."""
        self._compared = corpus.whole("aligned") if self.other_places else self.scored
        lists = {field.name: pa.types.is_list(field.type) for field in corpus.schema if field.name not in ("id", "text", "length")}
        self._ragged = [name for name, ragged in lists.items() if ragged]
        self._plain = {name: corpus.whole(name) for name, ragged in lists.items() if not ragged} | {"length": self.lengths}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def offsets(self) -> np.ndarray:
        """First row of each part, and the end. [parts + 1]"""
        return self._corpus.offsets

    @property
    def labelled(self) -> np.ndarray:
        """Numbers of the rows that have a label."""
        return np.flatnonzero(self._labelled > 0)

    def count(self, rows: np.ndarray, unit: Unit) -> int:
        """How much of a unit there is in these rows; of positions those that a teacher says something about."""
        each = {"labels": self._labelled, "positions": self._compared, "tokens": self.lengths}
        return len(rows) if unit == "rows" else int(each[unit][rows].sum())

    def known(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits over the vocabulary of the corpus those that the model of these rows has. [N, C]"""
        if self._table is None or not self.task.speaks:
            return logits
        return logits[:, torch.from_numpy(np.flatnonzero(self._table >= 0)).to(logits.device)]

    def ids(self, rows: np.ndarray) -> list[str]:
        return self._corpus.strings("id", rows)

    def texts(self, rows: np.ndarray) -> list[str]:
        return self._corpus.strings("text", rows)

    def batch(self, rows: np.ndarray) -> Batch:
        columns = {name: self._corpus.ragged(name, rows) for name in self._ragged} | {n: v[rows] for n, v in self._plain.items()}
        signals = {name: targets.signal(rows) for name, targets in self.targets.items()}
        if "theirs" in columns:
            signals = _aligned(signals, columns["theirs"], columns["told"])
        batch = self.task.collate(self.ids(rows), columns, signals)
        return batch if self._table is None else self.task.translate(batch, self._table)

    def used(self, size: int) -> np.ndarray:
        """How often each token occurs, also as the label of a hidden one. [size]"""
        counts = np.zeros(size, np.int64)
        for name in ("input_ids", "labels") if self.task.config.type == "masked_lm" else ("input_ids",):
            for values in self._corpus.values(name):
                counts += np.bincount(values[values >= 0], minlength=size)
        return counts


def _aligned(signals: Mapping[str, TeacherSignal], theirs: Sequence[np.ndarray], told: np.ndarray) -> dict[str, TeacherSignal]:
    """What was said about the positions of another tokenizer, at those of a reading. told: how many each row has of the other's."""
    starts = np.repeat(np.cumsum(told, dtype=np.int64) - told, [len(row) for row in theirs])
    flat = np.concatenate(theirs).astype(np.int64)
    index = torch.from_numpy(np.where(flat < 0, -1, starts + flat))
    return {name: signal.at(index) for name, signal in signals.items()}


class Split:
    """A split of a corpus and what teachers said about it: known from the manifests, read where it is opened."""

    def __init__(
        self, storage: Storage, corpus: str, targets: Mapping[str, str], split: str, task: Task, table: np.ndarray | None = None
    ) -> None:  # fmt: skip
        """targets: folder of the store of each teacher. table: as of `Rows`.

        Raises InputError where an artifact is missing or they do not belong together.
        """
        self.task, self._storage, self._table = task, storage, table
        manifest = store.require(storage, corpus, "corpus")
        self.parts, self._split, self._facts = manifest.splits.get(split, ()), split, manifest.facts
        self._folders = {"": (corpus, self.parts)}
        self.said: dict[str, TargetsConfig] = {}
        """What each teacher was asked for."""
        for name, folder in targets.items():
            its = store.require(storage, folder, "targets")
            # Of a reading, what was said about the corpus that it reads.
            answered, parts = manifest.facts.get("reads", manifest.fingerprint), its.splits.get(split, ())
            same = np.array_equal(numbers(parts, "rows"), numbers(self.parts, "rows"))
            if its.facts["corpus"] != answered or not same:
                raise InputError(
                    "DST-3110", "targets belong to another corpus", where=storage.path(folder), expected=answered,
                    found=f"{its.facts['corpus']}{'' if same else ', in other parts'}", do="Run `distill teach` again",
                )  # fmt: skip
            self._folders[name], self.said[name] = (folder, parts), TargetsConfig.model_validate(its.facts["targets"])

    def open(self, parts: Sequence[int] | None = None) -> Rows:
        """Rows of these parts, one part after the other, or of all; every file is checked. Raises InputError where one is missing or altered."""
        columns = {}
        for name, (folder, records) in self._folders.items():
            chosen = records if parts is None else [records[part] for part in parts]
            columns[name] = Columns(store.intact(self._storage, folder, chosen))
        corpus = columns.pop("")
        return Rows(corpus, {name: Targets(its, self.said[name]) for name, its in columns.items()}, self.task, self._table)

    @property
    def labelled_share(self) -> float:
        """How many of its rows have a label, in [0, 1]."""
        labelled: int = self._facts["labelled"][self._split]
        return labelled / max(1, total(self.parts, "rows"))

    @cached_property
    def first(self) -> Rows:
        """Its first part, without what was said about it. Parts are in the order of ids, which are hashes: it is a sample like any other."""
        folder, records = self._folders[""]
        return Rows(Columns(store.intact(self._storage, folder, records[:1])), {}, self.task, self._table)

    @cached_property
    def whole(self) -> Rows:
        """All of it."""
        return self.open()


def open_rows(storage: Storage, corpus: str, targets: Mapping[str, str], split: str, task: Task, table: np.ndarray | None = None) -> Rows:
    """Open a whole split, see `Split`."""
    return Split(storage, corpus, targets, split, task, table).open()


def open_columns(storage: Storage, folder: str, kind: store.Kind, split: str) -> Columns:
    """Columns of one split of an artifact."""
    return Columns(store.intact(storage, folder, store.require(storage, folder, kind).splits.get(split, ())))
