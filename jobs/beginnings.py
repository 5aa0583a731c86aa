"""The folder of a teacher that begins with random weights: made once from the corpus's sources, and kept in the storage."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from cluster import sources
from distillation import beginnings, store
from distillation.config import ImageClassification, NewModel
from distillation.fit import model_folder
from distillation.storage import Storage
from jobs.config import JobConfig

TEXT_CHARACTERS = 50_000_000
"""Of the training texts that a tokenizer is made from, at most."""


def folder_of(config: NewModel, job: JobConfig) -> Path:
    """Local folder of the model; made now if it is not in the storage. Raises what reading the corpus's sources raises."""
    beginnings.require_suits(config, job.task)
    images = isinstance(job.task, ImageClassification)
    made_from = {
        "model": config.model_dump(mode="json"), "task": job.task.model_dump(mode="json"),
        "texts": None if images else sources.describe(job.corpus, job.task),
    }  # fmt: skip
    fingerprint, storage = store.fingerprint(made_from), Storage(job.cluster.storage)
    if store.find(storage, f"bases/{fingerprint}") is None:
        with tempfile.TemporaryDirectory(prefix="distillery-") as name:
            beginnings.make(config, job.task, () if images else _texts(job), Path(name))
            store.commit_folder(storage, f"bases/{fingerprint}", Path(name), "model", fingerprint, made_from, {})
    return model_folder(storage, f"bases/{fingerprint}")


def _texts(job: JobConfig) -> Iterator[str]:
    """Training texts; where the splits are not given, those of all rows, as a split is decided by what a row becomes."""
    left = TEXT_CHARACTERS
    for unit in sources.units(job.corpus, job.task):
        if unit.split not in (None, "train"):
            continue
        for table in sources.read(unit, job.task):
            for text in table.column("text").to_pylist():
                if text:
                    yield text
                    left -= len(text)
            if left <= 0:
                return
