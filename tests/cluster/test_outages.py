"""MLflow on PostgreSQL, and what goes wrong there in each phase of a job. Counted by SQL: everything is there, and once."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from tests.cluster.recording import JOB, STUDENT, runs_of, target
from tests.servers import ROOT, Postgres, Server, until

postgres_only = pytest.mark.parametrize("database", ["postgres"], indirect=True)


def name_of(database: str) -> str:
    return database.split("///")[1].split("?")[0]


def counted(postgres: Postgres, database: str) -> dict[str, int]:
    """Rows of each table, and of what must not be there twice."""
    sql = {
        "runs": "SELECT count(*) FROM runs", "keys": "SELECT count(DISTINCT value) FROM tags WHERE key = 'distillery.run'",
        "children": "SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId'", "params": "SELECT count(*) FROM params",
        "points": "SELECT count(*) FROM metrics", "steps": "SELECT count(DISTINCT (run_uuid, key, step)) FROM metrics",
        "ended": "SELECT count(*) FROM runs WHERE status = 'FINISHED'",
    }  # fmt: skip
    return {name: postgres.query(name_of(database), query)[0][0] for name, query in sql.items()}


@postgres_only
def test_an_outage_in_every_phase(
    server: Server, database: str, postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No server at the start, the database killed in the training, a server that hangs in the search, the database killed at the end."""
    slowest = 0.0
    with Journal(tmp_path / "t.jsonl") as journal:
        with Tracker(target(server.uri), journal) as tracker:

            def phase(name: str, trials: range, steps: int = 300) -> None:
                nonlocal slowest
                for number in trials:
                    key = f"{JOB}/{name}-{number}"
                    journal.run(key, name=name, parent=JOB, tags={"role": "trial"})
                    journal.params(key, {"losses.soft.weight": number / 8, "seed": number})
                    for step in range(steps):
                        before = time.perf_counter()
                        journal.metrics(key, {"train/loss": step / 8, "validation/accuracy": step / 512}, step)
                        slowest = max(slowest, time.perf_counter() - before)
                    journal.finish(key, "FINISHED")

            journal.run(JOB, name="docstrings")
            phase("corpus", range(1))
            until(lambda: "cannot be used" in caplog.text, 30)
            server.start()
            until(lambda: tracker.run_url(f"{JOB}/corpus-0"), 60)
            phase("training", range(5))
            time.sleep(0.7)  # delivery of these is under way
            postgres.kill()
            phase("training", range(5, 10))
            time.sleep(3)
            postgres.start()
            until(lambda: tracker.run_url(f"{JOB}/training-9"), 60)
            server.hang()
            phase("search", range(20), steps=20)
            time.sleep(7)  # longer than a request may take
            server.go_on()
            until(lambda: tracker.run_url(f"{JOB}/search-19"), 60)
            phase("end", range(3))
            postgres.kill()
            journal.finish(JOB, "FINISHED")
            ended = time.monotonic()
        assert time.monotonic() - ended < 15
        assert "events wait" in caplog.text
        assert slowest < 0.25, f"recording took {slowest * 1000:.1f} ms"
    postgres.start()
    script = f"""
from pathlib import Path
from cluster.config import TrackingConfig
from cluster.delivery import deliver
from cluster.journal import Journal
from cluster.tracking import Target
with Journal(Path({str(tmp_path / "t.jsonl")!r})) as journal:
    deliver(Target(TrackingConfig(uri={server.uri!r}), "", "docstrings", None), journal)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=120)
    trials, points = 1 + 10 + 20 + 3, 2 * (14 * 300 + 20 * 20)
    assert counted(postgres, database) == {
        "runs": 1 + trials, "keys": 1 + trials, "children": trials, "params": 2 * trials, "points": points, "steps": points,
        "ended": 1 + trials,
    }  # fmt: skip


@postgres_only
def test_a_database_that_became_a_replica_is_away_and_nothing_is_left_out(
    database: str, postgres: Postgres, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """MLflow answers 400 then, as to a request that is wrong."""

    def read_only(value: str) -> None:
        postgres.query("postgres", f"ALTER DATABASE {name_of(database)} SET default_transaction_read_only = {value}")
        postgres.query("postgres", f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name_of(database)}'")

    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings")
        deliver(target(database, tmp_path), journal)
        with Tracker(target(database, tmp_path), journal):
            read_only("on")
            journal.params(JOB, {"seed": 0})
            journal.metrics(JOB, {"loss": 0.5}, 1)
            journal.run(STUDENT, name="L3", parent=JOB)
            until(lambda: "ReadOnlySqlTransaction" in caplog.text, 30)
            read_only("off")
            until(lambda: "is back" in caplog.text, 30)
            journal.finish(STUDENT, "FINISHED")
            journal.finish(JOB, "FINISHED")
    assert "refused" not in caplog.text
    found = counted(postgres, database)
    assert found == {"runs": 2, "keys": 2, "children": 1, "params": 1, "points": 1, "steps": 1, "ended": 2}


@postgres_only
def test_what_postgres_cannot_hold_is_cut_or_written_otherwise(database: str, tmp_path: Path) -> None:
    """No NUL, and columns as wide as they were made: SQLite takes both."""
    odd, wide = "a\0b", "ä" * 30_000
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="docstrings", description=wide, tags={"odd": odd, "wide": wide})
        journal.params(JOB, {"odd": odd, "wide": wide, "n" * 300: 1})
        journal.metrics(JOB, {"m" * 300: 1e308, "small": 5e-324}, 2**40)
        journal.note(wide)
        deliver(target(database, tmp_path, note=wide), journal)
    run = runs_of(database)[JOB]
    assert (run.data.params["odd"], run.data.tags["odd"]) == ("a\\0b", "a\\0b")
    assert (len(run.data.params["wide"]), len(run.data.tags["wide"]), len(run.data.tags["mlflow.note.content"])) == (6000, 8000, 8000)
    assert sorted(run.data.metrics.values()) == [5e-324, 1e308]
    import mlflow

    note = mlflow.MlflowClient(database).get_experiment_by_name("docstrings").tags["mlflow.note.content"]
    assert note.endswith("[cut]")
