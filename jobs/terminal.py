"""The console all commands print on, and tables that belong to no stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from cluster.doctor import Check


def console() -> Console:
    """Colours and live lines on a terminal; 120 columns of plain text elsewhere, so that tables in a log are not cut."""
    return Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)), highlight=False)


def checks_table(checks: Sequence[Check]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    colour = {"ok": "green", "warn": "yellow", "fail": "red"}
    for one in checks:
        table.add_row(f"[{colour[one.state]}]{one.state}[/]", one.name, one.found, one.do)
    return table
