"""The teacher, run once over every row: Ray Train workers fill the target store part by part."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter

from cluster.config import ClusterConfig
from cluster.session import Record
from cluster.training import TrainSession, run_workers
from distillation import models, sharding, store
from distillation.answers import answer_part, keep_company, make_teacher
from distillation.batches import sorted_batches
from distillation.columns import Columns
from distillation.config import TargetsConfig, TaskConfig
from distillation.errors import InputError
from distillation.fit import model_folder, reader
from distillation.loop import Left
from distillation.rows import Rows
from distillation.storage import Storage
from distillation.store import FileRecord, Manifest

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

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
    session = TrainSession(payload["box"], payload["key"], payload["shards"])
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
    mine, rounds = open_parts[session.rank :: session.world_size], 0
    if (mesh := session.mesh) is not None:
        rounds = rounds_of(storage, payload["corpus"], open_parts, mesh, payload["batch_tokens"])
        if not rounds:  # of all workers that hold this one's model
            return 0
        teacher = sharding.load(folder, functools.partial(make_teacher, task=task, targets=targets), task, mesh, session.device)
    else:
        teacher = make_teacher(models.load(folder, task), task, targets).to(session.device)
    reads = reader(task, folder, manifest.facts["labels"])
    bf16 = models.use_bf16(payload["precision"], session.device)
    total, answered, computed = sum(part.rows for part in parts), 0, 0
    before = total - sum(part.rows for part in open_parts)
    session.begin(before)
    for part in mine:
        if mesh is None and session.asked():  # shards of one model have to end together
            raise Left
        rows = Rows(Columns(store.intact(storage, payload["corpus"], [part])), {}, reads)
        table, told = answer_part(teacher, rows, targets, payload["batch_tokens"], bf16, session.device)
        store.write_part(storage, payload["output"], part.name.removesuffix(".arrow"), table, part.tokens)
        answered += part.rows
        if mesh is not None:
            computed += len(sorted_batches(rows.lengths, payload["batch_tokens"]))
        session.report({"teacher/rows": float(min(total, before + answered * session.world_size)), **told}, before + answered)
    if computed < rounds:
        first = Rows(Columns(store.intact(storage, payload["corpus"], open_parts[:1])), {}, reads)
        keep_company(teacher, first, rounds - computed, bf16, session.device)
    return answered


def rounds_of(storage: Storage, corpus: str, parts: Sequence[FileRecord], mesh: DeviceMesh, batch_tokens: int) -> int:
    """Forward passes that every worker of this one's replica makes: as many as the one with the most batches in its parts has to."""
    replica, shards = mesh.get_coordinate()[0], mesh.size(1)
    world = mesh.size(0) * shards

    def batches(part: FileRecord) -> int:
        return len(sorted_batches(Columns(store.intact(storage, corpus, [part])).whole("length"), batch_tokens))

    return max(sum(map(batches, parts[rank::world])) for rank in range(replica * shards, (replica + 1) * shards))
