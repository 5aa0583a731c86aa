"""The stages of a job, in the order of the data. Each finds what is finished, goes on with what is half done, and records what it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import teaching, training
from cluster.corpus import prepare as prepare_corpus
from cluster.journal import Journal
from cluster.links import environment_tags
from distillation import curves, fit, models, store
from distillation import export as exporting
from distillation.config import ONLY
from distillation.evaluate import Evaluation
from distillation.rows import open_columns
from jobs import report
from jobs.config import dump, flat
from jobs.estimate import require_budget
from jobs.evaluation import Tested, on_test_split
from jobs.figures import figures
from jobs.plan import Plan, Reading, Stage, require_possible
from jobs.progress import Progress


@dataclass(frozen=True)
class Context:
    """What every stage works with."""

    plan: Plan
    journal: Journal
    progress: Progress
    parent: str
    """Key of the job's run; a changed job is another run."""
    folder: Path
    """Local folder of the report and of all that belongs to this run."""

    def key(self, name: str) -> str:
        return f"{self.parent}/{name}"

    def record(self, key: str, metrics: Mapping[str, float], step: int) -> None:
        self.journal.metrics(key, metrics, step)
        self.progress.point(metrics, step)


def begin(context: Context) -> None:
    """Declare the job's run, with the settings as they were written."""
    plan, journal = context.plan, context.journal
    tags = {**environment_tags(), "distillery.fingerprint": plan.fingerprint}
    journal.run(context.parent, name=plan.job.name, tags=tags)
    journal.params(context.parent, flat(plan.job.model_dump(mode="json", exclude={"cluster", "tracking"})))
    config = context.folder / "job.yaml"
    config.write_text(dump(plan.job), encoding="utf-8")
    journal.file(context.parent, config)


def prepare(context: Context) -> store.Manifest:
    """Corpus: read, identify, deduplicate, split, tokenise, write parts."""
    plan, progress = context.plan, context.progress
    require_budget(plan)
    require_possible(plan)
    if (manifest := plan.found(plan.corpus)) is not None:
        progress.found(_corpus_line(manifest))
    else:
        with progress.stage("corpus"):
            manifest = prepare_corpus(
                plan.job.corpus, plan.job.task, plan.model, plan.storage, fingerprint=plan.corpus.fingerprint,
                made_from=plan.corpus.made_from, progress=progress.note, nodes=plan.job.cluster.data.labels,
            )  # fmt: skip
        progress.note(_corpus_line(manifest))
    for reading in plan.readings:
        _read(context, reading)
    context.journal.dataset(context.parent, "corpus", manifest.fingerprint, plan.storage.path(plan.corpus.folder), "training")
    return manifest


def _read(context: Context, reading: Reading) -> None:
    """The same rows in the tokens of a student's own tokenizer."""
    plan, progress, title = context.plan, context.progress, f"reading of the corpus by {reading.tokenizer.name}"
    if (manifest := plan.found(reading.stage)) is not None:
        progress.found(title)
    else:
        with progress.stage(title):
            manifest = prepare_corpus(
                plan.job.corpus, plan.job.task, plan.model, plan.storage, fingerprint=reading.stage.fingerprint,
                made_from=reading.stage.made_from, progress=lambda _: None, nodes=plan.job.cluster.data.labels, reader_dir=reading.tokenizer,
            )  # fmt: skip
    cut = (
        f"; {manifest.facts['truncated']:,} rows are longer than task.max_length in them and are cut" if manifest.facts["truncated"] else ""
    )
    progress.note(f"{title}: {sum(manifest.tokens(split) for split in manifest.splits):,} tokens of its own{cut}")


def teach(context: Context) -> None:
    """Teachers: train those that the job says to train; then let each answer every row, once."""
    plan, progress = context.plan, context.progress
    require_budget(plan)
    for name in plan.teachers:
        _train_teacher(context, name)
    if not plan.job.asked_teachers:
        progress.note("no loss asks the teacher: it is not run over the corpus")
    for name, stage in plan.targets.items():
        _answer(context, name, stage)


