"""The ledger alone: what a search resumes from survives restarts, torn lines and a second driver."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillation.errors import ConfigError, ConflictError, InputError
from tests.tuning.searches import NASTY, write
from tuning.ledger import Exploit, Ledger, Search, Task, Trial, read_search

SETTINGS = {"space": {"losses.soft.weight": {"uniform": [0.0, 1.0]}}, "trials": 4}
JOB = {"name": "docstrings", "search": SETTINGS}
TEACHER = {"validation/accuracy": 0.738}
COST = {"cost/parameters": 10.0, "cost/bytes": 40.0, "cost/flops": 1e7}
POINT = {"student": {"type": "layers", "layers": [0, 5]}, "losses.soft.weight": 0.64}
FIRST = Task("trial", "L2-w0.64", POINT, "L2", "key-L2", "fp-0", COST, 100)
SECOND = FIRST._replace(name="L2-w0.1", point={"losses.soft.weight": 0.1}, fingerprint="fp-1")
BASELINE = FIRST._replace(role="baseline", name="L2-baseline", fingerprint="fp-2", of=0, seed=7)
TRAIN = {"train/rows": 50.0, "train/loss": 0.75}
SCORES = {"train/rows": 50.0, "validation/accuracy": 0.5}


def begun(path: Path, *tasks: Task) -> Ledger:
    """A ledger with trials that run."""
    ledger = Ledger(path)
    ledger.begin("docstrings", JOB, "f" * 64, TEACHER)
    assert [ledger.trial(task) for task in tasks] == list(range(len(tasks)))
    return ledger


def kinds(path: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in path.read_bytes().splitlines()]


# -------------------------------------------------------------------------------------------------------------- round trip


def test_every_kind_of_event_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "search" / "ledger.jsonl"
    choice = {"trial": 0, "reason": NASTY, "refit": 2}
    evaluations = [{"role": "student", "quality": {"accuracy": 0.7}}]
    with begun(path, FIRST, SECOND, BASELINE) as ledger:
        ledger.point(0, 10, TRAIN)
        ledger.point(0, 20, {"train/rows": 100.0, "validation/accuracy": 0.625, "validation/nll": 1.5})
        ledger.end(0, "finished", node="node-1", seconds=12.5)
        ledger.exploit(1, 0, 20, {"losses.soft.weight": 0.77}, "L2-w0.77")
        ledger.exploit(1, 2, 30, {"losses.soft.weight": 0.62}, "L2-w0.62")
        ledger.end(1, "failed", cause=f"line\nbreak {NASTY}", node="node-2", seconds=1.0)
        ledger.start(1)
        ledger.latency("key-L2", {"cost/latency_ms_p50": 2.5, "cost/latency_ms_p95": 4.0})
        ledger.choice(choice)
        ledger.test(evaluations)
        ledger.ended()
        assert ledger.search.ended
        ledger.begin("docstrings", {**JOB, "search": {**SETTINGS, "trials": 9}}, "f" * 64, TEACHER)
        written = ledger.search
    assert kinds(path) == [
        "search", "trial", "trial", "trial", "point", "point", "end", "exploit", "exploit", "end", "start", "latency", "choice", "test",
        "ended", "continued",
    ]  # fmt: skip

    search = read_search(path)
    assert search == written
    assert (search.name, search.fingerprint, search.teacher) == ("docstrings", "f" * 64, TEACHER)
    assert (search.ended, search.config.trials, search.choice, search.evaluations) == (False, 9, choice, evaluations)
    first, second, baseline = search.trials
    assert (first.task, first.state, first.rows, first.seconds, first.node) == (FIRST, "finished", 100, 12.5, "node-1")
    assert first.curve == [(10, TRAIN), (20, {"train/rows": 100.0, "validation/accuracy": 0.625, "validation/nll": 1.5})]
    assert first.metrics == {"validation/accuracy": 0.625, "validation/nll": 1.5}
    assert (second.state, second.cause, second.node) == ("running", f"line\nbreak {NASTY}", "node-2")
    assert second.task == SECOND._replace(point={"losses.soft.weight": 0.62}, name="L2-w0.62")
    assert second.exploits == [Exploit(0, 20, {"losses.soft.weight": 0.1}), Exploit(2, 30, {"losses.soft.weight": 0.77})]
    assert second.task.output == "trials/fp-1"
    assert baseline == Trial(2, BASELINE, started=baseline.started)
    assert [trial.number for trial in search.of_role("baseline", "refit")] == [2]
    assert search.values(first) == {**COST, **first.metrics, "cost/latency_ms_p50": 2.5, "cost/latency_ms_p95": 4.0}
    with Ledger(path) as again:
        assert again.search == search


def test_a_refused_point_is_one_event(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        assert ledger.trial(Task("trial", "refused", POINT, "", "", "", {}, 0), refused=f"line\nbreak {NASTY}") == 1
        assert ledger.trial(SECOND) == 2
        written = ledger.search
    assert kinds(path) == ["search", "trial", "trial", "trial"]
    search = read_search(path)
    assert search == written
    assert [(trial.state, trial.cause) for trial in search.trials] == [
        ("running", ""),
        ("refused", f"line\nbreak {NASTY}"),
        ("running", ""),
    ]
    assert (search.trials[1].task.point, search.trials[1].seconds) == (POINT, 0.0)


def test_a_ledger_is_read_while_it_is_written(tmp_path):
    with begun(tmp_path / "ledger.jsonl", FIRST) as ledger:
        for step in (10, 20):
            ledger.point(0, step, {**TRAIN, "train/rows": 5.0 * step})
            assert read_search(ledger.path) == ledger.search
            assert read_search(ledger.path).trials[0].rows == 5 * step


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with begun(tmp_path / "ledger.jsonl", FIRST) as ledger:
        whole = ledger.path.read_bytes()
        with pytest.raises(ValueError, match="not JSON compliant"):
            ledger.point(0, 10, {"train/loss": math.nan})
        assert ledger.path.read_bytes() == whole
        assert ledger.search.trials[0].curve == []
        assert ledger.point(0, 10, TRAIN)
    assert read_search(ledger.path).trials[0].curve == [(10, TRAIN)]


# ------------------------------------------------------------------------------------------------------ restarted workers


def test_a_point_that_comes_twice_is_recorded_once(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST, SECOND) as ledger:
        assert [ledger.point(0, step, {"train/rows": float(step)}) for step in (10, 20, 30)] == [True, True, True]
        assert [ledger.point(0, step, {"train/rows": 9.0 * step}) for step in (10, 20, 30, 40)] == [False, False, False, True]
        assert ledger.point(1, 10, TRAIN)  # of another trial
    with Ledger(path) as ledger:  # another driver, the same worker
        assert [ledger.point(0, step, {"train/rows": 1.0}) for step in (30, 40)] == [False, False]
    assert kinds(path).count("point") == 5
    assert read_search(path).trials[0].curve == [(step, {"train/rows": rows}) for step, rows in ((10, 10), (20, 20), (30, 30), (40, 360))]


def test_new_metrics_at_the_same_step_are_another_point(tmp_path):
    with begun(tmp_path / "ledger.jsonl", FIRST) as ledger:
        assert ledger.point(0, 10, TRAIN)
        assert ledger.point(0, 10, SCORES)
        assert not ledger.point(0, 10, SCORES)
        assert not ledger.point(0, 10, {"validation/accuracy": 0.9})
        assert not ledger.point(0, 9, {"validation/nll": 1.0})  # new, but of a step that is over
        (trial,) = read_search(ledger.path).trials
    assert trial.curve == [(10, TRAIN), (10, SCORES)]
    assert (trial.metrics, trial.rows) == ({"validation/accuracy": 0.5}, 50)


def test_a_step_of_two_points_that_comes_again_is_recorded_once(tmp_path):
    """A step with an evaluation has two, and a restarted worker hands over both of them again."""
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        assert [ledger.point(0, 10, metrics) for metrics in (TRAIN, SCORES)] == [True, True]
        assert [ledger.point(0, 10, metrics) for metrics in (TRAIN, SCORES, TRAIN, SCORES)] == [False] * 4
    with Ledger(path) as ledger:
        assert [ledger.point(0, 10, metrics) for metrics in (TRAIN, SCORES)] == [False, False]
        assert [ledger.point(0, 20, metrics) for metrics in (TRAIN, SCORES)] == [True, True]
    assert read_search(path).trials[0].curve == [(10, TRAIN), (10, SCORES), (20, TRAIN), (20, SCORES)]


def test_seconds_add_up_over_two_drivers(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        ledger.end(0, "failed", cause="RuntimeError: no memory", node="node-1", seconds=1.5)
    with Ledger(path) as ledger:
        ledger.start(0)
        assert ledger.search.trials[0].state == "running"
        ledger.end(0, "finished", node="node-2", seconds=2.25)
    (trial,) = read_search(path).trials
    assert (trial.state, trial.cause, trial.node, trial.seconds) == ("finished", "", "node-2", 3.75)


def test_what_the_teacher_was_asked_adds_up_over_two_drivers(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        ledger.begin("docstrings", JOB, "f" * 64, TEACHER, passes=1)
        for task, answered in ((FIRST, 30), (SECOND, 0)):
            ledger.end(ledger.trial(task), "finished", answered=answered)
    with Ledger(path) as ledger:  # its store was lost meanwhile
        ledger.begin("docstrings", JOB, "f" * 64, TEACHER, passes=1)
        ledger.end(ledger.trial(BASELINE), "finished", answered=12)
    with Ledger(path) as ledger:
        ledger.begin("docstrings", JOB, "f" * 64, TEACHER)
    assert (read_search(path).passes, read_search(path).answered) == (2, 42)


def test_time_between_drivers_is_left_out(tmp_path):
    def event(second: int, kind: str, **content: object) -> dict[str, object]:
        return {"time": 1000 * second, "kind": kind, **content}

    begin = {"name": "docstrings", "job": JOB, "fingerprint": "f" * 64, "teacher": TEACHER, "passes": 1}
    lines = [
        event(1000, "search", **begin),
        event(1060, "latency", student_key="key", metrics={}),  # the driver dies after a minute
        event(4660, "continued", job=JOB, passes=0),
        event(4690, "ended"),
        event(9690, "continued", job=JOB, passes=0),
        event(9705, "ended"),
    ]
    path = tmp_path / "ledger.jsonl"
    for count, seconds in ((2, 60), (3, 60), (4, 90), (5, 90), (6, 105)):
        write(path, ({"seq": seq, **line} for seq, line in enumerate(lines[:count])))
        search = read_search(path)
        assert search.elapsed(search.updated) == seconds, count
    assert search.elapsed(search.updated + 2500) == 107.5
    with Ledger(path) as ledger:  # decades later
        ledger.begin("docstrings", JOB, "f" * 64, TEACHER)
        assert ledger.search.elapsed(ledger.search.updated) == 105
        assert read_search(path) == ledger.search


# ---------------------------------------------------------------------------------------------------------- damaged files


def test_a_torn_last_line_is_cut_off_wherever_it_was_torn(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        before = read_search(path)
        ledger.end(0, "failed", cause="schön 🙂")
    *head, last = path.read_bytes().splitlines(keepends=True)
    assert len(last) > len(last.decode())  # some characters are torn, too
    for length in range(1, len(last)):
        path.write_bytes(b"".join(head) + last[:length])
        assert read_search(path) == before
        with Ledger(path) as ledger:
            assert path.read_bytes() == b"".join(head)
            assert ledger.search == before
            ledger.end(0, "stopped", seconds=1.0)
        (trial,) = read_search(path).trials
        assert (trial.state, trial.cause) == ("stopped", "")
        assert [json.loads(line)["seq"] for line in path.read_bytes().splitlines()] == [0, 1, 2]


def test_a_ledger_torn_in_its_first_line_begins_anew(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_bytes(b'{"seq": 0, "time": 17, "kind": "sea')
    with begun(path, FIRST) as ledger:
        assert ledger.search.trials[0].task == FIRST
    assert kinds(path) == ["search", "trial"]


@pytest.mark.parametrize("line", [b"", b"\0\0\0\n", b"\n", b"[1]\n", b'{"seq": 1, "time": 17}\n', b'{"seq": 1, "time": 17, "kind": "tr\n'])
def test_an_altered_line_in_the_middle_is_refused(tmp_path, line):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        ledger.end(0, "finished")
    first, _, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + line + last)
    for _ in range(2):  # the lock was given back
        with pytest.raises(InputError, match=rf"DST-3501.*at byte {len(first)}"):
            Ledger(path)
    with pytest.raises(InputError, match="DST-3501"):
        read_search(path)
    assert path.read_bytes() == first + line + last


@pytest.mark.parametrize(
    "altered",
    [
        {"kind": "trial"},
        {"kind": "point", "number": 5, "step": 10, "metrics": {}},
        {"kind": "point", "number": 0, "step": 10, "metrics": 1},
    ],
)
def test_a_line_that_cannot_follow_those_before_it_is_refused(tmp_path, altered):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST) as ledger:
        ledger.point(0, 10, TRAIN)
        ledger.end(0, "finished")
    lines = path.read_bytes().splitlines(keepends=True)
    lines[2] = json.dumps({"seq": 2, "time": 17, **altered}).encode() + b"\n"
    path.write_bytes(b"".join(lines))
    for _ in range(2):  # the lock was given back
        with pytest.raises(InputError, match=rf"DST-3501.*{path}, line 3"):
            Ledger(path)
    with pytest.raises(InputError, match=rf"DST-3501.*{path}, line 3"):
        read_search(path)
    assert path.read_bytes() == b"".join(lines)


def test_a_ledger_whose_first_line_is_gone_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    begun(path, FIRST).__exit__()
    path.write_bytes(path.read_bytes().splitlines(keepends=True)[1])
    for opened in (Ledger, read_search):
        with pytest.raises(InputError, match="DST-3501"):
            opened(path)


@pytest.mark.parametrize("content", [None, b"", b'{"seq": 0, "ti'])
def test_a_search_that_is_not_there_is_named(tmp_path, content):
    path = tmp_path / "ledger.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"DST-2006.*{path}"):
        read_search(path)
    assert path.exists() == (content is not None)


# ------------------------------------------------------------------------------------------------------------ two drivers

OPEN = "import sys; from pathlib import Path; from tuning.ledger import Ledger, Task; ledger = Ledger(Path(sys.argv[1]))"


def other_process(path: Path, program: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)


def test_a_ledger_has_one_writer(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path, FIRST):
        whole = path.read_bytes()
        with pytest.raises(ConflictError, match="DST-8101"):
            Ledger(path)
        done = other_process(path, OPEN)
        assert done.returncode != 0
        assert "ConflictError" in done.stderr
        assert "DST-8101" in done.stderr
        assert path.read_bytes() == whole
    done = other_process(path, f"{OPEN}; ledger.end(0, 'stopped', seconds=2.0)")
    assert (done.returncode, done.stderr) == (0, "")
    assert read_search(path).trials[0].state == "stopped"


def test_a_killed_driver_leaves_what_it_wrote_and_no_lock(tmp_path):
    path = tmp_path / "ledger.jsonl"
    begun(path, FIRST).__exit__()
    points = "for step in range(99): ledger.point(0, step, {'train/rows': 1.0})"
    program = f"import os, signal\n{OPEN}\n{points}\nos.kill(os.getpid(), signal.SIGKILL)"
    assert other_process(path, program).returncode == -9
    with Ledger(path) as ledger:
        assert [step for step, _ in ledger.search.trials[0].curve] == list(range(99))
        assert ledger.point(0, 99, TRAIN)


# ------------------------------------------------------------------------------------------------------------------- time


def test_a_thousand_trials_are_read_in_no_time(tmp_path):
    path = tmp_path / "ledger.jsonl"
    with begun(path) as ledger:
        for number in range(1000):
            ledger.trial(FIRST._replace(fingerprint=f"fp-{number}"))
            for step in range(10):
                ledger.point(number, step, {f"train/{i}": 0.1 * i for i in range(12)} | {"train/rows": 10.0 * step + 10})
            ledger.end(number, "finished", node="node-1", seconds=30.0)
    started = time.perf_counter()
    search: Search = read_search(path)
    assert time.perf_counter() - started < 2  # takes about 0.2
    assert len(search.trials) == 1000
    assert all(len(trial.curve) == 10 and trial.rows == 100 for trial in search.trials)
