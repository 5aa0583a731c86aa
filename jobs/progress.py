"""What a person sees while a job runs: a heading a stage, and how far it is. A live line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

LOG_SECONDS = 15.0


class Progress:
    def __init__(self, console: Console) -> None:
        self.console = console
        self._status = console.status("") if console.is_terminal else None
        self._stage = ""
        self._last = 0.0

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Show a stage until the block ends, then how long it took."""
        started, self._last, self._stage = time.monotonic(), time.monotonic(), title
        if self._status is not None:
            self._status.update(escape(title))
            self._status.start()
        else:
            self.console.print(f"[bold]{escape(title)}[/bold]")
        try:
            yield
        finally:
            if self._status is not None:
                self._status.stop()
        self.console.print(f"[green]done[/green] {escape(title)} [dim]{time.monotonic() - started:.0f} s[/dim]")

    def pause(self) -> None:
        """Take the live line away until the next stage: something else is shown in its place."""
        if self._status is not None:
            self._status.stop()

    def found(self, title: str) -> None:
        self.console.print(f"[cyan]found[/cyan] {escape(title)}")

    def note(self, text: str) -> None:
        self.console.print(f"      [dim]{escape(text)}[/dim]", soft_wrap=True)

    def point(self, metrics: Mapping[str, float], step: int) -> None:
        """A point of a learning curve, as a line that is replaced (terminal) or printed every `LOG_SECONDS` (log).

        That workers began again is told at once.
        """
        if restarts := int(metrics.get("cluster/restarts", 0)):
            wasted = int(metrics.get("cluster/wasted_steps", 0))
            self.note(f"workers began again ({restarts} so far" + (f"; {wasted:,} steps are done twice)" if wasted else ")"))
        if not (text := _line(metrics, step)):
            return
        if self._status is not None:
            self._status.update(f"{escape(self._stage)}  [dim]{escape(text)}[/dim]")
        elif time.monotonic() - self._last > LOG_SECONDS:
            self._last = time.monotonic()
            self.console.print(f"      {escape(text)}", soft_wrap=True)


def _line(metrics: Mapping[str, float], step: int) -> str:
    """What is worth a look; empty where nothing is."""
    shown = {
        "train/loss": "loss {:.3f}", "validation/accuracy": "validation accuracy {:.3f}", "perf/rows_per_second": "{:,.0f} rows/s",
        "perf/tokens_per_second": "{:,.0f} tokens/s", "teacher/rows": "{:,.0f} rows answered", "teacher/rows_per_second": "{:,.0f} rows/s",
    }  # fmt: skip
    parts = [form.format(metrics[name]) for name, form in shown.items() if name in metrics]
    return "  ".join([*([f"step {step:,}"] if "teacher/rows" not in metrics else []), *parts]) if parts else ""
