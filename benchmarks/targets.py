"""What a token of a language model's answers takes in the store, and how near its gradient is to that of all logits.

python -m benchmarks.targets          some minutes on two cores: trains a small GPT first

The gradient is that of forward KL at temperature 1 with respect to all weights of a student of half the layers, over one batch of about
4,000 tokens; KL error is the difference of the loss to the dense one, of which the cross entropy of draws lacks the teacher's entropy.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks import prose
from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.columns import Columns
from distillation.config import DenseLogits, ForwardKL, LayersStudent, NewModel, SampledLogits, TargetsConfig, TopKLogits, TrainingConfig
from distillation.losses import weigh
from distillation.network import Network
from distillation.rows import Rows, Targets
from distillation.storage import Storage
from distillation.students import build_student

MODEL = NewModel(architecture="gpt2", layers=4, hidden_size=128, heads=4, vocabulary=8192)
TRAINING = TrainingConfig(epochs=5, batch_tokens=2048, learning_rate=1.5e-3, dropout=0.1, checkpoint_every=0, precision="fp32")
ROWS = 32
BAR_BYTES, BAR_COSINE = 150, 0.99

KINDS = {
    "dense fp32": DenseLogits(dtype="float32"),
    "dense fp16": DenseLogits(),
    **{f"top-{k} {dtype}": TopKLogits(type="topk", k=k, dtype=dtype) for k in (8, 16, 24, 32, 64, 128, 256) for dtype in ("float16",)},
    **{f"top-{k} uint8": TopKLogits(type="topk", k=k, dtype="uint8") for k in (16, 32, 48, 64)},
    "top-24 float32": TopKLogits(type="topk", k=24, dtype="float32"),
    **{f"{n} draws": SampledLogits(type="sampled", draws=n) for n in (10, 25, 32, 50, 100)},
}


def main(epochs: int = TRAINING.epochs or 0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        name = prose.world(storage, MODEL)
        told = prose.train_teacher(storage, TRAINING.model_copy(update={"epochs": epochs}))
        source = fit.model_folder(storage, "teachers/t")
        vocabulary = models.read_config(source)["vocab_size"]
        print(f"{name}, vocabulary {vocabulary}, teacher's perplexity {told['validation/perplexity']:.0f}\n")
        print("| targets | bytes/token | KL error | gradient cosine | missing mass |\n|---|---|---|---|---|")
        table(storage, source)


def table(storage: Storage, source: Path) -> None:
    _, paths = store.open_artifact(storage, "corpora/c", "corpus")
    (path,) = (path for name, path in paths.items() if "validation" in name)
    task = fit.reader(prose.TASK, source, ())
    torch.manual_seed(0)
    model = build_student(LayersStudent(type="layers", count=2), source, prose.TASK, (), dropout=0.0, seed=0)
    student = Network(model, prose.TASK)
    with pa.ipc.open_stream(pa.memory_map(str(path))) as reader:
        few = Columns.of(reader.read_all()[:ROWS])
    exact: tuple[float, torch.Tensor] | None = None
    for name, logits in KINDS.items():
        targets = TargetsConfig(logits=logits)
        some = Rows(few, {}, task)
        teacher = make_teacher(models.load(source, prose.TASK), prose.TASK, targets)
        answers, missing = answer_part(teacher, some, targets, 4096, False, torch.device("cpu"))
        size = sum(answers.column(c).nbytes for c in answers.column_names if c != "id") / int(some.scored.sum())
        rows = Rows(few, {"teacher": Targets(Columns.of(answers), targets)}, task)
        value, gradient = _gradient(student, rows)
        if exact is None:
            exact = value, gradient
        error = "" if isinstance(logits, SampledLogits) else f"{value - exact[0]:+.4f}"
        cosine = float(torch.nn.functional.cosine_similarity(gradient, exact[1], dim=0))
        mass = f"{missing['teacher/missing_mass']:.3f}" if missing else ""
        print(f"| {name} | {size:.0f} | {error} | {cosine:.4f} | {mass} |", flush=True)


def _gradient(student: Network, rows: Rows) -> tuple[float, torch.Tensor]:
    student.zero_grad()
    batch = rows.batch(np.arange(len(rows)))
    outputs = student(batch.inputs, batch.scored, batch.tokens, batch.lengths)
    losses = {"soft": ForwardKL(type="forward_kl", temperature=1.0)}
    loss, _ = weigh(losses, outputs, batch, {"soft": len(batch.labels)})
    loss.backward()
    return float(loss), torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
