"""A teacher and a student cut among workers: the same answers and losses, and what a worker holds at most.

python -m benchmarks.sharding          some minutes on two cores

Plain processes, one thread each, with the allocator set as in workers of Ray. The teacher is BERT with 48 layers of width 384 and random
weights, the student has every other one of its layers. Memory is the largest resident set (VmHWM) of any worker, from before the model is
read to the end; what a worker needs without the model is the same of the same worker with a model of 3 layers of width 16. The share is
what is left of the first without the second, over the bytes of the whole model (fp32).
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

from benchmarks import made
from distillation import fit, models, sharding
from distillation.config import CrossEntropy, FitConfig, LayersStudent, TextClassification, TrainingConfig
from distillation.network import Network
from distillation.rows import open_rows
from distillation.storage import Storage
from tests.tiny import tokenizer
from tests.together import PeerSession, together, trained_together

TASK = TextClassification(type="text_classification", max_length=128)
BARS = {2: 0.65, 4: 0.40}
SIZES = {"large": (48, 384), "small": (3, 16)}
VOCABULARY = 6000
ROWS, STEPS, STOP = 16, 6, 4


def make(storage: Storage, name: str, layers: int, width: int) -> int:
    """A teacher with random weights. Returns its bytes."""
    torch.manual_seed(0)
    names = {"id2label": dict(enumerate(made.LABELS)), "label2id": {label: i for i, label in enumerate(made.LABELS)}}
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=4 * width,
        max_position_embeddings=128, **names,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer(folder)
        fit.commit_model(storage, f"teachers/{name}", model, Path(folder), TASK, made.LABELS, name, {}, {"result": {}, "history": []})
    return sum(4 * p.numel() for p in model.parameters())


def peak(reset: bool = False) -> int:
    """Largest resident set of this process since it was last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def answer(uri: str, name: str, shards: int | None, out: Path) -> None:
    """Load a teacher and let it answer `ROWS` rows in two batches."""
    session, storage = PeerSession(shards), Storage(uri)
    folder = fit.model_folder(storage, f"teachers/{name}")
    rows = open_rows(storage, "corpora/c", {}, "validation", fit.reader(TASK, folder, made.LABELS))
    peak(reset=True)
    if session.mesh is None:
        teacher = Network(models.load(folder, TASK), TASK).eval()
    else:
        teacher = sharding.load(folder, lambda model: Network(model, TASK), TASK, session.mesh, session.device)
    said = []
    for start in (0, ROWS // 2):
        batch = rows.batch(torch.arange(start, start + ROWS // 2).numpy())
        with torch.no_grad():
            logits = teacher(batch.inputs, batch.scored, batch.tokens, batch.lengths).logits
        assert logits is not None
        said += logits.tolist()
    (out / f"{session.rank}.json").write_text(json.dumps([peak(), said]))


def answered(uri: str, name: str, count: int) -> tuple[int, torch.Tensor]:
    """Largest peak of `count` workers that hold a teacher together, and what each of them says."""
    with tempfile.TemporaryDirectory() as folder:
        together(Path(folder) / "run", count, answer, uri, name, None, Path(folder))
        told = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(count)]
    return max(each for each, _ in told), torch.tensor([said for _, said in told])


def teachers(storage: Storage, size: int) -> None:
    alone, expected = answered(storage.uri, "large", 1)
    print(f"teacher of {size / 1e6:.0f} MB in one process: peak {alone / 1e6:.0f} MB\n")
    print("| what | found | bar |\n|---|---|---|", flush=True)
    for count, bar in BARS.items():
        found, said = answered(storage.uri, "large", count)
        without, _ = answered(storage.uri, "small", count)
        far = float((said - expected).abs().max())
        print(f"| teacher on {count} workers: largest difference of an answer to one process | {far:.1e} | 1e-5 |")
        share = (found - without) / size
        told = f"{share:.2f} ({found / 1e6:.0f} MB, {without / 1e6:.0f} MB without)"
        print(f"| the same: peak of a worker without what it needs anyway / whole model | {told} | <= {bar:.2f} |", flush=True)


def settings(storage: Storage, name: str, layers: int) -> FitConfig:
    training = TrainingConfig(
        steps=STEPS, batch_tokens=512, microbatch_tokens=256, learning_rate=1e-4, log_every=1, checkpoint_every=STOP - 1, precision="fp32"
    )
    return FitConfig(
        name=name, task=TASK, labels=made.LABELS, student=LayersStudent(type="layers", count=layers),
        losses={"hard": CrossEntropy(type="cross_entropy")}, training=training, storage=storage.uri, corpus="corpora/c",
        teacher="teachers/large" if layers > 3 else "teachers/small", output=f"students/{name}", fingerprint=name,
    )  # fmt: skip


def losses(history: Any) -> torch.Tensor:
    return torch.tensor([metrics["train/loss"] for _, metrics in history if "train/loss" in metrics], dtype=torch.float64)


def students(storage: Storage) -> None:
    def trained(name: str, count: int, shards: int | None, stop: int | None = None, of: str = "") -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return trained_together(Path(folder) / "run", count, shards, settings(storage, of or name, 12), stop)

    _, plain = trained("ddp", 2, 1)
    _, cut = trained("fsdp", 2, None)
    far = float(((losses(cut) - losses(plain)) / losses(plain)).abs().max())
    print(f"| student of 12 layers, FSDP2 on 2 workers / DDP on 2: largest relative difference of a loss | {far:.1e} | 1e-5 |", flush=True)
    trained("moved", 2, None, STOP)
    result, moved = trained("moved", 4, None)
    assert result["resumed_at"] == STOP - 1
    far = float(((losses(moved) - losses(cut)) / losses(cut)).abs().max())
    print(f"| stopped after step {STOP}, resumed at {STOP - 1} on 4 workers / undisturbed on 2: the same | {far:.1e} | 1e-5 |", flush=True)


def main() -> None:
    os.environ.update(MALLOC_ARENA_MAX="1", MALLOC_MMAP_THRESHOLD_=str(1 << 30), MALLOC_TRIM_THRESHOLD_=str(1 << 30))
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        made.corpus(storage, "corpora/c", {"train": 400, "validation": 32, "test": 8}, vocabulary=VOCABULARY)
        size = {name: make(storage, name, *its) for name, its in SIZES.items()}["large"]
        if "students" not in sys.argv:
            teachers(storage, size)
        if "teachers" not in sys.argv:
            students(storage)


if __name__ == "__main__":
    main()
