"""What a person sees while a job runs: a line that is replaced on a terminal, plain lines now and then in a log."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from jobs.progress import LOG_SECONDS, Progress

ROOT = Path(__file__).resolve().parents[2]

JOB = """
import time
from jobs.progress import Progress
from jobs.terminal import console
progress = Progress(console())
progress.found("corpus")
with progress.stage("student six-layers"):
    for step in range(1, 41):
        progress.point({"train/loss": 1 / step, "perf/rows_per_second": 1234.5}, step)
        if step == 20:
            progress.point({"cluster/workers": 2.0, "cluster/restarts": 1.0, "cluster/wasted_steps": 7.0}, step)
        time.sleep(0.02)
"""


def program(**env: str) -> dict[str, object]:
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return {"args": [sys.executable, "-c", JOB], "cwd": ROOT, "env": {**clean, "TERM": "xterm-256color", **env}}


def test_in_a_log_there_are_plain_lines(monkeypatch):
    clock, out = [100.0], io.StringIO()
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    progress = Progress(Console(file=out, width=120, highlight=False))
    with progress.stage("targets: [teacher]"):
        for rows in range(1000, 121_000, 1000):  # two minutes, a point a second
            clock[0] += 1
            progress.point({"teacher/rows": float(rows), "teacher/rows_per_second": 1000.0}, rows)
            progress.point({"teacher/quality": 0.5}, rows)
    monkeypatch.undo()
    lines = out.getvalue().splitlines()
    assert lines[0] == "targets: [teacher]"
    assert lines[-1] == "done targets: [teacher] 120 s"
    assert lines[1] == "      16,000 rows answered  1,000 rows/s"
    assert len(lines) == 2 + 120 // (int(LOG_SECONDS) + 1)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out.getvalue())


def test_a_job_whose_output_goes_to_a_file(tmp_path):
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(**program(), stdout=log, stderr=log, check=True)
    text = re.sub(r"\d+ s\n", "N s\n", (tmp_path / "log").read_text())
    assert text.splitlines() == [
        "found corpus", "student six-layers", "      workers began again (1 so far; 7 steps are done twice)", "done student six-layers N s",
    ]  # fmt: skip


@pytest.mark.parametrize("colours", [True, False])
def test_on_a_terminal_one_line_is_replaced(colours):
    head, tail = pty.openpty()
    with subprocess.Popen(**program(**({} if colours else {"NO_COLOR": "1"})), stdout=tail, stderr=tail, stdin=tail) as job:
        os.close(tail)
        raw = b""
        while True:
            try:
                raw += os.read(head, 65536)
            except OSError:  # the other end was closed
                break
    os.close(head)
    assert job.returncode == 0
    text = raw.decode()
    assert "step 40  loss 0.025  1,234 rows/s" in re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert ("\x1b[32m" in text) == colours
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1  # the cursor is there again
    assert screen(re.sub(r"\d+ s\b", "N s", text)) == [
        "found corpus", "      workers began again (1 so far; 7 steps are done twice)", "done student six-layers N s",
    ]  # fmt: skip


def screen(text: str) -> list[str]:
    """What a terminal shows in the end. Knows what is used here: a new line, back to its start, up, and clearing a line."""
    rows, row, column = [""], 0, 0
    for piece in re.findall(r"\x1b\[[\d;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", text):
        if piece == "\n":
            row += 1
            rows += [""] * (row - len(rows) + 1)
        elif piece == "\r":
            column = 0
        elif piece[0] != "\x1b":
            rows[row] = (rows[row][:column].ljust(column) + piece + rows[row][column + len(piece) :]).rstrip()
            column += len(piece)
        elif piece[-1] == "A":
            row -= int(piece[2:-1] or 1)
        elif piece[-1] == "K":
            rows[row] = ""
        else:
            assert piece[-1] in "mhl", piece
    return [line for line in rows if line]
