"""A search that is driven by one process after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.driving import Driver


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    """Makes the next process that drives the search of this test; the one before it is dead by then."""
    drivers: list[Driver] = []

    def make(*args: Any, **settings: Any) -> Driver:
        if drivers:
            drivers[-1].die()
        drivers.append(Driver(tmp_path / "ledger.jsonl", *args, **settings))
        return drivers[-1]

    yield make
    drivers[-1].die()
