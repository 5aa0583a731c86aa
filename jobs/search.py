"""The search: one teacher pass, many students, the smallest that keeps what was asked for, and the page that shows why."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from cluster.delivery import Tracker
from cluster.links import Recorded, chart_url, compare_url, environment_tags, experiment_url
from cluster.links import recorded as recorded_runs
from cluster.session import cpus_per_worker
from cluster.tracking import Target
from distillation import export as exporting
from distillation import fit, models, store
from distillation.errors import ConfigError, ConflictError, InputError
from distillation.evaluate import Evaluation
from jobs import report as job_report
from jobs import stages
from jobs.config import JobConfig, dump, flat
from jobs.evaluation import Tested, on_test_split
from jobs.figures import front_picture
from jobs.pipeline import recorded, tracking_uri
from jobs.plan import Plan, Stage, make_plan
from jobs.progress import LOG_SECONDS
from jobs.stages import Context
from jobs.trainings import Trainings, cluster_of_trials
from tuning import insight, report, views
from tuning import search as tune
from tuning.config import METRICS, QUALITY, SearchConfig
from tuning.director import Director
from tuning.ledger import Ledger, Search, Trial
from tuning.pareto import Decision, choose, decide
from tuning.recording import Recorder
from tuning.schedulers import build_scheduler
from tuning.searchers import build_searcher

MAY_CHANGE = {
    "search": {
        "trials", "keep", "finalists", "seeds", "concurrent", "time_budget_s", "retry_failed", "workers_per_trial", "cpus_per_worker",
        "gpus_per_worker",
    },
    "cluster": True, "tracking": True, "evaluation": True,
}  # fmt: skip
"""Settings with which a search may go on: they change neither a trial's numbers nor which points are drawn."""


def folder_of(job: JobConfig) -> Path:
    """Where a search keeps its ledger, journal and pages, on the machine of the driver."""
    return job.workspace / "search"


def search(job: JobConfig, console: Console) -> None:
    """Carry out a search, or go on with it."""
    if job.search is None:
        raise ConfigError("DST-2018", "job has no search", where=job.name, expected="a section `search` with a space", found="none",
                          do="Add one: `distill recipes cp quickstart` shows how")  # fmt: skip
    plan = make_plan(job)
    plan.vary(job)
    folder = folder_of(job)
    made_from = {
        "job": job.model_dump(mode="json", exclude=MAY_CHANGE),
        "corpus": plan.corpus.fingerprint,
        "teacher": {name: stage.fingerprint for name, stage in plan.teachers.items()},
    }  # type: ignore[arg-type]
    fingerprint = store.fingerprint(made_from)
    with Ledger(folder / "ledger.jsonl") as ledger:
        _require_same(ledger.search, job, fingerprint)
        parent, target = f"{job.name}/search/{fingerprint}", target_of_search(job)
        with recorded(plan, console, folder, folder / "journal.jsonl", parent, target) as (context, tracker):
            _run(context, tracker, ledger, fingerprint)


def _run(context: Context, tracker: Tracker, ledger: Ledger, fingerprint: str) -> None:
    plan, job, console = context.plan, context.plan.job, context.progress.console
    assert job.search is not None
    concurrent = tune.require_room(job.search, job.cluster)
    stages.prepare(context)
    passes = sum(1 for stage in plan.targets.values() if not plan.found(stage))
    stages.teach(context)
    trainings = Trainings(plan, job.space())
    _require_metrics(job.search, trainings.reported)
    ledger.begin(job.name, job.model_dump(mode="json"), fingerprint, trainings.teacher, passes)
    assert ledger.search is not None
    recorder = Recorder(context.journal, context.parent)
    recorder.catch_up(ledger.search)
    context.journal.metrics(context.key(context.plan.lead), trainings.teacher, 0)
    director = Director(ledger, build_searcher(job.search, job.space()), trainings, recorder, lambda trial: _discard(plan, trial))
    _train(context, director, trainings, concurrent)
    console.print(f"{director.ran} trainings in this run. {views.teacher_passes(ledger.search)}", highlight=False)
    decision = director.decision()
    choice = choose(ledger.search, decision)
    ledger.choice(choice)
    evaluations = _test(context, ledger.search, choice)
    ledger.test([e.model_dump(mode="json") for e in evaluations])
    places = _publish(context, tracker, recorder, ledger.search, trainings, decision, evaluations)
    ledger.ended()
    stages.finish(context)
    console.print()
    console.print(views.leaderboard(ledger.search, decision, top=12))
    for sentence in views.summary(ledger.search, decision):
        console.print(sentence, markup=False)
    with context.progress.stage("delivering to MLflow"):
        tracker.close()
    _links(context, places, _addresses(tracker.recorded(), ledger.search, decision))


