"""The main job: corpus -> teacher -> targets -> students -> evidence, under one run in MLflow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cluster.delivery import Tracker, deliver
from cluster.journal import Journal
from cluster.preflight import require_shared
from cluster.session import connect
from cluster.system import watched
from cluster.tracking import Target
from distillation.errors import DistilleryError
from distillation.metrics import headline
from jobs import report, stages
from jobs.config import JobConfig
from jobs.plan import Plan, make_plan
from jobs.progress import Progress
from jobs.stages import Context

COLUMNS = ("test/retention", "test/agreement", "cost/parameters", "cost/latency_ms_p50", "test/nll")
"""Shown beside the runs in MLflow, after the metric that the task is about."""

STAGES: dict[str, tuple[Callable[[Context], object], ...]] = {
    "prepare": (stages.prepare,),
    "teach": (stages.prepare, stages.teach),
    "distill": (stages.prepare, stages.teach, stages.distill),
}
"""What comes before evaluation, by the verb that stops there."""


def run(job: JobConfig, console: Console, until: str = "export") -> None:
    """Carry out a job up to a stage: prepare, teach, distill, evaluate or export (all of it)."""
    plan = make_plan(job)
    parent = f"{job.name}/{plan.fingerprint}"
    with recorded(plan, console, plan.results, plan.workspace / "journal.jsonl", parent, target_of(job)) as (context, tracker):
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
def recorded(
    plan: Plan, console: Console, folder: Path, journal_path: Path, parent: str, target: Target
) -> Iterator[tuple[Context, Tracker]]:
    """Ray, the journal and its delivery, for as long as the block lasts. folder: of its results; an error of ours is written there, too.

    parent: key of the run.
    """
    plan.storage.require_writable(need_bytes=500_000_000)
    folder.mkdir(parents=True, exist_ok=True)
    with Journal(journal_path) as journal:
        journal.finish_unfinished("KILLED")  # what a killed driver left open; what goes on is opened again
        context = Context(plan, journal, Progress(console), parent, folder)
        with Tracker(target, journal) as tracker:
            try:
                stages.begin(context)
                with connect(plan.job.cluster), watched(journal, parent):
                    if plan.job.cluster.address:
                        require_shared(plan.storage.uri)
                    yield context, tracker
            except DistilleryError as error:
                journal.tags(context.parent, {"distill.error": str(error)})
                (folder / "error.json").write_text(json.dumps(error.as_dict(), indent=1), encoding="utf-8")
                raise


def sync(job: JobConfig) -> int:
    """Deliver what waits in the journals of a job and of its search. Returns the number of events."""
    from jobs.search import folder_of, target_of_search

    waiting = {job.workspace / "journal.jsonl": target_of(job)}
    if job.search is not None:
        waiting[folder_of(job) / "journal.jsonl"] = target_of_search(job)
    count = 0
    for path, target in waiting.items():
        if path.is_file():
            with Journal(path) as journal:
                count += deliver(target, journal)
    return count


def tracking_uri(job: JobConfig) -> tuple[str, str | None]:
    """MLflow's store for a job, and the folder for its files where it has no server."""
    if job.tracking.uri:
        return job.tracking.uri, None
    root = Path(job.cluster.storage).expanduser().resolve()
    return f"sqlite:///{root}/mlflow.db", str(root / "mlartifacts")


def target_of(job: JobConfig) -> Target:
    uri, artifacts = tracking_uri(job)
    note = f"Distillation of `{job.lead.model}` into {', '.join(job.all_students)}. Each student stands beside its baseline: "
    note += "the same start and number of steps without the teacher."
    return Target(job.tracking, uri, job.name, artifacts, note, (f"test/{headline(job.task.type)}", *COLUMNS))


def _links(context: Context, tracker: Tracker, places: dict[str, Path]) -> None:
    """Where to look."""
    console, plan = context.progress.console, context.plan
    console.print()
    for name, path in places.items():
        console.print(f"{name:<16}{path}", markup=False, soft_wrap=True)
    keys = [context.key(name) for name in [plan.lead, *(run.name for run in plan.runs)]]
    for title, url in (("MLflow runs", tracker.experiment_url()), ("MLflow compare", tracker.compare_url(keys))):
        if url:
            console.print(f"{title:<16}{url}", markup=False, soft_wrap=True)
    if not plan.job.tracking.uri:
        console.print(f"{'':<16}start the pages with: distill ui --storage {plan.job.cluster.storage}", markup=False, soft_wrap=True)
