"""One writer for each run, and what a job could not deliver: from another process, through the command line. No cluster is started."""

from __future__ import annotations

import pytest
import yaml

from cluster.journal import Journal
from tests.jobs.place import JOB, furnished
from tests.servers import Postgres, without_postgres


@pytest.fixture
def place(tmp_path):
    return furnished(tmp_path)


def refused(place, *arguments):
    process = place.start(*arguments)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 8, output
    assert "Traceback" not in output
    return output


def test_a_second_driver_of_a_job_is_refused_and_changes_nothing(place):
    path = place.folder / "storage" / "runs" / "tiny" / "journal.jsonl"
    with Journal(path) as journal:
        journal.run("tiny", name="tiny")
        before = path.read_bytes()
        for verb in ("run", "sync"):
            output = refused(place, verb, "job.yaml")
            assert "error[DST-8101]: another process records this job" in output
            assert str(path) in output
            assert "Wait until it has ended, or stop it" in output
        assert path.read_bytes() == before


@pytest.mark.skipif(without_postgres() != "", reason=without_postgres())
def test_sync_delivers_once_to_postgres_what_a_job_and_its_search_left(place):
    search = {"space": {"losses.soft.weight": {"uniform": [0, 1]}}, "trials": 2, "keep": {"validation/accuracy": 0.5}}
    postgres = Postgres()
    try:
        postgres.start()
        student = {"student": JOB["students"]["cut"], "tracking": {"uri": postgres.create("mlflow")}, "search": search}
        (place.folder / "job.yaml").write_text(yaml.safe_dump({**{k: v for k, v in JOB.items() if k != "students"}, **student}))
        workspace = place.folder / "storage" / "runs" / "tiny"
        for path, runs in ((workspace / "journal.jsonl", 3), (workspace / "search" / "journal.jsonl", 5)):
            with Journal(path) as journal:
                for number in range(runs):
                    key = f"{path.parent.name}/{number}"
                    journal.run(key, name=str(number), parent=f"{path.parent.name}/0" if number else None)
                    journal.params(key, {"seed": number})
                    for step in range(10):
                        journal.metrics(key, {"train/loss": step / 8}, step)
                    journal.finish(key, "FINISHED")
        # The name of a journal, and of each run three events about it and ten points.
        assert place.run("sync", "job.yaml")[0].strip() == f"{2 + 8 * 13} events delivered"
        assert place.run("sync", "job.yaml")[0].strip() == "0 events delivered"
        assert postgres.query("mlflow", "SELECT count(*), count(DISTINCT experiment_id) FROM runs WHERE status = 'FINISHED'") == [(8, 2)]
        assert postgres.query("mlflow", "SELECT count(*), count(DISTINCT (run_uuid, step)) FROM metrics") == [(80, 80)]
        assert postgres.query("mlflow", "SELECT count(*) FROM params") == [(8,)]
    finally:
        postgres.close()
