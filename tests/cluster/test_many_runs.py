"""A search's thousand runs: few calls, a small state, each run once however often it is delivered, and ended when it ended."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import mlflow
import pytest

from cluster import links, tracking
from cluster.delivery import deliver
from cluster.journal import Journal
from cluster.outages import Away
from cluster.tracking import Delivery
from tests.cluster.recording import JOB, databases, history, runs_of, target

CALLS = ("create_run", "update_run", "log_batch", "set_terminated", "search_runs", "get_run", "log_param", "set_tag", "log_metric")


def trials(journal: Journal, first: int, last: int) -> None:
    """Four points each; trial 3 is stopped by its scheduler, trial 4 fails."""
    for number in range(first, last):
        key = f"{JOB}/{number:05d}"
        journal.run(key, name=f"L{number}", parent=JOB, tags={"role": "trial", "distillery.state": "running"})
        journal.params(key, {"losses.soft.weight": number / 8})
        for step in range(4):
            journal.metrics(key, {"train/loss": number + step / 4, "validation/accuracy": step / 8}, step)
        state = {3: "stopped early", 4: "failed"}.get(number, "finished")
        journal.tags(key, {"distillery.state": state} | ({"distillery.error": "out of memory"} if state == "failed" else {}))
        journal.finish(key, {"stopped early": "KILLED", "failed": "FAILED"}.get(state, "FINISHED"))


def counted(delivery: Delivery, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the real client."""
    calls: Counter[str] = Counter()

    def counting(name: str) -> None:
        call = getattr(delivery.client, name)

        def counts(*arguments: object, **options: object) -> object:
            calls[name] += 1
            return call(*arguments, **options)

        monkeypatch.setattr(delivery.client, name, counts)

    for name in CALLS:
        counting(name)
    return calls


@databases
def test_a_run_takes_three_calls(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="search")
        trials(journal, 0, 20)
        delivery = Delivery(target(database, tmp_path), journal)
        delivery.connect()
        calls = counted(delivery, monkeypatch)
        assert delivery.step() is False
        assert calls == {"create_run": 21, "log_batch": 20, "set_terminated": 20, "search_runs": 1}
        assert delivery.delivered == journal.count == 2 + 20 * 8
    runs = runs_of(database)
    assert len(runs) == 21
    stopped, failed = runs[f"{JOB}/00003"], runs[f"{JOB}/00004"]
    assert (stopped.info.status, stopped.data.tags["distillery.state"]) == ("KILLED", "stopped early")
    assert (failed.info.status, failed.data.tags["distillery.error"]) == ("FAILED", "out of memory")
    assert stopped.data.params == {"losses.soft.weight": "0.375"}
    assert history(database, stopped, "train/loss") == [(0, 3.0), (1, 3.25), (2, 3.5), (3, 3.75)]
    assert stopped.data.tags["mlflow.parentRunId"] == runs[JOB].info.run_id


def test_state_grows_with_the_runs_and_not_faster(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine steps with two new runs each, 4 lines a file: the runs are written again three times, not nine."""
    monkeypatch.setattr(tracking, "STATE_LINES", 4)
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="search")
        delivery = Delivery(target(database, tmp_path), journal)
        sizes = []
        for number in range(0, 18, 2):
            trials(journal, number, number + 2)
            delivery.step()
            lines = [json.loads(line) for line in links.state_file(journal.path).read_text().splitlines()]
            sizes.append([len(line["runs"]) for line in lines])
        state = links.recorded(journal.path)
        expected = {key: run.info.run_id for key, run in runs_of(database).items()}
    assert sizes == [[3], [3, 2], [3, 2, 2], [3, 2, 2, 2], [11], [11, 2], [11, 2, 2], [11, 2, 2, 2], [19]]
    assert state == links.Recorded(database, "1", expected)


@databases
def test_older_state_delivers_again_and_makes_no_run_twice(database: str, tmp_path: Path) -> None:
    """Killed after delivery and before the state was saved: creation, points, reopening and ends come a second time."""
    path = tmp_path / "t.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="search")
        trials(journal, 0, 5)
        assert deliver(target(database, tmp_path), journal) == 43
        state = links.state_file(path).read_bytes()
        journal.run(JOB, name="search")
        journal.run(f"{JOB}/00002", name="again", parent=JOB)
        trials(journal, 5, 9)
        assert deliver(target(database, tmp_path), journal) == 36
        before = {key: run.to_dictionary() for key, run in runs_of(database).items()}
        for left in (state, state[: len(state) // 2], b"\0\n"):  # an older one, a torn one, an altered one
            links.state_file(path).write_bytes(left)
            assert deliver(target(database, tmp_path), journal) == (36 if left == state else 79)
            assert {key: run.to_dictionary() for key, run in runs_of(database).items()} == before
    assert len(before) == 10


def test_run_created_by_a_server_that_could_not_say_so(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost on the way: the run is found and not created again, and what went out before does not go out again."""
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="search")
        deliver(target(database, tmp_path), journal)
        trials(journal, 0, 6)
        delivery = Delivery(target(database, tmp_path), journal)
        delivery.connect()
        calls = counted(delivery, monkeypatch)
        create = delivery.client.create_run

        def create_and_lose_the_answer(*arguments: object, **options: object) -> object:
            answer = create(*arguments, **options)
            if calls["create_run"] == 4:
                raise ConnectionError("connection reset")
            return answer

        monkeypatch.setattr(delivery.client, "create_run", create_and_lose_the_answer)
        with pytest.raises(Away, match="connection reset"):
            delivery.step()
        trials(journal, 6, 7)
        assert delivery.step() is True, "what came meanwhile waits"
        assert delivery.step() is False
        assert (calls["create_run"], calls["set_terminated"]) == (7, 7)
        assert delivery.delivered == journal.count
    assert {len(run.data.metrics) for key, run in runs_of(database).items() if key != JOB} == {2}


