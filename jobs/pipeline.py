"""The main job: corpus -> teacher -> targets -> students -> evidence, under one run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from cluster.session import connect
from distillation.errors import DistilleryError
from jobs import report, stages
from jobs.config import JobConfig
from jobs.plan import Plan, make_plan
from jobs.progress import Progress
from jobs.stages import Context

COLUMNS = ("test/accuracy", "test/retention", "test/agreement", "cost/parameters", "cost/latency_ms_p50", "test/nll")
"""Shown beside the runs in MLflow; sorted by the first."""

STAGES: dict[str, tuple[Callable[[Context], object], ...]] = {
    "prepare": (stages.prepare,),
    "teach": (stages.prepare, stages.teach),
    "distill": (stages.prepare, stages.teach, stages.distill),
}
"""What comes before evaluation, by the verb that stops there."""


def run(job: JobConfig, console: Console, until: str = "export") -> None:
    """Carry out a job up to a stage: prepare, teach, distill, evaluate or export (all of it)."""
    plan = make_plan(job)
    with _recorded(plan, console) as (context, tracker):
        for stage in STAGES.get(until, STAGES["distill"]):
            stage(context)
        if until in STAGES:
            context.journal.finish_unfinished("FINISHED")
            return
        evaluations = stages.evaluate(context)
        places = stages.publish(context, evaluations) if until == "export" else {}
        stages.finish(context)
        console.print()
        console.print(report.table(evaluations))
        console.print(report.conditions(evaluations), style="dim", markup=False)
        for verdict in report.verdicts(evaluations).values():
            console.print(verdict, markup=False)
        with context.progress.stage("delivering to MLflow"):
            tracker.close()
        _links(context, tracker, places)


@contextmanager
def _recorded(plan: Plan, console: Console) -> Iterator[tuple[Context, Tracker]]:
    """Ray, the journal and its delivery, for one job. An error of ours is written beside the journal too."""
    plan.storage.require_writable(need_bytes=500_000_000)
    plan.results.mkdir(parents=True, exist_ok=True)
    progress = Progress(console)
    with Journal(plan.workspace / "journal.jsonl") as journal:
        journal.finish_unfinished("KILLED")  # what a killed driver left open; this job's own runs are opened again
        context = Context(plan, journal, progress)
        with tracker_of(plan, journal) as tracker:
            try:
                stages.begin(context)
                with connect(plan.job.cluster):
                    yield context, tracker
            except DistilleryError as error:
                journal.tags(context.parent, {"distill.error": str(error)})
                (plan.results / "error.json").write_text(json.dumps(error.as_dict(), indent=1), encoding="utf-8")
                raise


def tracker_of(plan: Plan, journal: Journal) -> Tracker:
    return Tracker(plan.job.tracking, journal, **_tracking(plan))


def sync(plan: Plan) -> int:
    """Deliver what waits in a job's journal. Returns the number of events."""
    with Journal(plan.workspace / "journal.jsonl") as journal:
        return deliver(plan.job.tracking, journal, **_tracking(plan))


def tracking_uri(job: JobConfig) -> tuple[str, str | None]:
    """MLflow's store for a job, and the folder for its files where it has no server."""
    if job.tracking.uri:
        return job.tracking.uri, None
    root = Path(job.cluster.storage).expanduser().resolve()
    return f"sqlite:///{root}/mlflow.db", str(root / "mlartifacts")


def _tracking(plan: Plan) -> dict[str, object]:
    uri, artifacts = tracking_uri(plan.job)
    note = f"Distillation of `{plan.job.teacher.model}` into {', '.join(plan.job.all_students)}. Each student stands beside its baseline: "
    note += "the same start and number of steps without the teacher."
    return {"default_uri": uri, "experiment": plan.job.name, "artifact_root": artifacts, "note": note, "columns": COLUMNS}


def _links(context: Context, tracker: Tracker, places: dict[str, Path]) -> None:
    """Where to look."""
    console, plan = context.progress.console, context.plan
    console.print()
    for name, path in places.items():
        console.print(f"{name:<16}{path}", markup=False, soft_wrap=True)
    keys = [context.key(name) for name in ["teacher", *(run.name for run in plan.runs)]]
    for title, url in (("MLflow runs", tracker.experiment_url()), ("MLflow compare", tracker.compare_url(keys))):
        if url:
            console.print(f"{title:<16}{url}", markup=False, soft_wrap=True)
    if not plan.job.tracking.uri:
        console.print(f"{'':<16}start the pages with: distill ui --storage {plan.job.cluster.storage}", markup=False, soft_wrap=True)
