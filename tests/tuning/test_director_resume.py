"""Searches that end before their time and go on: processes that are shut down or killed, other wishes, and what had failed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tuning.driving import CONFIRMED, KEEP, TRIALS, Driver, said, scores, states
from tuning.ledger import Search, read_search

# ------------------------------------------------------------------------------------------------------- killed and resumed

LIFE: dict[str, Any] = {"ends": {"L1-w0.2": "stopped", "L3-w0.2": "failed: why"}, "keep": KEEP, "trials": 5}
LIVES: dict[str, tuple[int, dict[str, Any]]] = {
    "grid": (82, {**LIFE, "refuses": ["L2-w0.8"]}),
    "grid, three at once": (89, {**LIFE, "refuses": ["L2-w0.8"], "room": 3}),
    "random, two at once": (55, {**LIFE, "searcher": {"type": "random"}, "trials": 4, "room": 2}),
    "tpe": (69, {**LIFE, "searcher": {"type": "tpe", "startup": 1}, "trials": 4}),
}
"""Calls that a search takes, and one in which everything happens."""


def lived(path: Path, life: Mapping[str, Any]) -> Search:
    """The search, where no process dies."""
    driver = Driver(path, **life).run()
    driver.die()
    return driver.search


def check(drivers: Sequence[Driver], expected: Search) -> None:
    """The last of the drivers ended a search as one that nothing happened to, and none of them did anything twice."""
    last = drivers[-1]
    assert last.director.next() == "done"
    assert trained(last.search) == trained(expected)
    assert (len(last.search.trials), last.search.latencies) == (len(expected.trials), expected.latencies)
    for driver in drivers:
        tasks = [driver.search.trials[job.number].task for job in driver.jobs if job.number is not None]
        assert not {(task.role, task.fingerprint) for task in tasks} & driver.before, "what had ended began again"
        assert not {job.student_key for job in driver.jobs if job.number is None} & driver.measured, "a latency was measured again"
        assert len(driver.names) == len(set(driver.names)), "one process did something twice"
    events = [json.loads(line) for line in last.ledger.path.read_bytes().splitlines()]
    ends = [event["number"] for event in events if event["kind"] == "end"]
    refused = [event["number"] for event in events if event["kind"] == "trial" and event["refused"] is not None]
    assert sorted(ends + refused) == list(range(len(last.search.trials))), "something neither ended once nor was refused"
    assert refused == [trial.number for trial in last.search.trials if trial.state == "refused"]


@contextmanager
def case(name: str) -> Iterator[None]:
    """One of many in a test: whatever goes wrong in it says which one it was."""
    try:
        yield
    except BaseException as error:
        error.add_note(f"in this case: {name}")
        raise


def killed_after_each(calls: int, path: Path, life: Mapping[str, Any], times: int) -> list[Driver]:
    """The processes of a search: at most so many that die after so many calls each, and one that comes to its end."""
    drivers: list[Driver] = []
    while not drivers or (drivers[-1].calls == calls and len(drivers) <= times):
        drivers.append(Driver(path, **life).run(calls if len(drivers) < times else 10_000))
        drivers[-1].die()
    return drivers


def trained(search: Search) -> dict[tuple[str, str], Any]:
    """What came of every training, by its role and fingerprint."""
    run = [trial for trial in search.trials if trial.state != "refused"]
    return {(trial.task.role, trial.task.fingerprint): (trial.state, trial.cause, trial.curve) for trial in run}


@pytest.mark.parametrize("life", LIVES)
def test_so_many_calls_does_a_search_take(drive, life):
    calls, options = LIVES[life]
    driver = drive(**options).run()
    assert driver.calls == calls
    assert len(driver.search.latencies) >= 2
    assert {trial.task.role for trial in driver.search.trials} == {"trial", "baseline", "refit", "refit-baseline"}


@pytest.mark.parametrize("life", LIVES)
def test_a_search_that_is_killed_after_any_call_goes_on_where_it_was(tmp_path, life):
    total, options = LIVES[life]
    expected = lived(tmp_path / "undisturbed.jsonl", options)
    for calls in range(total):
        with case(f"killed after {calls} calls"):
            check(killed_after_each(calls, tmp_path / f"{calls}.jsonl", options, times=1), expected)


@pytest.mark.parametrize("life", ["grid", "random, two at once", "tpe"])
def test_a_search_that_is_killed_again_and_again_comes_to_its_end(tmp_path, life):
    options = LIVES[life][1] | {"room": 1}
    expected = lived(tmp_path / "undisturbed.jsonl", options)
    for calls in (5, 7, 12):
        with case(f"killed after every {calls} calls"):
            drivers = killed_after_each(calls, tmp_path / f"{calls}.jsonl", options, times=40)
            assert 3 < len(drivers) < 40
            check(drivers, expected)


def test_a_search_goes_on_from_every_line_of_its_ledger(tmp_path):
    """A process may die between any two of them, and in the middle of one."""
    path, options = tmp_path / "ledger.jsonl", LIVES["grid"][1]
    expected = lived(path, options)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) > 40
    for count in range(1, len(lines)):
        with case(f"killed in the middle of line {count + 1}"):
            path.write_bytes(b"".join(lines[:count]) + lines[count][: len(lines[count]) // 2])
            driver = Driver(path, **options).run()
            driver.die()
            check([driver], expected)


def test_a_point_is_refused_in_one_line_of_the_ledger(drive):
    """Otherwise a process that dies between two of them leaves a trial that can never run."""
    driver = drive(refuses=["L1-w0.2"]).run(calls=1)
    _, refused, trial = [json.loads(line) for line in driver.ledger.path.read_bytes().splitlines()]
    assert (refused["kind"], refused["number"], refused["name"]) == ("trial", 0, "refused")
    assert refused["refused"] == "error[DST-2011]: teacher has no such layer: L1-w0.2: expected 0 to 5 but found 9"
    assert (trial["kind"], trial["number"], trial["name"], trial["refused"]) == ("trial", 1, "L1-w0.8", None)
    driver.ledger.path.write_bytes(b"".join(driver.ledger.path.read_bytes().splitlines(keepends=True)[:2]))
    again = drive(refuses=["L1-w0.2"]).run()
    assert again.names[:5] == TRIALS[1:]
    assert [trial.state for trial in again.search.of_role("trial")] == ["refused", *["finished"] * 5]


# ---------------------------------------------------------------------------------------------- other wishes, other outcomes


def test_a_search_that_goes_on_with_another_wish_trains_what_is_missing(drive):
    assert drive(trials=4, finalists=1).run().names[4:] == CONFIRMED[:6]
    more = drive(trials=6, finalists=1).run()
    assert more.names == ["L3-w0.2", "L3-w0.8"]
    assert [draw for draw, _, outcome in more.searcher.told if outcome.state == "finished"] == [0, 1, 2, 3, 4, 5]
    larger = drive(trials=6, finalists=1, seeds=1, keep={"validation/accuracy": 0.7}).run()
    assert larger.names == ["L2-w0.2-seed0", "L2-base-seed0"]


def test_a_seed_that_was_begun_and_is_not_asked_for_any_more_is_stopped(drive):
    driver = drive(trials=1, finalists=1).run(calls=21)
    assert driver.names == ["L1-w0.2", "L1-base", "L1-w0.2-seed0", "L1-base-seed0", "L1-w0.2-seed1"]
    again = drive(trials=1, finalists=1, seeds=1).run()
    assert (again.names, again.director.failure) == ([], None)
    assert states(again.search) == dict.fromkeys(["L1-w0.2", "L1-base", "L1-w0.2-seed0", "L1-base-seed0"], "finished") | {
        "L1-w0.2-seed1": "stopped"
    }
    assert again.search.trials[-1].cause == "not asked for any more"
    assert again.notes.calls == [("ended", again.search.trials[-1].number, "stopped")]


def test_a_seed_that_had_failed_and_is_not_asked_for_any_more_does_not_run_again(drive):
    ends = {"L1-w0.2-seed0": "failed: why", "L1-w0.2-seed1": "failed: why"}
    drive(ends, trials=1, finalists=1).run()
    again = drive(trials=1, finalists=1, seeds=1, retry_failed=True).run()
    assert (again.names, again.director.failure) == (["L1-w0.2-seed0"], None)
    assert [name for name, state in states(again.search).items() if state == "failed"] == ["L1-w0.2-seed1"]


def test_a_process_that_goes_on_compares_the_same_trials_with_each_other(drive):
    options = {"space": {"student": {"choice": ["L3", "L1", "L2"]}}, "trials": 3, "scheduler": {"type": "asha", "bucket": 1.9}}
    assert [job.bucket for job in drive(**options).run(5).jobs] == [0]
    # 10 MFLOPs are alone; 20 are within 1.9 times of 30, but not of 10.
    assert [(job.point["student"], job.bucket) for job in drive(**options).run().jobs[:2]] == [("L1", 1), ("L2", 0)]


def test_what_had_failed_runs_again_only_where_that_is_asked_for(drive):
    ends = {"L1-w0.8": "failed: why", "L2-base": "died: why", "L2-w0.2-seed1": "failed: why"}
    first = drive(ends).run()
    assert [name for name, state in states(first.search).items() if state == "failed"] == ["L1-w0.8", "L2-base", "L2-w0.2-seed1"]

    assert drive().run().names == []
    assert drive(retry_failed=False).run().names == []

    again = drive(retry_failed=True).run()
    # L1-w0.8 is on the front now, so it is a finalist; the baseline of its size is known for every seed.
    assert again.names == ["L1-w0.8", "L2-base", "L2-w0.2-seed1", "L1-w0.8-seed0", "L1-w0.8-seed1"]
    assert (again.director.ran, set(states(again.search).values())) == (5, {"finished"})
    retried = again.search.trials[1]
    assert (retried.cause, retried.seconds) == ("", 4.0)
    assert retried.curve == [(10, scores(50, 0.33)), (20, scores(100, 0.66))]
    assert drive(retry_failed=True).run().names == []


@pytest.mark.parametrize("way", ["failed", "died"])
def test_what_fails_again_is_over_for_this_process(drive, way):
    drive({"L1-w0.8": "failed: why"}).run()
    again = drive({"L1-w0.8": f"{way}: still"}, retry_failed=True).run(2)
    assert read_search(again.ledger.path).trials[1].state == "running"
    assert again.run().names == ["L1-w0.8"]
    assert (again.search.trials[1].state, again.search.trials[1].cause) == ("failed", "still")


def test_after_it_is_closed_nothing_changes(drive):
    driver = drive(keep=KEEP, trials=1, room=2).run(calls=2)
    driver.director.close()
    ledger, notes = driver.ledger.path.read_bytes(), list(driver.notes.calls)
    driver.director.result(0, said((20, scores(100, 0.6)), state="failed", cause="RayActorError: shut down"))
    driver.director.gone(0, "RayActorError: shut down")
    assert driver.director.next() == "done"
    assert (driver.ledger.path.read_bytes(), driver.notes.calls, driver.director.failure) == (ledger, notes, None)
    assert driver.search.trials[0].state == "running"

    measuring = drive(keep=KEEP, trials=1).run(calls=6)
    assert measuring.names == ["L1-w0.2", "latency of key-L1"]
    measuring.director.close()
    measuring.director.result(None, said(state="finished", measured={"cost/latency_ms_p95": 1.0}))
    measuring.director.gone(None, "RayActorError: shut down")
    assert (measuring.search.latencies, measuring.director.failure) == ({}, None)


def test_a_seed_that_is_asked_for_again_is_trained(drive):
    driver = drive(trials=1, seeds=2, finalists=1)
    while "L1-w0.2-seed1" not in driver.names:
        driver.run(driver.calls + 1)
    assert states(drive(trials=1, seeds=1, finalists=1).run().search)["L1-w0.2-seed1"] == "stopped"
    again = drive(trials=1, seeds=2, finalists=1).run()
    assert "L1-w0.2-seed1" in again.names
    assert states(again.search)["L1-w0.2-seed1"] == "finished"
