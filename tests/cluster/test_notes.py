"""What stands above the runs of an experiment: the note with its picture, the columns and their order."""

from __future__ import annotations

import json
import re
import shutil
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

import mlflow

from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from tests.cluster.recording import JOB, runs_of, target
from tests.servers import Server

NOTE = "mlflow.note.content"


def tags_of(uri: str) -> dict[str, str]:
    return dict(mlflow.MlflowClient(uri).get_experiment_by_name("docstrings").tags)


def test_note_of_the_journal_stays(database: str, empty_database: Path, tmp_path: Path) -> None:
    """The default holds until there is one; then the last one, also for later processes and in another database."""
    there = target(database, tmp_path, note="the default")
    path = tmp_path / "t.jsonl"
    with Journal(path) as journal:
        journal.run(JOB, name="search")
        deliver(there, journal)
        assert tags_of(database)[NOTE] == "the default"
        journal.note("first")
        journal.note(f"{{experiment}} {{run:{JOB}}} {{other}}")
        deliver(there, journal)
    final = f"1 {runs_of(database)[JOB].info.run_id} {{other}}"
    assert tags_of(database)[NOTE] == final
    with Journal(path) as journal, Tracker(there, journal):
        journal.run(JOB, name="search")
    assert tags_of(database)[NOTE] == final
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    with Journal(path) as journal:
        deliver(there, journal)
    assert tags_of(database)[NOTE] == f"1 {runs_of(database)[JOB].info.run_id} {{other}}" != final


def test_picture_in_a_note_is_served(server: Server, tmp_path: Path) -> None:
    """Its address is relative to the page, which is at the root of the server or of a proxy before it."""
    picture = tmp_path / "front.svg"
    picture.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with Journal(tmp_path / "t.jsonl") as journal:
        journal.run(JOB, name="search")
        journal.file(JOB, picture, "figures")
        journal.note(f"**L2** wins\n\n![front](get-artifact?path=figures%2Ffront.svg&run_uuid={{run:{JOB}}})")
        deliver(target(server.database, tmp_path), journal)
    server.start()
    address = re.search(r"!\[front\]\((.*)\)", tags_of(server.uri)[NOTE])[1]
    with urllib.request.urlopen(urljoin(f"{server.uri}/#/experiments/1", address), timeout=10) as answer:
        assert answer.read() == picture.read_bytes()
        assert answer.headers["Content-Type"].startswith("image/svg")


def test_columns_are_sorted_by_the_first(database: str, tmp_path: Path) -> None:
    with Journal(tmp_path / "t.jsonl") as journal:
        deliver(target(database, tmp_path, columns=("validation/nll", "cost/parameters"), ascending=True), journal)
        rising = tags_of(database)
        deliver(target(database, tmp_path, columns=("validation/accuracy", "cost/parameters")), journal)
        falling = tags_of(database)
    for tags, metric, ascending in ((rising, "validation/nll", True), (falling, "validation/accuracy", False)):
        view = json.loads(tags["mlflow.sharedViewState.distillery"])
        assert (view["orderByKey"], view["orderByAsc"]) == (f"metrics.`{metric}`", ascending)
        assert view["selectedColumns"][:2] == [f"metrics.`{metric}`", "metrics.`cost/parameters`"]
        assert tags["mlflow.experiment.primaryMetric.name"] == metric
        assert tags["mlflow.experiment.primaryMetric.greaterIsBetter"] == {True: "false", False: "true"}[ascending]
