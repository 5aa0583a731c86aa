"""Real images that every machine has: the handwritten digits of scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.columns import row_of
from cluster.reading import Row, Unit, tables
from distillation.config import ImageClassification, TaskConfig

SIZE = 8
ROWS = 1797
READER_VERSION = 1
"""Of the rules below: what they yield is part of a corpus's fingerprint."""


def describe() -> dict[str, Any]:
    """A hash of the images and their labels."""
    images, labels = _load()
    return {"reader": READER_VERSION, "data": hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:32]}


def units() -> list[Unit]:
    return [Unit("digits", "digits", None, stop=ROWS, bytes=ROWS * SIZE * SIZE, rows=ROWS)]


def read(unit: Unit, task: TaskConfig) -> Iterator[pa.Table]:
    """Tables of the rows of a unit; the label is the digit."""
    return tables(_rows(unit, task), None, task)


def _rows(unit: Unit, task: TaskConfig) -> Iterator[Row]:
    assert isinstance(task, ImageClassification), "sources.require_serves"
    images, labels = _load()
    column = task.label
    for row in range(unit.start, unit.stop):
        values = {task.image: images[row].tolist(), column: int(labels[row])}
        yield row_of(task, values, f"digits: row {row + 1}")


def _load() -> tuple[np.ndarray, np.ndarray]:
    """Images [rows, 8, 8] from 0 to 255, and digits [rows], both uint8. They come as 0 to 16."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return np.rint(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.uint8)
