"""Models on the test split: who answers it, and where. Answers and costs themselves are `distillation.evaluate`'s."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray

from cluster import training
from cluster.config import ClusterConfig
from cluster.config import Role as ClusterRole
from cluster.session import cpus_per_worker, unwrap
from distillation import fit, store
from distillation.columns import Columns
from distillation.config import TaskConfig
from distillation.errors import ClusterError
from distillation.evaluate import Candidate, Evaluation, Role, answers
from distillation.evaluate import evaluate as evaluate_models
from distillation.gathering import Gathered, Share, together
from distillation.in_step import evaluate_in_step
from distillation.rows import open_columns
from distillation.storage import Storage
from jobs.plan import Plan, Reading, Stage
from jobs.progress import Progress

SHARE_ROWS = 8192
"""Rows of the test split for which another worker pays: each has to load all models."""


class Tested(NamedTuple):
    """A model that is evaluated, with the name of its baseline if it has one."""

    role: Role
    name: str
    baseline: str | None
    stage: Stage
    reading: Reading | None = None


def on_test_split(plan: Plan, progress: Progress, tested: Sequence[Tested], cluster: ClusterConfig | None = None) -> list[Evaluation]:
    """Evaluate these models, or find that it was done: with other models, settings or threads it is done anew. cluster: else the job's."""
    job, cluster = plan.job, cluster or plan.job.cluster
    role = _cut(cluster) or "student"
    made_from = {
        "models": {one.name: one.stage.fingerprint for one in tested}, "corpus": plan.corpus.fingerprint, "task": job.task.type,
        "settings": job.evaluation.model_dump(),
        "threads": job.evaluation.threads or cpus_per_worker(cluster, role), "gpus": cluster.group(role).gpus,
    }  # fmt: skip
    if _cut(cluster) is not None:
        group = cluster.group(role)
        made_from["cut"] = [role, group.least, group.most, cluster.group("teacher").shards, cluster.group("student").shards]
    stage = f"evaluations/{store.fingerprint(made_from)}.json"
    if (known := _read_evaluation(plan.storage, stage)) is not None:
        progress.found("evaluation")
        return known
    with progress.stage("evaluation on the test split"):
        found = _evaluated(plan, tested, cluster)
        plan.storage.write(stage, json.dumps([e.model_dump(mode="json") for e in found], indent=1).encode())
    return found


def _read_evaluation(storage: Storage, path: str) -> list[Evaluation] | None:
    """What was found before; None where there is nothing, or nothing that this release wrote."""
    try:
        return [Evaluation.model_validate(e) for e in json.loads(storage.read(path))]
    except (FileNotFoundError, ValueError):
        return None


def _evaluated(plan: Plan, tested: Sequence[Tested], cluster: ClusterConfig) -> list[Evaluation]:
    """Evaluate in Ray tasks that have what a training worker has: the answers in several where there are many rows, costs in one. Models that
    no worker holds whole are evaluated by a group of workers.
    """
    job = plan.job
    candidates = [((one.role, one.baseline), one.name, one.stage.folder, one.reading and one.reading.stage.folder) for one in tested]
    what = cluster.storage, plan.corpus.folder, candidates, job.task, plan.labels(), job.evaluation.model_dump()
    try:
        if (role := _cut(cluster)) is None:
            return _on_workers(plan, cluster, what)
        payload = {"key": job.name, "what": what, "cut": [one.name for one in tested if cluster.group(_held_by(one)).shards != 1]}
        found: list[Evaluation] = training.run_workers(_evaluate_worker, payload, cluster, role, lambda *_: None)
        return found
    except ray.exceptions.RayError as error:
        raise unwrap(error) or _failed(str(error).strip().splitlines()[-1]) from error
    except ClusterError as error:
        raise _failed(error.found) if error.code == "DST-6003" else error from error


def _failed(found: str) -> ClusterError:
    do = "Run again; if memory ran out, lower evaluation.batch_tokens"
    return ClusterError("DST-6004", "a worker failed", where="evaluation", found=found, do=do)


def _held_by(one: Tested) -> ClusterRole:
    return "teacher" if one.role == "teacher" else "student"


def _cut(cluster: ClusterConfig) -> ClusterRole | None:
    """Whose workers evaluate, where there are models that none of them holds whole."""
    roles: tuple[ClusterRole, ...] = ("teacher", "student")
    return next((role for role in roles if cluster.group(role).shards != 1), None)


def _evaluate_worker(payload: dict[str, Any]) -> list[Evaluation]:
    """Runs on every worker of a group."""
    *where, task, labels, settings = payload["what"]
    session = training.TrainSession(payload["box"], payload["key"], payload["shards"])
    settings = {**settings, "threads": settings["threads"] or payload["threads"]}
    opened, _ = _opened(*where, settings["threads"])
    if session.mesh is None:  # a group that has one worker now holds everything whole
        return evaluate_models(*opened, task, labels, device=session.device.type, **settings) if session.rank == 0 else []
    return evaluate_in_step(*opened, task, labels, payload["cut"], session, **settings)


def _on_workers(plan: Plan, cluster: ClusterConfig, what: tuple[Any, ...]) -> list[Evaluation]:
    corpus = plan.found(plan.corpus)
    assert corpus is not None
    group, cpus = cluster.group("student"), cpus_per_worker(cluster, "student")
    where = {"num_cpus": cpus, "num_gpus": group.gpus, "label_selector": group.labels, "max_retries": cluster.max_failures}
    shares, found = min(group.most, -(-corpus.rows("test") // SHARE_ROWS)), None
    if shares > 1:
        asked = ray.remote(**where)(answer_task)
        found = together(ray.get([asked.remote(*what, cpus, (share, shares)) for share in range(shares)]))
    evaluations: list[Evaluation] = ray.get(ray.remote(**where)(evaluate_task).remote(*what, cpus, found))
    return evaluations


def answer_task(
    uri: str, corpus: str, candidates: list[Any], task: TaskConfig, labels: tuple[str, ...], settings: dict[str, Any], cpus: int,
    share: tuple[int, int],
) -> Share:  # fmt: skip
    """Runs on a node: what the models say about a share of the test split."""
    opened, device = _opened(uri, corpus, candidates, settings["threads"] or cpus)
    return answers(*opened, task, labels, share, batch_tokens=settings["batch_tokens"], precision=settings["precision"], device=device)


def evaluate_task(
    uri: str, corpus: str, candidates: list[Any], task: TaskConfig, labels: tuple[str, ...], settings: dict[str, Any], cpus: int,
    found: dict[str, Gathered] | None,
) -> list[Evaluation]:  # fmt: skip
    """Runs on a node: open the test split and the models there, and evaluate."""
    opened, device = _opened(uri, corpus, candidates, settings["threads"] or cpus)
    settings = {**settings, "threads": settings["threads"] or cpus}
    return evaluate_models(*opened, task, labels, found=found, device=device, **settings)


def _opened(uri: str, corpus: str, candidates: list[Any], threads: int) -> tuple[tuple[list[Candidate], Columns], str]:
    """Models and rows, and the device for them."""
    import torch

    torch.set_num_threads(threads)
    storage = Storage(uri)
    models_ = [
        Candidate(role, name, fit.model_folder(storage, folder), baseline, open_columns(storage, own, "corpus", "test") if own else None)
        for (role, baseline), name, folder, own in candidates
    ]
    return (models_, open_columns(storage, corpus, "corpus", "test")), "cuda" if torch.cuda.is_available() else "cpu"
