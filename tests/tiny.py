"""A small world to train in: a corpus whose label can be told from the tokens, a tiny BERT, its answers. Built in a second."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import torch
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from distillation import fit, models, store
from distillation.answers import answer_part, make_teacher
from distillation.columns import Columns
from distillation.config import (
    CrossEntropy,
    FitConfig,
    ForwardKL,
    LayersStudent,
    TargetsConfig,
    TextClassification,
    TrainingConfig,
    default_logits,
)
from distillation.rows import Rows, Split
from distillation.storage import Storage
from distillation.tasks import build_task

LABELS = ("a", "b", "c")
TASK = TextClassification(type="text_classification", max_length=32)
LOSSES = {"hard": CrossEntropy(type="cross_entropy", weight=0.3), "soft": ForwardKL(type="forward_kl", weight=0.7, temperature=2.0)}


def bert(layers=4, hidden=16, labels=LABELS, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 40,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
    }
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return BertForSequenceClassification(
        BertConfig(**{**sizes, **names, "max_position_embeddings": 64, "initializer_range": 0.3, **changes})
    )


def tokenizer(folder, words=36):
    """[PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, then w4, w5, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(4, 4 + words))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)


def model_folder(folder, **changes):
    """A tiny classifier with its tokenizer, as save_pretrained writes it."""
    bert(**changes).save_pretrained(folder)
    tokenizer(folder)
    return folder


def texts(count, labelled=1.0, seed=0):
    """(text, label or None): a text of label i uses mostly the words 4 + 12 i to 15 + 12 i."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(count):
        label = int(generator.integers(0, 3))
        own = generator.integers(4 + 12 * label, 16 + 12 * label, generator.integers(2, 12))
        noise = generator.integers(4, 40, generator.integers(1, 6))
        text = " ".join(f"w{w}" for w in [*own, *noise])
        found.append((text, LABELS[label] if i < labelled * count else None))
    return found


def corpus(storage, train=120, validation=30, test=30, labelled=1.0, part_rows=50, folder="corpora/c"):
    splits = {}
    for number, (split, count) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        rows = sorted((hashlib.sha256(f"{split} {i} {t}".encode()).hexdigest()[:32], t, label) for i, (t, label) in
                      enumerate(texts(count, labelled if split == "train" else 1.0, seed=number)))  # fmt: skip
        records = []
        for start in range(0, count, part_rows):
            some = rows[start : start + part_rows]
            tokens = [np.array([2, *(int(w[1:]) for w in text.split()), 3], np.int32) for _, text, _ in some]
            table = pa.table(
                {
                    "id": [i for i, _, _ in some],
                    "text": [t for _, t, _ in some],
                    "label": pa.array([-1 if label is None else LABELS.index(label) for _, _, label in some], pa.int32()),
                    "length": pa.array([len(t) for t in tokens], pa.int32()),
                    "scored": pa.array([1] * len(some), pa.int32()),
                    "labelled": pa.array([int(label is not None) for _, _, label in some], pa.int32()),
                    "input_ids": pa.array(tokens, pa.list_(pa.int32())),
                }
            )
            records.append(store.write_part(storage, folder, f"part-{some[0][0][:12]}-{split}", table, sum(map(len, tokens))))
        splits[split] = tuple(records)
    facts = {"labels": list(LABELS), "labelled": {"train": int(labelled * train), "validation": validation, "test": test}}
    return store.commit(storage, folder, store.Manifest(kind="corpus", fingerprint="c", made_from={}, splits=splits, facts=facts))


def teacher(storage, tmp_path, **changes):
    source = model_folder(tmp_path / "teacher-source", **changes)
    fit.commit_model(storage, "teachers/t", bert(**changes), source, TASK, LABELS, "t", {}, {"result": {}, "history": []})


def targets(storage, config=TargetsConfig(), folder="targets/t"):  # noqa: B008 - frozen
    """What the teacher says about train and validation, written by the function that the cluster's workers use."""
    manifest, paths = store.open_artifact(storage, "corpora/c", "corpus")
    config = config.model_copy(update={"logits": config.logits or default_logits(TASK)})
    model = make_teacher(models.load(fit.model_folder(storage, "teachers/t"), TASK), TASK, config)
    splits = {}
    for split in ("train", "validation"):
        records = []
        for part in manifest.splits[split]:
            rows = Rows(Columns([paths[part.name]]), {}, build_task(TASK, 0))
            table, _ = answer_part(model, rows, config, 512, False, torch.device("cpu"))
            records.append(store.write_part(storage, folder, part.name.removesuffix(".arrow"), table, part.tokens))
        splits[split] = tuple(records)
    facts = {"corpus": "c", "targets": config.model_dump(mode="json"), "labels": list(LABELS)}
    store.commit(storage, folder, store.Manifest(kind="targets", fingerprint="t", made_from={}, splits=splits, facts=facts))


def world(tmp_path, labelled=1.0, config=TargetsConfig(), **changes):  # noqa: B008 - frozen
    """Storage with corpora/c, teachers/t and targets/t."""
    storage = Storage(str(tmp_path / "storage"))
    corpus(storage, labelled=labelled)
    teacher(storage, tmp_path, **changes)
    targets(storage, config)
    return storage


def split_of(storage, split="train", with_targets=True):
    return Split(storage, "corpora/c", {"teacher": "targets/t"} if with_targets else {}, split, build_task(TASK, 0))


def rows_of(storage, split="train", with_targets=True):
    return split_of(storage, split, with_targets).open()


def settings(storage, name="s", **changes):
    """A student of two layers, three epochs of about eight steps."""
    training = TrainingConfig(epochs=3, batch_tokens=256, learning_rate=3e-3, log_every=1, checkpoint_every=0, precision="fp32")
    values = {
        "name": name, "task": TASK, "labels": LABELS, "student": LayersStudent(type="layers", layers=(0, 3)), "losses": LOSSES,
        "training": training, "storage": storage.uri, "corpus": "corpora/c", "targets": {"teacher": "targets/t"}, "teacher": "teachers/t",
        "output": f"students/{name}", "fingerprint": name,
    }  # fmt: skip
    return FitConfig(**{**values, **changes})
