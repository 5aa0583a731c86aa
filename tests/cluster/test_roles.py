"""Each kind of work runs on the nodes that have its labels, and is refused or waited for where there are none."""

from __future__ import annotations

import contextlib
import io
import time
from pathlib import Path

import pytest
import ray
import yaml
from ray.util.state import list_actors, list_tasks
from rich.console import Console

from jobs import pipeline
from jobs.config import load
from jobs.search import search
from tests.cluster import growing
from tests.jobs.place import JOB, furnished

ROOT = Path(__file__).resolve().parents[2]
# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = [
    pytest.mark.long,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),
]

CLUSTER = {
    "address": "auto", "storage": "storage",
    "teacher": {"workers": 1, "cpus_per_worker": 2, "labels": {"pool": "teacher"}},
    "student": {"workers": 2, "cpus_per_worker": 1, "labels": {"pool": "in(student, spare)"}},
    "data": {"labels": {"pool": "!in(teacher, student)"}},
}  # fmt: skip
SEARCH = {"space": {"losses.soft.weight": {"uniform": [0.1, 1.0]}}, "trials": 2, "finalists": 1, "seeds": 1, "keep": {}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = furnished(tmp_path_factory.mktemp("user"))
    changes = {"students": {}, "student": {"type": "layers", "layers": [0, 3]}, "baseline": False, "cluster": CLUSTER, "search": SEARCH}
    training = {"epochs": 1, "batch_tokens": 512, "learning_rate": 3e-3}
    teacher = {**JOB["teacher"], "training": training}
    (found.folder / "job.yaml").write_text(yaml.safe_dump({**JOB, **changes, "training": training, "teacher": teacher}))
    return found


@pytest.fixture(scope="module", autouse=True)
def nodes(place):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in growing.environment(place.folder / "home").items():
            patch.setenv(name, value)
        with growing.nodes(0, include_dashboard=True) as found:
            for pool, cpus in {"teacher": 2, "student": 2, "data": 1}.items():
                found.add(labels={"pool": pool}, num_cpus=cpus)
            found.cluster.wait_for_nodes(timeout=300)
            yield found


def cpus(resources):
    """Also of a place in a placement group, which are named after it."""
    return max((amount for name, amount in resources.items() if name.partition("_group_")[0] == "CPU"), default=0)


class Seen:
    """Where tasks and actors that hold CPUs ran, by the pool of the node."""

    def __init__(self):
        self.known = set()

    def new(self):
        """(what, pool, CPUs) of what ran since the last call."""
        pools = {node["NodeID"]: node["Labels"].get("pool", "head") for node in ray.nodes()}
        time.sleep(2)  # tasks are told about in the background
        found = [(one.task_id, one.name, one) for one in list_tasks(limit=5000, detail=True) if one.type == "NORMAL_TASK"]
        found += [(one.actor_id, one.class_name, one) for one in list_actors(limit=5000, detail=True)]
        new = [
            (name, pools[one.node_id], cpus(one.required_resources)) for key, name, one in found if key not in self.known and one.node_id
        ]
        self.known |= {key for key, *_ in found}
        return {one for one in new if one[2]}


def test_every_kind_of_work_lands_on_its_nodes(place, nodes):
    seen, console = Seen(), Console(file=io.StringIO(), width=120)
    with contextlib.chdir(place.folder):
        job = load("job.yaml")
        pipeline.run(job, console, "prepare")
        corpus = seen.new()
        assert len(corpus) > 3
        assert {pool for _, pool, _ in corpus} == {"data"}, corpus
        pipeline.run(job, console, "teach")
        assert seen.new() == {("RayTrainWorker", "teacher", 2.0)}
        pipeline.run(job, console, "evaluate")
        assert seen.new() == {("RayTrainWorker", "student", 1.0), ("evaluate_task", "student", 1.0)}
        search(job, console)
        trials = seen.new()
    assert {pool for _, pool, _ in trials} == {"student"}, trials
    assert any("ImplicitFunc" in name or "run_trial" in name for name, _, _ in trials)