def test_trial_that_goes_on_is_running_and_ends_when_it_ended(database: str, tmp_path: Path) -> None:
    """Its driver was killed; delivery comes much later than the end, whether the reopening is delivered with it or before it."""
    path, key = tmp_path / "t.jsonl", f"{JOB}/00000"
    with Journal(path) as journal:
        journal.run(JOB, name="search")
        journal.run(key, name="L0", parent=JOB)
        journal.metrics(key, {"train/loss": 1.0}, 0)
    with Journal(path) as journal:
        assert journal.finish_unfinished("KILLED") == [JOB, key]
        journal.run(JOB, name="search")
        journal.run(key, name="L0", parent=JOB)
        delivery = Delivery(target(database, tmp_path), journal)
        delivery.step()
        assert {run.info.status for run in runs_of(database).values()} == {"RUNNING"}
        journal.metrics(key, {"train/loss": 0.5}, 1)
        journal.finish(key, "FINISHED")
        ended = journal.events()[-1][0]["time"]
        journal.run(key, name="L0", parent=JOB)
        delivery.step()
        assert runs_of(database)[key].info.status == "RUNNING"
        journal.finish(key, "KILLED")
        journal.tags(key, {"distillery.state": "stopped early"})
        ended = next(event["time"] for event, _ in reversed(journal.events()) if event["kind"] == "finish")
        delivery.step()
    run = runs_of(database)[key]
    assert (run.info.status, run.info.end_time, run.data.tags["distillery.state"]) == ("KILLED", ended, "stopped early")
    assert history(database, run, "train/loss") == [(0, 1.0), (1, 0.5)]


@databases
def test_parameter_that_a_person_set_does_not_hold_up_the_rest(database: str, tmp_path: Path) -> None:
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="search")
        deliver(target(database, tmp_path), journal)
        mlflow.MlflowClient(database).log_param(runs_of(database)[JOB].info.run_id, "seed", "7")
        journal.params(JOB, {"seed": 0, "trials": 16})
        journal.metrics(JOB, {"search/front": 3.0}, 0)
        journal.tags(JOB, {"role": "search"})
        deliver(target(database, tmp_path), journal)
    run = runs_of(database)[JOB]
    assert run.data.params == {"seed": "7", "trials": "16"}
    assert (run.data.metrics, run.data.tags["role"]) == ({"search/front": 3.0}, "search")


def test_recorded_is_read_without_mlflow(database: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert links.recorded(path) is None
    with Journal(path) as journal:
        journal.run(JOB, name="search")
        assert links.recorded(path) is None
        deliver(target(database, tmp_path), journal)
        run_id = runs_of(database)[JOB].info.run_id
        script = "import sys; from cluster.links import recorded; from pathlib import Path; print(recorded(Path(sys.argv[1])).runs, *sys.modules)"
        command = [sys.executable, "-c", script, str(path)]
        answer = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    assert answer.startswith(f"{{'{JOB}': '{run_id}'}} ")
    assert "mlflow" not in answer.split()
    path.unlink()
    with Journal(path):
        assert links.recorded(path) is None, "of another journal"
