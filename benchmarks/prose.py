"""Real text for language models: WikiText-2 where it lies beside the project, else the source of the standard library; a small GPT for it."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from pathlib import Path

import pyarrow as pa

from distillation import beginnings, encoding, store
from distillation.config import CausalLM, FitConfig, NewModel, PretrainedStudent, TrainingConfig, hard_loss
from distillation.fit import train
from distillation.loop import LocalSession
from distillation.storage import Storage

TASK = CausalLM(type="causal_lm", max_length=128)
WIKITEXT = Path(__file__).resolve().parents[2] / "shared/data/wikitext2"
HEADING = re.compile(r"(?m)^(?= = [^=\n]+ = $)")


def texts() -> tuple[str, dict[str, list[str]]]:
    """What it is, and documents to train on and to be judged on."""
    if WIKITEXT.is_dir():
        splits = {"train": "test", "validation": "valid"}  # the larger of the two small files is trained on
        return "WikiText-2", {
            split: [part.strip() for part in HEADING.split((WIKITEXT / f"{name}.txt").read_text()) if part.strip()]
            for split, name in splits.items()
        }
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda p: hashlib.sha256(p.name.encode()).digest())
    found, size = [], 0
    for file in files:
        found.append(file.read_text(encoding="utf-8", errors="replace"))
        size += len(found[-1])
        if size > 2_400_000:
            break
    return "standard library", {"train": found[::2], "validation": found[1::2]}


def world(storage: Storage, model: NewModel) -> str:
    """corpora/c and, with random weights, bases/b in the storage. Returns what the text is."""
    from transformers import AutoTokenizer

    name, documents = texts()
    base = Path(storage.path("bases/b"))
    base.mkdir(parents=True)
    beginnings.make(model, TASK, documents["train"], base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    splits: dict[str, tuple[store.FileRecord, ...]] = {}
    for split, contents in documents.items():
        ids = [hashlib.sha256(text.encode()).hexdigest()[:32] for text in contents]
        columns = encoding.encode(TASK, tokenizer, ids, contents).columns
        schema = encoding.fields(TASK)
        table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema}, schema=schema).sort_by("id")
        splits[split] = (store.write_part(storage, "corpora/c", f"part-{split}", table, int(sum(columns["length"]))),)
    store.commit(storage, "corpora/c", store.Manifest(kind="corpus", fingerprint="c", made_from={}, splits=splits, facts={"labels": []}))
    return name


def train_teacher(storage: Storage, training: TrainingConfig) -> dict[str, float]:
    """teachers/t from bases/b. Returns its last metrics."""
    hard = hard_loss(TASK)
    assert hard is not None
    config = FitConfig(
        name="teacher", task=TASK, labels=(), student=PretrainedStudent(type="pretrained", model=storage.path("bases/b")),
        losses={"hard": hard}, training=training, storage=storage.uri, corpus="corpora/c", teacher=None, output="teachers/t", fingerprint="t",
    )  # fmt: skip
    return train(config, LocalSession(), {})
