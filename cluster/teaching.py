"""The teacher, run once over every row: Ray Train workers fill the target store part by part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import TypeAdapter

from cluster.config import ClusterConfig
from cluster.session import Record
from cluster.training import TrainSession, run_workers
from distillation import models, store
from distillation.answers import answer_part, make_teacher
from distillation.config import TargetsConfig, TaskConfig
from distillation.errors import InputError
from distillation.fit import model_folder, reader
from distillation.loop import Left
from distillation.rows import Rows
from distillation.storage import Storage
from distillation.store import Columns, FileRecord, Manifest

SPLITS = ("train", "validation")
"""What students look at. The test split is answered by teacher and student alike, at the end, in evaluation."""


def teach(
    task: TaskConfig, targets: TargetsConfig, teacher: str, corpus: str, output: str, *, fingerprint: str, made_from: Mapping[str, Any],
    batch_tokens: int, precision: str, cluster: ClusterConfig, record: Record, key: str,
) -> Manifest:  # fmt: skip
    """Fill the target store `output` for a corpus. Parts already there are kept, so an interrupted pass is continued.

    Any number of workers leaves the same bytes, given the same threads a worker and the same hardware: what is computed together depends
    on the part alone.
    """
    storage = Storage(cluster.storage)
    if (done := store.find(storage, output)) is not None and done.fingerprint == fingerprint:
        return done
    payload = {
        "task": task.model_dump(), "targets": targets.model_dump(), "teacher": teacher, "corpus": corpus, "output": output,
        "batch_tokens": batch_tokens, "precision": precision, "storage": cluster.storage, "key": key,
    }  # fmt: skip
    run_workers(_teach_worker, payload, cluster, "teacher", record)
    manifest = store.find(storage, corpus)
    assert manifest is not None
    splits: dict[str, tuple[FileRecord, ...]] = {}
    for split in SPLITS:
        names = [part.name.removesuffix(".arrow") for part in manifest.splits[split]]
        found = store.committed_parts(storage, output, names)
        if missing := [name for name in names if name not in found]:
            raise InputError("DST-3111", "parts of the target store are missing", where=storage.path(output), found=", ".join(missing[:3]))
        splits[split] = tuple(found[name] for name in names)
    facts = {
        "corpus": manifest.fingerprint, "targets": targets.model_dump(mode="json"), "labels": manifest.facts["labels"],
        "rows_answered": sum(map(manifest.rows, SPLITS)),
    }  # fmt: skip
    return store.commit(
        storage, output, Manifest(kind="targets", fingerprint=fingerprint, made_from=dict(made_from), splits=splits, facts=facts)
    )


def _teach_worker(payload: dict[str, Any]) -> int:
    """Answer this rank's share of the parts that are not committed yet. Returns the rows answered. Raises Left between two parts."""
    session = TrainSession(payload["box"], payload["key"])
    storage, targets = Storage(payload["storage"]), TargetsConfig.model_validate(payload["targets"])
    folder = model_folder(storage, payload["teacher"])
    manifest = store.find(storage, payload["corpus"])
    assert manifest is not None, "the corpus is prepared first"
    parts = [part for split in SPLITS for part in manifest.splits[split]]
    # Each rank looks at its share and tells the others: another driver may fill the same store, and every part must belong to somebody.
    flags, there = torch.zeros(len(parts)), storage.sizes(payload["output"])
    for i in range(session.rank, len(parts), session.world_size):
        name = parts[i].name.removesuffix(".arrow")
        flags[i] = float(f"{name}.json" not in there or store.committed_part(storage, payload["output"], name) is None)
    flags = flags.to(session.device)
    open_parts = [part for part, flag in zip(parts, session.all_reduce(flags).tolist(), strict=True) if flag]
    if not open_parts:
        return 0
    task: TaskConfig = TypeAdapter(TaskConfig).validate_python(payload["task"])
    teacher = make_teacher(models.load(folder, task), task, targets).to(session.device)
    reads = reader(task, folder, manifest.facts["labels"])
    bf16 = models.use_bf16(payload["precision"], session.device)
    before, answered = sum(part.rows for part in parts) - sum(part.rows for part in open_parts), 0
    session.begin(before)
    for part in open_parts[session.rank :: session.world_size]:
        if session.asked():
            raise Left
        rows = Rows(Columns(store.intact(storage, payload["corpus"], [part])), {}, reads)
        table, told = answer_part(teacher, rows, targets, payload["batch_tokens"], bf16, session.device)
        store.write_part(storage, payload["output"], part.name.removesuffix(".arrow"), table, part.tokens)
        answered += part.rows
        session.report({"teacher/rows": float(before + answered * session.world_size), **told}, before + answered)
    return answered