def _train(context: Context, director: Director, trainings: Trainings, concurrent: int) -> None:
    """Everything that is trained, with a board to look at meanwhile."""
    job = context.plan.job
    assert job.search is not None
    scheduler = build_scheduler(job.search, trainings.rows, rebuild=director.exploit)
    scheduler.replay(director.search)
    with context.progress.stage(f"search: {job.search.trials} trials, {concurrent} at once"), ExitStack() as stack:
        look = _looker(context, director, stack)
        tune.run(director, scheduler, job.cluster, concurrent, _shared(context, trainings), look)


def _shared(context: Context, trainings: Trainings) -> dict[str, Any]:
    """What every trial is given besides its own work."""
    job, search = context.plan.job, context.plan.job.search
    assert search is not None
    return {
        "job": job.name,
        "cluster": cluster_of_trials(job.cluster, search).model_copy(update={"storage": context.plan.storage.uri}).model_dump(mode="json"),
        "quality": search.quality, "maximise": QUALITY[search.quality] == "max",
        "teacher": {"metric": trainings.headline, "value": trainings.teacher.get(trainings.headline)},
        "evaluation": job.evaluation.model_dump(mode="json") | {"threads": _threads(job)},
    }  # fmt: skip


def _threads(job: JobConfig) -> int:
    """For latencies: the same in the search, in the evaluation of the finalists and in `distill run`."""
    return job.evaluation.threads or cpus_per_worker(job.cluster, "student")


def _looker(context: Context, director: Director, stack: ExitStack) -> Callable[[], None]:
    """What is called twice a second: a live board on a terminal, a plain line now and then in a log."""
    console, last = context.progress.console, [time.monotonic()]
    live = None
    if console.is_terminal:
        context.progress.pause()
        live = stack.enter_context(Live(console=console, auto_refresh=False, transient=True))

    def look() -> None:
        if live is None and time.monotonic() - last[0] < LOG_SECONDS:
            return
        last[0] = time.monotonic()
        with director.lock:
            decision, now = director.decision(), int(time.time() * 1000)
            if live is not None:
                live.update(views.board(director.search, decision, now), refresh=True)
            else:
                context.progress.note(views.status(director.search, decision, now))

    return look


def _require_same(known: Search | None, job: JobConfig, fingerprint: str) -> None:
    """A search goes on only as it began: otherwise its trials would not compare."""
    if known is None or known.fingerprint == fingerprint:
        return
    was, now = flat(known.job), flat(job.model_dump(mode="json"))
    fixed = flat(job.model_dump(mode="json", exclude=MAY_CHANGE))  # type: ignore[arg-type]
    changed = [f"{path}: {was.get(path)} -> {now.get(path)}" for path in sorted({*was, *now}) if was.get(path) != now.get(path)]
    changed = [line for line in changed if line.split(":")[0] in fixed or line.split(":")[0] not in now]
    raise ConflictError(
        "DST-8103", "search was begun with other settings", where=job.name, expected="the settings it began with",
        found="; ".join(changed) or "another corpus or teacher under the same settings",
        do="Set them back, or begin another search: name=another-name",
    )  # fmt: skip