def _train_teacher(context: Context, name: str) -> None:
    plan, progress, job = context.plan, context.progress, context.plan.job
    teacher, stage, key = job.all_teachers[name], plan.teachers[name], context.key(name)
    context.journal.run(key, name=name, parent=context.parent, tags={"role": "teacher"})
    if plan.found(stage):
        progress.found(name if name == ONLY else f"teacher {name}")
    elif teacher.training:
        with progress.stage(f"{name}: fine-tuning {teacher.model}"):
            training.train(plan.teacher_fit(name), stage.made_from, job.cluster, context.record, key, "teacher")
    else:
        with progress.stage(f"{name}: {teacher.model}"):
            fit.adopt(
                plan.storage, plan.models[name], job.task, plan.labels(), stage.folder, stage.fingerprint, stage.made_from,
                pickled=teacher.pickled_weights, sharded=job.cluster.group("teacher").shards != 1,
            )  # fmt: skip
    _describe_model(context, key, stage)


def _answer(context: Context, name: str, stage: Stage) -> None:
    plan, progress, job = context.plan, context.progress, context.plan.job
    teacher, whose = job.all_teachers[name], "the teacher" if name == ONLY else name
    if (manifest := plan.found(stage)) is not None:
        progress.found(f"targets of {manifest.facts['rows_answered']:,} rows" + ("" if name == ONLY else f" by {name}"))
    else:
        with progress.stage(f"targets: {whose} answers every row, once"):
            manifest = teaching.teach(
                job.task, job.targets(name), plan.teachers[name].folder, plan.corpus.folder, stage.folder,
                fingerprint=stage.fingerprint, made_from=stage.made_from, batch_tokens=teacher.batch_tokens,
                precision=teacher.precision, cluster=job.cluster, record=context.record, key=context.key(name),
            )  # fmt: skip
        progress.note(f"{manifest.facts['rows_answered']:,} rows answered, {manifest.total_bytes() / 1e6:.1f} MB")
    context.journal.dataset(context.parent, "targets", manifest.fingerprint, plan.storage.path(stage.folder), "teacher")


def distill(context: Context) -> None:
    """Students, each followed by the same student without distillation."""
    plan, progress = context.plan, context.progress
    for line in layer_table(plan):
        progress.note(line)
    for run in plan.runs:
        key = context.key(run.name)
        context.journal.run(key, name=run.name, parent=context.parent, tags={"role": run.role})
        settings = {
            "student": run.student.model_dump(mode="json"),
            "losses": {n: loss.model_dump(mode="json") for n, loss in run.losses.items()},
        }
        context.journal.params(key, flat(settings))
        if plan.found(run.stage):
            progress.found(f"{run.role} {run.name}")
        else:
            with progress.stage(f"{run.role} {run.name}"):
                training.train(plan.fit(run), run.stage.made_from, plan.job.cluster, context.record, key)
        _describe_model(context, key, run.stage)


def layer_table(plan: Plan) -> list[str]:
    """Which student layer follows which teacher layer, for every term that compares layers."""
    found = []
    for run in plan.runs:
        for name, loss in run.losses.items():
            if isinstance(layers := getattr(loss, "layers", None), dict):
                pairs = ", ".join(f"{mine} <- {its}" for mine, its in layers.items())
                found.append(f"layers of {run.name}, {name}: student <- teacher {pairs}")
    return found


def evaluate(context: Context) -> list[Evaluation]:
    """Teacher, baselines and students over the test split, by the same code, one after the other."""
    plan = context.plan
    tested = [
        Tested("teacher", plan.lead, None, plan.teacher),
        *(Tested(run.role, run.name, run.baseline, run.stage, run.reading) for run in plan.runs),
    ]
    evaluations = report.ordered(on_test_split(plan, context.progress, tested))
    for e in evaluations:
        numbers = {f"test/{k}": v for k, v in {**e.quality, **e.against}.items()} | {
            f"cost/{k}": v for k, v in {**e.cost, **e.ratios}.items()
        }
        context.journal.metrics(context.key(e.name), numbers, 0)
    return evaluations


