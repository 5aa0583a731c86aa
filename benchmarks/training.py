"""Student training through the app against bare loops, teacher inference against a bare forward, and two workers against one.

python -m benchmarks.training          about 8 minutes on two cores; nothing else should run
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.made import LABELS, MODEL, corpus, line
from cluster import training
from cluster.config import ClusterConfig
from cluster.session import connect
from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.batches import plan_epoch, sorted_batches
from distillation.config import (
    CrossEntropy,
    DenseLogits,
    FitConfig,
    ForwardKL,
    LayersStudent,
    TargetsConfig,
    TextClassification,
    TrainingConfig,
)
from distillation.loop import make_optimizer
from distillation.rows import open_rows
from distillation.storage import Storage
from distillation.students import build_student
from distillation.tasks import build_task

STEPS, WARM = 40, 10
LOSSES = {"hard": CrossEntropy(type="cross_entropy", weight=0.3), "soft": ForwardKL(type="forward_kl", temperature=2.0, weight=0.7)}
TARGETS = TargetsConfig(logits=DenseLogits())
STUDENT = LayersStudent(type="layers", layers=(0, 5))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        corpus(storage, "corpora/c", {"train": 8192, "validation": 64})
        models.quiet()
        source = models.locate(MODEL)
        teacher = models.load(source, TextClassification(), LABELS)
        fit.commit_model(storage, "teachers/t", teacher, source, TextClassification(), LABELS, "t", {}, {"result": {}, "history": []})
        print("| what | ours | other | ratio | bar |\n|---|---|---|---|---|")
        teacher_inference(storage, teacher)
        student_training(storage, teacher)
        two_workers(storage)


def teacher_inference(storage: Storage, teacher: object) -> None:
    """The function that fills a part, and its commit, against a forward pass over sorted rows that keeps nothing."""
    rows = open_rows(storage, "corpora/c", {}, "train", task())
    model = make_teacher(teacher, TextClassification(), TARGETS)
    bf16 = models.use_bf16("auto", torch.device("cpu"))
    bare = []
    for _ in range(2):
        started = time.perf_counter()
        model.eval()
        for piece in sorted_batches(rows.lengths, 8192):
            batch = rows.batch(piece)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                model(batch.inputs, batch.scored, batch.tokens, batch.lengths)
        bare.append(len(rows) / (time.perf_counter() - started))
    started = time.perf_counter()
    table, _ = answer_part(model, rows, TARGETS, 8192, bf16, torch.device("cpu"))
    part = store.find(storage, "corpora/c").splits["train"][0]
    record = store.write_part(storage, "targets/x", part.name.removesuffix(".arrow"), table, part.tokens)
    line("teacher into the store / bare sorted forward", len(rows) / (time.perf_counter() - started), max(bare), "rows/s", ">= 0.90")
    rest = open_rows(storage, "corpora/c", {}, "validation", task())
    name = store.find(storage, "corpora/c").splits["validation"][0].name.removesuffix(".arrow")
    other = store.write_part(storage, "targets/x", name, answer_part(model, rest, TARGETS, 8192, bf16, torch.device("cpu"))[0], 0)
    facts = {"corpus": "c", "targets": TARGETS.model_dump(mode="json"), "labels": list(LABELS)}
    splits = {"train": (record,), "validation": (other,)}
    store.commit(storage, "targets/x", store.Manifest(kind="targets", fingerprint="x", made_from={}, splits=splits, facts=facts))


def student_training(storage: Storage, teacher: object) -> None:
    """The app's rows a second as it reports them, start-up left out, against the two loops in this process."""
    bare = bare_loop(storage)
    ours = in_app(storage, "one", workers=1, threads=torch.get_num_threads())
    bare = max(bare, bare_loop(storage))
    line("student, app / bare loop over the same batches", ours, bare, "rows/s", ">= 0.95")
    line("student, app / live teacher, random order, fp32", ours, as_others(storage, teacher), "rows/s", ">= 4")


