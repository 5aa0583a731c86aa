"""The audit of a job's target stores: every file against its checksum, and a sample of rows against the teacher itself."""

from __future__ import annotations

import numpy as np
import torch
from rich.console import Console

from distillation import fit, models, store
from distillation.answers import make_teacher
from distillation.audit import audit
from distillation.config import SampledLogits
from distillation.errors import InputError
from distillation.rows import open_rows
from jobs.config import JobConfig
from jobs.plan import Plan, make_plan

BATCH_ROWS = 16


def verify(job: JobConfig, rows: int, seed: int, console: Console) -> None:
    """Check every store that the job reads. Raises InputError at the first file or answer that is not what it should be."""
    plan = make_plan(job)
    if not plan.targets:
        console.print("no loss of this job reads a target store: there is nothing to verify")
    for name, stage in plan.targets.items():
        store.open_artifact(plan.storage, stage.folder, "targets")  # it is there: else said before a teacher is loaded
        _verify_store(plan, name, rows, seed, console)


def _verify_store(plan: Plan, name: str, count: int, seed: int, console: Console) -> None:
    job, stage = plan.job, plan.targets[name]
    folder = fit.model_folder(plan.storage, plan.teachers[name].folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher = make_teacher(models.load(folder, job.task), job.task, job.targets(name)).to(device)
    reads, bf16 = fit.reader(job.task, folder, plan.labels()), models.use_bf16(job.all_teachers[name].precision, device)
    console.print(f"{name}: {plan.storage.path(stage.folder)}", markup=False, soft_wrap=True)
    for split in ("train", "validation"):
        opened = open_rows(plan.storage, plan.corpus.folder, {name: stage.folder}, split, reads)  # every file against its checksum
        some = np.sort(np.random.default_rng(seed).permutation(len(opened))[:count])
        worst: dict[str, tuple[float, float]] = {}
        # Draws are compared as distributions, for which all rows are needed at once.
        each = len(some) if isinstance(job.targets(name).logits, SampledLogits) else BATCH_ROWS
        for start in range(0, len(some), each):
            piece = some[start : start + each]
            for finding in audit(teacher, opened, name, piece, bf16, device):
                if not finding.holds:
                    raise InputError(
                        "DST-3112", "target store does not say what the teacher says", where=f"{plan.storage.path(stage.folder)}, split {split}, "
                        f"rows {opened.ids(piece[:1])[0]} and {len(piece) - 1} more", expected=f"{finding.what} within {finding.allowed:.3g}",
                        found=f"{finding.found:.3g}", do="Remove the folder and run `distill teach` again; look at the versions it was made with",
                    )  # fmt: skip
                before = worst.get(finding.what, (0.0, 0.0))[0]
                worst[finding.what] = max(before, finding.found), finding.allowed
        told = "; ".join(f"{what} {found:.2g} (allowed {allowed:.2g})" for what, (found, allowed) in worst.items())
        console.print(f"  {split:<12}{len(opened):,} rows, {len(some)} answered again: {told}", markup=False, soft_wrap=True)
