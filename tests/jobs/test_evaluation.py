"""Who evaluates, when it is done anew, and what a group of workers that fails says."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cluster.config import ClusterConfig
from distillation.errors import ClusterError
from distillation.storage import Storage
from jobs import evaluation
from tests.tiny import TASK

STAGES = [SimpleNamespace(folder=f"students/{name}", fingerprint=name) for name in ("t", "s")]
TESTED = [evaluation.Tested("teacher", "teacher", None, STAGES[0]), evaluation.Tested("student", "small", None, STAGES[1])]


def cluster(storage, **changes):
    return ClusterConfig(storage=str(storage), cpus_per_worker=1, **{"workers": 4, "address": "auto", **changes})


@pytest.fixture
def plan(tmp_path):
    settings = SimpleNamespace(model_dump=lambda: {"repeats": 10}, threads=None)
    job = SimpleNamespace(name="job", task=TASK, evaluation=settings, cluster=cluster(tmp_path))
    return SimpleNamespace(
        job=job, storage=Storage(str(tmp_path)), corpus=SimpleNamespace(folder="corpora/c", fingerprint="c"), labels=tuple
    )


def test_whose_workers_evaluate(tmp_path):
    cut = {"shards": 2}
    assert evaluation._cut(cluster(tmp_path)) is None
    assert evaluation._cut(cluster(tmp_path, teacher=cut)) == evaluation._cut(cluster(tmp_path, teacher=cut, student=cut)) == "teacher"
    assert evaluation._cut(cluster(tmp_path, student={"shards": "all"})) == "student"


def test_it_is_done_anew_where_other_workers_hold_the_models(plan, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(evaluation, "cpus_per_worker", lambda config, role: config.group(role).cpus)
    monkeypatch.setattr(evaluation, "_evaluated", lambda plan, tested, cluster: done.append(cluster) or [])
    progress = SimpleNamespace(found=lambda what: None, stage=lambda what: nullcontext())
    two, whole = {"shards": 2}, {}
    kinds = [
        {}, {"teacher": two}, {"teacher": two, "student": two}, {"student": two}, {"student": {"shards": "all"}},
        {"student": {"shards": "all", "workers": 2}}, {"teacher": {**two, "cpus_per_worker": 3}}, {"teacher": {**two, "gpus_per_worker": 1}},
    ]  # fmt: skip
    for changes in kinds + kinds + [whole]:
        evaluation.on_test_split(plan, progress, TESTED, cluster(tmp_path, **changes))
    assert len(done) == len(kinds)
    evaluation.on_test_split(plan, progress, TESTED)  # the job's own cluster is the first of them
    assert len(done) == len(kinds)


@pytest.mark.parametrize(("code", "told"), [("DST-6003", "DST-6004"), ("DST-6002", "DST-6002")])
def test_a_group_that_fails_gives_advice_for_an_evaluation(plan, tmp_path, monkeypatch, code, told):
    asked = {}

    def fails(worker, payload, config, role, record):
        asked.update(payload, role=role)
        raise ClusterError(code, "workers failed", found="RuntimeError: no memory left", do="it goes on from the last checkpoint")

    monkeypatch.setattr(evaluation.training, "run_workers", fails)
    with pytest.raises(ClusterError, match=rf"{told}.*no memory left") as error:
        evaluation._evaluated(plan, TESTED, cluster(tmp_path, student={"shards": 2}))
    assert ("batch_tokens" in str(error.value)) == (told == "DST-6004")
    assert (asked["role"], asked["cut"]) == ("student", ["small"])
