"""The same job and search on one node and, submitted, on three with MLflow on PostgreSQL: the same results, and every run recorded once."""

from __future__ import annotations

import json

import pytest

from tests.jobs import three
from tests.jobs.place import furnished
from tests.servers import Postgres, Server, until, without_postgres

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRIALS = 50
ENDS = 10
"""Trials that have ended when a node is lost."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return furnished(tmp_path_factory.mktemp("user"))


@pytest.fixture(scope="module")
def postgres():
    if why := without_postgres():
        pytest.skip(why)
    postgres = Postgres()
    try:
        postgres.start()
        yield postgres
    finally:
        postgres.close()


@pytest.fixture(scope="module")
def server(postgres, tmp_path_factory):
    server = Server(postgres.create("mlflow"), tmp_path_factory.mktemp("mlflow"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="module")
def cluster(place, server):
    """The job on three nodes. In the middle of the search one of them is lost, and another one joins."""
    with three.three_nodes() as nodes:

        def lose(outcome):
            three.ended(outcome, ENDS)
            nodes.kill(nodes.processes[2])
            until(lambda: sum(one["state"] == "ALIVE" for one in nodes.summary()) == 2, 60)  # else the one that joins is a fourth
            three.join(nodes, "replacement", "student")

        yield three.on_three_nodes(place, nodes, TRIALS, server.uri, lose)


def test_every_run_is_in_postgres_once(cluster, postgres):
    """Counted by SQL against the two journals."""
    assert len(cluster.search.of_role("trial")) == TRIALS
    assert {trial.state for trial in cluster.search.trials} == {"finished"}
    said = [json.loads(line) for path in cluster.journals for line in path.read_text().splitlines()]
    runs = {event["key"]: event["parent"] for event in said if event["kind"] == "run"}
    assert len(runs) == 4 + 2 + len(cluster.search.trials)  # job, teacher, student, baseline; search, teacher, its trainings
    found = postgres.query(
        "mlflow",
        "SELECT k.value, p.value, r.status FROM runs r JOIN tags k ON k.run_uuid = r.run_uuid AND k.key = 'distillery.run' "
        "LEFT JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = 'mlflow.parentRunId' "
        "LEFT JOIN tags p ON p.run_uuid = t.value AND p.key = 'distillery.run'",
    )
    assert sorted(found) == sorted((key, parent, "FINISHED") for key, parent in runs.items())
    assert postgres.query("mlflow", "SELECT count(*) FROM runs") == [(len(runs),)]
    params = {(event["key"], name) for event in said if event["kind"] == "params" for name in event["values"]}
    assert postgres.query("mlflow", "SELECT count(*) FROM params") == [(len(params),)]
    points = [(event["key"], name, event["step"]) for event in said if event["kind"] == "metrics" for name in event["values"]]
    assert len(points) == len(set(points))
    counted = postgres.query("mlflow", "SELECT count(*), count(DISTINCT (run_uuid, key, step)) FROM metrics")
    assert counted == [(len(points), len(points))]


def test_trials_run_on_both_nodes_and_each_node_has_curves_of_its_own(cluster, postgres):
    assert f"search: {TRIALS} trials, 4 at once" in cluster.said[1]  # each node has two processors
    names = {name for (name,) in postgres.query("mlflow", "SELECT DISTINCT key FROM latest_metrics WHERE key LIKE 'system/%'")}
    nodes = {name.split("/")[1] for name in names}
    assert nodes == {"node_0", "node_1", "node_2"}  # the node that joined has the number of the one that was lost
    for node in nodes:
        assert {f"system/{node}/{name}" for name in ("cpu_utilization_percentage", "system_memory_usage_percentage")} <= names
    tagged = dict(postgres.query("mlflow", "SELECT key, value FROM tags WHERE key LIKE 'distillery.node#_%' ESCAPE '#'"))
    assert sorted(tagged) == [f"distillery.node_{number}" for number in range(3)]
    assert [("role=teacher" in value, "role=student" in value) for _, value in sorted(tagged.items())] == [
        (False, False), (False, True), (True, False),
    ]  # fmt: skip


def test_three_nodes_give_what_one_gives_in_less_than_ten_minutes(place, cluster):
    assert cluster.seconds < 600
    assert three.differences(cluster, three.on_one_node(place, TRIALS)) == []
