"""A GPT on WikiText-2 into half of its layers, from the store, over several seeds; and the store against a live teacher.

python -m benchmarks.language [seeds] [epochs of the teacher]          about 25 minutes on two cores; nothing else should run
"""

from __future__ import annotations

import sys
import tempfile
import time

import numpy as np
import torch

from benchmarks import prose
from benchmarks.made import line
from distillation import fit, models, store
from distillation.answers import answer_part, bytes_per_position, make_teacher
from distillation.columns import Columns
from distillation.config import (
    CrossEntropy,
    DenseLogits,
    FitConfig,
    ForwardKL,
    LayersStudent,
    LiveTeacher,
    NewModel,
    SampledLogits,
    TargetsConfig,
    TrainingConfig,
)
from distillation.loop import LocalSession
from distillation.rows import Rows
from distillation.storage import Storage

MODEL = NewModel(architecture="gpt2", layers=4, hidden_size=96, heads=4, vocabulary=8192)
TEACHER = TrainingConfig(epochs=5, batch_tokens=2048, learning_rate=2e-3, dropout=0.1, checkpoint_every=0, precision="fp32")
TRAINING = TrainingConfig(epochs=1, batch_tokens=2048, learning_rate=1.5e-3, dropout=0.1, checkpoint_every=0, precision="fp32")
TARGETS = TargetsConfig(logits=SampledLogits(type="sampled"))
LOSSES = {"hard": CrossEntropy(type="cross_entropy", weight=0.2), "soft": ForwardKL(type="forward_kl", temperature=1.0, weight=0.8)}
STUDENT = LayersStudent(type="layers", count=2)
STEPS, WARM = 24, 4


def main(seeds: int = 3, epochs: int = TEACHER.epochs or 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        name = prose.world(storage, MODEL)
        told = prose.train_teacher(storage, TEACHER.model_copy(update={"epochs": epochs}))
        size = answer(storage)
        print(f"{name}; teacher's perplexity {told['validation/perplexity']:.1f}", flush=True)
        print("| what | ours | other | ratio | bar |\n|---|---|---|---|---|", flush=True)
        live_against_store(storage)
        students(storage, told["validation/perplexity"], seeds)
        print(f"| bytes a token in the store | {size:.0f} | | | <= 150 |")


def answer(storage: Storage) -> float:
    """targets/t. Returns bytes a token."""
    source = fit.model_folder(storage, "teachers/t")
    manifest, paths = store.open_artifact(storage, "corpora/c", "corpus")
    splits = {}
    for split, parts in manifest.splits.items():
        rows = Rows(Columns([paths[parts[0].name]]), {}, fit.reader(prose.TASK, source, ()))
        teacher = make_teacher(models.load(source, prose.TASK), prose.TASK, TARGETS)
        table, _ = answer_part(teacher, rows, TARGETS, 4096, False, torch.device("cpu"))
        splits[split] = (store.write_part(storage, "targets/t", parts[0].name.removesuffix(".arrow"), table, parts[0].tokens),)
    facts = {"corpus": "c", "targets": TARGETS.model_dump(mode="json"), "labels": []}
    found = store.commit(storage, "targets/t", store.Manifest(kind="targets", fingerprint="t", made_from={}, splits=splits, facts=facts))
    assert bytes_per_position(TARGETS, 8192, 96)[0] <= 150
    return found.total_bytes() / sum(manifest.tokens(split) for split in manifest.splits)


def settings(storage: Storage, name: str, **changes: object) -> FitConfig:
    values = {
        "name": name, "task": prose.TASK, "labels": (), "student": STUDENT, "losses": LOSSES, "training": TRAINING, "storage": storage.uri,
        "corpus": "corpora/c", "targets": {"teacher": "targets/t"}, "teacher": "teachers/t", "output": f"students/{name}", "fingerprint": name,
    }  # fmt: skip
    return FitConfig(**{**values, **changes})


def live_against_store(storage: Storage) -> None:
    """The same loop and losses, over the same batches."""
    few = TRAINING.model_copy(update={"epochs": None, "steps": STEPS, "log_every": 1})
    live = {"teacher": LiveTeacher(folder="teachers/t", targets=TargetsConfig(logits=DenseLogits(dtype="float32")), precision="fp32")}
    stored = _speed(settings(storage, "stored", training=few, keep_model=False))
    asked = _speed(settings(storage, "live", training=few, targets={}, live=live, keep_model=False))
    line("language model, store / live teacher", stored, asked, "tokens/s", ">= 1.5")


class Clock(LocalSession):
    """Tokens a second from step WARM to the last."""

    def report(self, metrics: dict[str, float], step: int) -> None:  # type: ignore[override]
        super().report({**metrics, "clock": time.perf_counter()}, step)


def _speed(config: FitConfig) -> float:
    session = Clock()
    fit.train(config, session, {})
    points = [(m["train/tokens"], m["clock"]) for _, m in session.history if "train/loss" in m]
    (before, start), (after, end) = points[WARM - 1], points[-1]
    return (after - before) / (end - start)


def students(storage: Storage, teacher: float, seeds: int) -> None:
    """Perplexity of students beside the same students without the teacher."""
    found: dict[str, list[float]] = {"distilled": [], "plain": []}
    for seed in range(seeds):
        training = TRAINING.model_copy(update={"seed": seed})
        mine = fit.train(settings(storage, f"distilled-{seed}", training=training), LocalSession(), {})
        hard = {"hard": CrossEntropy(type="cross_entropy")}
        plain = fit.train(settings(storage, f"plain-{seed}", training=training, losses=hard, targets={}), LocalSession(), {})
        for name, result in (("distilled", mine), ("plain", plain)):
            found[name].append(result["validation/perplexity"])
        print(f"seed {seed}: distilled {found['distilled'][-1]:.1f}, without {found['plain'][-1]:.1f}", flush=True)
    distilled, plain = (float(np.mean(values)) for values in found.values())
    line(f"perplexity, half the layers / teacher ({seeds} seeds)", distilled, teacher, "", "<= 1.3")
    line("perplexity, distilled / without distillation", distilled, plain, "", "< 1")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