def publish(context: Context, evaluations: list[Evaluation]) -> dict[str, Path]:
    """Export the students, write the report, and hand both to the journal. Returns the folder of each student and the report."""
    plan, journal = context.plan, context.journal
    models.quiet()
    verdicts = report.verdicts(evaluations)
    facts = facts_of(plan)
    places: dict[str, Path] = {}
    examples = example_texts(plan)
    with context.progress.stage("export and report"):
        for run in plan.runs:
            if run.role == "student":
                folder = plan.results / "students" / run.name
                exporting.export(
                    fit.model_folder(plan.storage, run.stage.folder), folder, evaluations, facts, name=run.name, verdict=verdicts.get(run.name, "")
                )  # fmt: skip
                places[run.name] = folder
                if plan.job.tracking.log_model:
                    journal.model(context.key(run.name), folder, name=run.name, input_example=examples)
        pictures = figures(evaluations, _curves(plan), plan.results / "figures")
        page = plan.results / "report.html"
        report.page(page, plan.job.name, evaluations, pictures, facts)
        table = plan.results / "evaluation.json"
        table.write_text(json.dumps([e.model_dump(mode="json") for e in evaluations], indent=1), encoding="utf-8")
        for path in (page, table):
            journal.file(context.parent, path)
        for path in pictures:
            journal.file(context.parent, path, "figures")
        _copy_to_remote(plan)
    places["report"] = page
    return places


def facts_of(plan: Plan) -> exporting.Facts:
    """What a model card and a report say about where a student comes from."""
    return exporting.Facts(
        teacher=str(plan.job.lead.model), corpus=plan.job.corpus.type, max_length=plan.job.task.max_length, task=plan.job.task,
        config=dump(plan.job),
        fingerprints={"job": plan.fingerprint, "corpus": plan.corpus.fingerprint, "teacher": plan.teacher.fingerprint}
        | {("targets" if name == ONLY else f"targets of {name}"): stage.fingerprint for name, stage in plan.targets.items()},
        versions={k.removeprefix("version."): v for k, v in environment_tags().items() if k.startswith("version.")},
    )  # fmt: skip


def finish(context: Context) -> None:
    """End the job's run and those below it that nothing has ended."""
    context.journal.finish_unfinished("FINISHED")


def _models(plan: Plan) -> dict[str, Stage]:
    return {plan.lead: plan.teacher, **{run.name: run.stage for run in plan.runs}}


def _describe_model(context: Context, key: str, stage: Stage) -> None:
    """Curves and numbers of a finished model, also where another job trained it: the journal leaves out what it has."""
    manifest = context.plan.found(stage)
    assert manifest is not None
    for step, metrics in curves.read(context.plan.storage, stage.folder, manifest):
        context.journal.metrics(key, metrics, step)
    derived = {name: manifest.facts[name] for name in ("parameters", "trained_parameters") if name in manifest.facts}
    if steps := manifest.facts["result"].get("steps"):
        derived["steps"] = int(steps)
    context.journal.params(key, {f"derived.{name}": value for name, value in derived.items()})
    context.journal.tags(key, {"distillery.fingerprint": manifest.fingerprint})


def _curves(plan: Plan) -> dict[str, Any]:
    found = {name: (stage.folder, plan.found(stage)) for name, stage in _models(plan).items()}
    return {name: curves.read(plan.storage, folder, manifest) for name, (folder, manifest) in found.items() if manifest}


def example_texts(plan: Plan, count: int = 4) -> list[str]:
    """A few rows of the test split, to show with a model."""
    import numpy as np

    columns = open_columns(plan.storage, plan.corpus.folder, "corpus", "test")
    return columns.strings("text", np.arange(min(count, len(columns))))


def _corpus_line(manifest: store.Manifest) -> str:
    rows = ", ".join(f"{split} {manifest.rows(split):,}" for split in manifest.splits)
    labelled = manifest.facts["labelled"]["train"]
    tokens = sum(manifest.tokens(split) for split in manifest.splits)
    return f"corpus: {rows} rows ({labelled:,} of train labelled), {tokens:,} tokens, {len(manifest.facts['labels'])} labels"


def _copy_to_remote(plan: Plan) -> None:
    """Where the storage is not on this machine, put what people look at there too."""
    if plan.storage.is_local:
        return
    for name in ("report.html", "evaluation.json", "job.yaml"):
        with plan.storage.writing(f"runs/{plan.job.name}/{plan.results.name}/{name}") as path:
            shutil.copyfile(plan.results / name, path)
    for folder in (plan.results / "students" / run.name for run in plan.runs if run.role == "student"):
        with plan.storage.writing_folder(f"runs/{plan.job.name}/{plan.results.name}/students/{folder.name}", last="config.json") as beside:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
