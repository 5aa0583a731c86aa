"""The journal alone: what survives a killed process, and what is written once."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.journal import Journal
from distillation.errors import ConflictError, InputError

JOB, STUDENT = "docstrings", "docstrings/L3-1a2b"


def test_journal_resumes_where_a_killed_process_stopped(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"train/loss": 2.0, "validation/accuracy": 0.5}, step=10)
        journal.metrics(JOB, {"train/loss": 1.5}, step=20)
        first = journal.id
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"seq": 4, "time": 17, "kind": "metr')
    with Journal(path) as journal:
        assert path.read_bytes() == whole
        assert (journal.id, journal.count) == (first, 4)
        journal.metrics(JOB, {"train/loss": 9.0, "validation/accuracy": 0.6}, step=20)
        journal.metrics(JOB, {"train/loss": 9.0}, step=15)
        events = [event for event, _ in journal.events()]
    assert [event["seq"] for event in events] == [0, 1, 2, 3, 4]
    assert events[4]["values"] == {"validation/accuracy": 0.6}


def test_journal_keeps_the_first_value_of_a_parameter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.params(JOB, {"training.epochs": 3, "training.seed": 0})
    with Journal(path) as journal:
        journal.params(JOB, {"training.epochs": 5, "training.seed": 0, "training.precision": None})
        assert journal.events()[-1][0]["values"] == {"training.precision": "None"}
    assert "keeps the first value of training.epochs" in caplog.text


def test_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "tracking.jsonl"), pytest.raises(ConflictError, match="DST-8101"):
        Journal(tmp_path / "tracking.jsonl")
    Journal(tmp_path / "tracking.jsonl").close()


def test_altered_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.metrics(JOB, {"loss": 1.0}, step=1)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    with pytest.raises(InputError, match=rf"DST-3501.*at byte {len(lines[0])}"):
        Journal(path)


def test_journal_survives_kill_and_threads(tmp_path: Path) -> None:
    """4 threads, then SIGKILL: all of them are there, whole and numbered."""
    path = tmp_path / "tracking.jsonl"
    script = f"""
import os, signal, threading
from pathlib import Path
from cluster.journal import Journal
journal = Journal(Path({str(path)!r}))
for t in range(4):
    journal.run(f"r{{t}}", name="r")
def work(t):
    for step in range(99):
        journal.metrics(f"r{{t}}", {{"loss": step / 2}}, step)
threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", script], cwd=root).returncode == -signal.SIGKILL
    with Journal(path) as journal:
        events = [event for event, _ in journal.events()]
        assert [event["seq"] for event in events] == list(range(401))
        assert journal.finish_unfinished("KILLED") == ["r0", "r1", "r2", "r3"]
        assert journal.events(most=10_000)[-1][0]["time"] == [e for e in events if e.get("key") == "r3"][-1]["time"]


def test_journal_knows_what_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        journal.run(STUDENT, name="L3", parent=JOB)
        journal.finish(STUDENT, "FINISHED")
        journal.run("again", name="again", parent=JOB)
        journal.finish("again", "KILLED")
        journal.run("again", name="again", parent=JOB)
    with Journal(path) as journal:
        assert [journal.status(key) for key in (JOB, STUDENT, "again", "unknown")] == [None, "FINISHED", None, None]
        assert journal.finish_unfinished("KILLED") == [JOB, "again"]
        assert journal.status("again") is None  # nobody said how it ended


def test_note_names_declared_runs_only(tmp_path: Path) -> None:
    path = tmp_path / "tracking.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="docstrings")
        assert not journal.has_note
        with pytest.raises(AssertionError, match="other/run"):
            journal.note("![x](get-artifact?path=x.png&run_uuid={run:other/run})")
        journal.note(f"![x](get-artifact?path=x.png&run_uuid={{run:{JOB}}})")
        assert journal.has_note
    with Journal(path) as journal:
        assert journal.has_note