def two_workers(storage: Storage) -> None:
    one = in_app(storage, "w1", workers=1, threads=1)
    two = in_app(storage, "w2", workers=2, threads=1)
    line("2 workers / 1 worker, one thread each", two, one, "rows/s", ">= 1.6")


def in_app(storage: Storage, name: str, workers: int, threads: int) -> float:
    """Rows a second over the steps after the first `WARM`, from the curve that a Ray Train run reports."""
    points: list[tuple[int, float]] = []

    def record(_: str, metrics: dict[str, float], step: int) -> None:
        if step > WARM and "perf/rows_per_second" in metrics:
            points.append((step, metrics["perf/rows_per_second"]))

    config = ClusterConfig(storage=storage.uri, workers=workers, cpus_per_worker=threads)
    with connect(config):
        training.train(settings(storage, name), {}, config, record, name)
    return len(points) / sum(1 / rate for _, rate in points)


def bare_loop(storage: Storage) -> float:
    """What the app is held against: the same batches, model, loss and optimizer, and nothing else."""
    config = settings(storage, "bare").training
    rows = open_rows(storage, "corpora/c", {"teacher": "targets/x"}, "train", task())
    plan = plan_epoch(rows.lengths, np.arange(len(rows)), config.batch_tokens, config.seed, 0)
    model = student(storage).train()
    optimizer = make_optimizer(model, config)
    bf16 = models.use_bf16("auto", torch.device("cpu"))
    seen, started = 0, 0.0
    for step in range(STEPS):
        if step == WARM:
            seen, started = 0, time.perf_counter()
        batch = rows.batch(plan.batch(step))
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(**batch.inputs).logits.float()
        hard = torch.nn.functional.cross_entropy(logits, batch.labels)
        p, q = torch.log_softmax(batch.signal.logits.float() / 2, -1), torch.log_softmax(logits / 2, -1)
        loss = 0.3 * hard + 0.7 * 4 * torch.nn.functional.kl_div(q, p, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen += len(batch.ids)
    return seen / (time.perf_counter() - started)


def as_others(storage: Storage, teacher: torch.nn.Module) -> float:
    """Hinton's loop as most scripts have it: rows at random, padded to the longest, the teacher asked every step, fp32."""
    rows = open_rows(storage, "corpora/c", {}, "train", task())
    order = np.random.default_rng(0).permutation(len(rows))
    size = int(4096 / rows.lengths.mean())
    model = student(storage).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
    teacher.eval()
    seen, started = 0, 0.0
    for step in range(14):
        if step == 2:
            seen, started = 0, time.perf_counter()
        batch = rows.batch(order[step * size : (step + 1) * size])
        with torch.no_grad():
            said = teacher(**batch.inputs).logits
        logits = model(**batch.inputs).logits
        kl = torch.nn.functional.kl_div(torch.log_softmax(logits / 2, -1), torch.softmax(said / 2, -1), reduction="batchmean")
        loss = 0.3 * torch.nn.functional.cross_entropy(logits, batch.labels) + 0.7 * 4 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += size
    return seen / (time.perf_counter() - started)


def task() -> object:
    return build_task(TextClassification(), 0)


def student(storage: Storage) -> torch.nn.Module:
    folder: Path = fit.model_folder(storage, "teachers/t")
    return build_student(STUDENT, folder, TextClassification(), LABELS, dropout=0.0, seed=0)


def settings(storage: Storage, name: str) -> FitConfig:
    return FitConfig(
        name=name, task=TextClassification(), labels=LABELS, student=STUDENT, losses=LOSSES, storage=storage.uri, corpus="corpora/c",
        training=TrainingConfig(steps=STEPS, batch_tokens=4096, log_every=10, checkpoint_every=0), targets={"teacher": "targets/x"},
        teacher="teachers/t", output=f"students/{name}", fingerprint=name,
    )  # fmt: skip


if __name__ == "__main__":
    main()