def _require_metrics(config: SearchConfig, there: Collection[str]) -> None:
    """Refuse now what no trial could report. there: what each of them does, see `Trainings.reported`."""
    if missing := [name for name in (*config.objectives, *config.keep) if name in QUALITY and name not in there]:
        raise InputError(
            "DST-3503", "search asks for what cannot be measured", where="validation split", expected=", ".join(dict.fromkeys(missing)),
            found=f"labels and stored answers for {', '.join(there) or 'nothing'}",
            do="Add labels to the validation split, store what the teacher says (dense or topk), or search for what there is",
        )  # fmt: skip


def _discard(plan: Plan, trial: Trial) -> None:
    """A trial's numbers are in the ledger: its checkpoints are not needed any more. A failed one keeps them, to go on from."""
    if trial.task.role in ("trial", "baseline") and trial.state != "failed":
        fit.discard_checkpoints(plan.storage, trial.task.output)


def _test(context: Context, search: Search, choice: dict[str, Any]) -> list[Evaluation]:
    """The finalists' refits, their baselines and the teacher on the test split, which nothing has looked at before."""
    tested = [Tested("teacher", context.plan.lead, None, context.plan.teacher)]
    finalists = {finalist["trial"] for finalist in choice["finalists"]}
    done = [t for t in search.of_role("refit", "refit-baseline") if any(map(t.confirms, finalists)) and t.state == "finished"]
    baselines = {(number, t.task.seed): t for t in done if t.task.role == "refit-baseline" for number in finalists if t.confirms(number)}
    for trial in done:
        stage = Stage(f"students/{trial.task.fingerprint}", trial.task.fingerprint, {})
        if trial.task.role == "refit-baseline":
            tested.append(Tested("baseline", trial.task.name, None, stage))
        else:
            baseline = baselines.get((trial.task.of, trial.task.seed))
            tested.append(Tested("student", trial.task.name, baseline.task.name if baseline else None, stage))
    cluster = context.plan.job.cluster
    whole = cluster.model_copy(update={"student": cluster.student.model_copy(update={"shards": 1})})  # as the trials were
    evaluations = on_test_split(context.plan, context.progress, tested, whole)
    recorder, numbers = Recorder(context.journal, context.parent), {t.task.name: t.number for t in done}
    for e in evaluations:
        key = recorder.key(numbers[e.name]) if e.name in numbers else context.key(context.plan.lead)
        context.journal.metrics(key, {f"test/{name}": value for name, value in {**e.quality, **e.against}.items()}, 0)
    return evaluations


def _publish(
    context: Context, tracker: Tracker, recorder: Recorder, search: Search, trainings: Trainings, decision: Decision,
    evaluations: list[Evaluation],
) -> dict[str, Path]:  # fmt: skip
    """The champion's folder and job file, the page, and what MLflow shows of them."""
    choice, folder, journal = search.choice, context.folder, context.journal
    assert choice is not None
    models.quiet()
    best = trainings.best(search.trials[choice["trial"]], choice["seed"], _threads(context.plan.job))
    refit = search.trials[choice["refit"]]
    places = {"champion": folder / "champion", "best job": folder / "best.yaml", "report": folder / "report.html"}
    with context.progress.stage("export and report"):
        places["best job"].write_text(
            f"# {choice['reason']}\n# Reproduce it: distill run {places['best job'].name}\n{dump(best)}", encoding="utf-8"
        )
        plan = context.plan.vary(best)
        mine = next(e for e in evaluations if e.name == refit.task.name)
        shown = [e for e in evaluations if e.role == "teacher" or e.name in (mine.name, mine.baseline)]
        exporting.export(
            fit.model_folder(plan.storage, f"students/{refit.task.fingerprint}"), places["champion"], shown, stages.facts_of(plan),
            name=mine.name, verdict=job_report.verdicts(shown)[mine.name],
        )  # fmt: skip
        picture = front_picture(search, decision, folder / "front.png")
        write_report(search, decision, places["report"], _addresses(tracker.recorded(), search, decision))
        for path in (places["report"], places["best job"], picture):
            journal.file(context.parent, path)
        if context.plan.job.tracking.log_model:
            journal.model(
                recorder.key(refit.number), places["champion"], name="champion", input_example=stages.example_texts(plan),
                registered=search.name, alias="champion" if choice["kept"] or not search.config.keep else None,
            )  # fmt: skip
        journal.tags(context.parent, {"distillery.choice": choice["reason"], "distillery.champion": refit.task.name})
        counted = len(search.of_role("trial"))
        journal.metrics(context.parent, {"search/hypervolume": decision.hypervolume, "search/front": len(decision.front)}, counted)
        for trial in search.of_role("trial", "baseline", "refit", "refit-baseline"):
            if trial.state == "finished" and (latency := search.latencies.get(trial.task.student_key)):
                journal.metrics(recorder.key(trial.number), latency, 0)
        journal.note(_note(context, search, decision, picture))
    return places


