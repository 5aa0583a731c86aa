"""Points of learning curves: what happened in the steps since the one before."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation.checkpoints import Ranks
from distillation.config import LossConfig
from distillation.losses import describe
from distillation.storage import Storage
from distillation.store import Manifest, intact

FILE = "history.json"
"""Of a model: its learning curves, in a file of their own, as there can be more of them than of everything else in the manifest."""


def write(folder: Path, points: list[tuple[int, dict[str, float]]]) -> None:
    (folder / FILE).write_text(json.dumps(points), encoding="utf-8")


def read(storage: Storage, folder: str, manifest: Manifest) -> list[tuple[int, dict[str, float]]]:
    """Points (step, metrics) of a committed model's curves. Raises InputError where their file is missing or altered."""
    records = [record for record in manifest.files if record.name == FILE]
    if not records:  # of a release that kept them in the manifest
        points: list[tuple[int, dict[str, float]]] = manifest.facts.get("history", [])
        return points
    (path,) = intact(storage, folder, records)
    return [(step, metrics) for step, metrics in json.loads(path.read_text(encoding="utf-8"))]


class Curve:
    """Adds up what happened between two points of a learning curve."""

    def __init__(self, losses: Mapping[str, LossConfig], session: Ranks) -> None:
        self._losses, self._session = losses, session
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(losses, 0)
        self._rows = self._tokens = 0
        self._clock = time.perf_counter()

    def add(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], rows: int, tokens: int) -> None:
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in sums.items()}
        self._counts = {name: self._counts[name] + count for name, count in counts.items()}
        self._rows, self._tokens = self._rows + rows, self._tokens + tokens

    def pause(self, seconds: float) -> None:
        """Leave out time that was spent on something else."""
        self._clock += seconds

    def take(self, squares: Mapping[str, Tensor], losses: Mapping[str, Any]) -> dict[str, float]:
        """The point, over all ranks; starts the next one. squares: of the gradient of each term in the last step (`gradient_squares`).

        losses: the terms as they are now, if their weights change.
        """
        stacked = torch.stack([values[name] for values in (self._sums, squares) for name in self._losses]).double()
        found = self._session.all_reduce(stacked).tolist()
        seconds, terms = time.perf_counter() - self._clock, len(self._losses)
        point = describe(losses, dict(zip(self._losses, found[:terms], strict=True)), self._counts)
        point |= {f"train/gradient/{name}": math.sqrt(square) for name, square in zip(self._losses, found[terms:], strict=True)}
        point |= {"perf/rows_per_second": self._rows / seconds, "perf/tokens_per_second": self._tokens / seconds}
        self.__init__(self._losses, self._session)  # type: ignore[misc]
        return point
