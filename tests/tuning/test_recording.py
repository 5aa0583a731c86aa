"""What MLflow is told of a search: what a killed process left unsaid is said by the next one, and a run ends as its trial did."""

from __future__ import annotations

import pytest

from cluster.journal import Journal
from tests.tuning.driving import scores
from tuning.ledger import Ledger, Task
from tuning.recording import Recorder, flat_point
from tuning.search import _last_cause


def told(journal):
    """(kind, what of it) of every event of the trial's run."""
    found = []
    for event, _ in journal.events():
        if event.get("key", "").startswith("search/"):
            found.append((event["kind"], event.get("status") or event.get("step") or event.get("values")))
    return found


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        ledger.begin("j", {"search": {"space": {"losses.soft.weight": {"choice": [0.5]}}}}, "f", {})
        ledger.trial(Task("trial", "L2-w0.50", {"losses.soft.weight": 0.5}, "L2", "k", "fp", {"cost/parameters": 5.0}, 100))
        yield ledger


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_was_closed_as_killed_ends_as_its_trial_did(tmp_path, ledger, state):
    """The process died after the ledger had the end and before the journal had it."""
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.run("search", name="search")
        recorder = Recorder(journal, "search")
        recorder.started(ledger.search.trials[0])
        ledger.point(0, 10, scores(50, 0.5))
        recorder.point(ledger.search.trials[0], 10, scores(50, 0.5))
        ledger.point(0, 20, scores(100, 0.6))  # the journal has not heard of this one either
        ledger.end(0, state, cause="why" if state == "failed" else "")
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.finish_unfinished("KILLED")
        journal.run("search", name="search")
        Recorder(journal, "search").catch_up(ledger.search)
        assert journal.status("search/00000") == {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}[state]
        steps = [what for kind, what in told(journal) if kind == "metrics"]
        assert 20 in steps
        count = journal.count
        Recorder(journal, "search").catch_up(ledger.search)
        assert journal.count == count  # once


def test_points_of_a_trial_that_goes_on_are_brought_to_its_run(tmp_path, ledger):
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.run("search", name="search")
        Recorder(journal, "search").started(ledger.search.trials[0])
        ledger.point(0, 10, scores(50, 0.5))
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.finish_unfinished("KILLED")
        journal.run("search", name="search")
        Recorder(journal, "search").catch_up(ledger.search)
        assert ("metrics", 10) in told(journal)
        assert journal.status("search/00000") is None


def test_knobs_are_parameters_with_numbers_as_they_are():
    point = {"losses.soft.weight": 0.5, "student": {"type": "layers", "layers": [0, 5], "count": None}}
    assert flat_point(point) == {"losses.soft.weight": 0.5, "student.type": "layers", "student.layers": "[0, 5]"}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (
            "Failure # 1 (occurred at x)\nray::train()\nTraceback (most recent call last):\n  File \"a\"\nKeyError: 'first'\n"
            "Failure # 2 (occurred at x)\nray::train()\nTraceback (most recent call last):\n  File \"a\"\nKeyError: 'second'\n",
            "KeyError: 'second'",
        ),
        (
            "Failure # 1 (occurred at x)\nThe actor died unexpectedly before finishing this task.\n\tclass_name: ImplicitFunc\n"
            "The actor is dead because its worker process has died. Worker exit detail: killed by the OOM killer\n",
            "The actor died unexpectedly before finishing this task. killed by the OOM killer",
        ),
        ("", "its process died"),
    ],
)
def test_the_cause_of_a_trial_that_ray_gave_up_is_the_last_one_it_wrote(tmp_path, text, cause):
    (tmp_path / "error.txt").write_text(text)
    assert _last_cause(str(tmp_path / "error.txt")) == cause


def test_the_cause_is_known_to_be_unknown():
    assert _last_cause(None) == "its process died"