def write_report(search: Search, decision: Decision, path: Path, links: dict[str, str]) -> Path:
    """The page of a search, as far as it is."""
    versions = {k.removeprefix("version."): v for k, v in environment_tags().items() if k.startswith("version.")}
    path.write_text(report.page(search, decision, insight.summary(search), links=links, versions=versions), encoding="utf-8")
    return path


def recorded_report(job: JobConfig, search: Search) -> dict[str, str]:
    """The page of what a ledger holds now, and where to look, by title."""
    folder, decision = folder_of(job), decide(search)
    links = _addresses(recorded_runs(folder / "journal.jsonl"), search, decision)
    return {"report": str(write_report(search, decision, folder / "report.html", links)), **links}


def _addresses(known: Recorded | None, search: Search, decision: Decision) -> dict[str, str]:
    """Pages of MLflow, by title, as far as what they show was delivered."""
    if known is None:
        return {}
    quality, where = search.config.quality, (known.uri, known.experiment_id)
    links = {
        "MLflow runs": experiment_url(*where),
        "MLflow charts": chart_url(*where, quality, ascending=QUALITY[quality] == "min"),
    }
    keys = [Recorder.key_of(f"{search.name}/search/{search.fingerprint}", number) for number in decision.front]
    if runs := [known.runs[key] for key in keys if key in known.runs]:
        links["MLflow compare"] = compare_url(*where, runs)
    return links


def _note(context: Context, search: Search, decision: Decision, picture: Path) -> str:
    """Markdown above the runs in MLflow: what was found, with the front as a picture."""
    assert search.choice is not None
    image = f"![Front](get-artifact?path={picture.name}&run_uuid={{run:{context.parent}}})"
    lines = [f"## {search.name}: {search.choice['name']}", search.choice["reason"], image, *views.summary(search, decision)]
    return "\n\n".join(lines)


def target_of_search(job: JobConfig) -> Target:
    """An experiment of its own beside that of `distill run`: its columns and its order are others."""
    uri, artifacts = tracking_uri(job)
    assert job.search is not None
    shown = [*job.search.objectives, *(name for name in job.search.keep if name not in job.search.objectives)]
    columns = (job.search.quality, *(name for name in shown if name != job.search.quality), *(c for c in ("cost/flops",) if c not in shown))
    note = f"Search over {', '.join(job.search.space)}: students of `{job.lead.model}`."
    return Target(job.tracking, uri, f"{job.name}-search", artifacts, note, columns, ascending=METRICS[columns[0]] == "min")


def _links(context: Context, places: dict[str, Path], addresses: dict[str, str]) -> None:
    console, job = context.progress.console, context.plan.job
    console.print()
    for name, place in {**places, **addresses}.items():
        console.print(f"{name:<16}{place}", markup=False, soft_wrap=True)
    if not job.tracking.uri:
        console.print(f"{'':<16}start the pages with: distill ui --storage {job.cluster.storage}", markup=False, soft_wrap=True)
