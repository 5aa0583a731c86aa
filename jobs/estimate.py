"""What a job will cost, before it runs: rows, tokens, bytes and FLOPs of every stage, exact where the corpus is there, else from a sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.table import Table

from cluster import sources
from distillation import models
from distillation.config import LayersStudent, PretrainedStudent, ProbeStudent, ScratchStudent, TrainingConfig, only_labels
from distillation.models import read_config
from distillation.students import chosen_layers
from jobs.config import JobConfig
from jobs.counting import rows_by_split
from jobs.plan import Plan, depth_of, width_of

SAMPLE_ROWS = 512
SPLITS = ("train", "validation", "test")
ROW_BYTES = 56
"""Of a stored row beside its text and token ids: id, label, length, offsets."""


class Line(NamedTuple):
    stage: str
    state: str
    rows: int
    tokens: int
    bytes_per_row: float
    bytes: int
    flops: float
    note: str


@dataclass(frozen=True)
class Size:
    """Of a corpus, by split."""

    rows: Mapping[str, int]
    tokens: Mapping[str, int]
    labelled: int
    """Rows of train with a label."""
    bytes_per_row: float
    labels: int
    exact: bool

    @property
    def per_row(self) -> float:
        """Tokens of a row of train."""
        return self.tokens["train"] / max(1, self.rows["train"])


def lines(plan: Plan) -> list[Line]:
    """One line a stage. FLOPs: 2 per parameter outside the embeddings and token forward, 6 with the backward pass; attention left out."""
    job, size = plan.job, corpus_size(plan)
    config = read_config(plan.model)
    depth, body = depth_of(config) or 0, _body_parameters(config)
    rows, tokens = sum(size.rows.values()), sum(size.tokens.values())
    note = "" if size.exact else "estimated from a sample"
    found = [Line("corpus", _state(plan, plan.corpus), rows, tokens, size.bytes_per_row, int(rows * size.bytes_per_row), 0.0, note)]
    if job.teacher.training:
        found.append(_training_line("teacher", _state(plan, plan.teacher), job.teacher.training, size.labelled, size, body, "fine-tuning"))
    if plan.targets:
        asked, answered = (count["train"] + count["validation"] for count in (size.rows, size.tokens))
        each = _target_bytes(job, plan, width_of(config) or 0, size.labels)
        state = _state(plan, plan.targets)
        found.append(Line("targets", state, asked, answered, each, int(asked * each), 2.0 * body * answered, "once for all students"))
    scored = size.labelled if only_labels(job.active_losses) else size.rows["train"]
    for run in plan.runs:
        parameters = body * _student_share(run.student, depth, body)
        found.append(_training_line(run.name, _state(plan, run.stage), job.training, scored, size, parameters, run.role))
    return found


def _training_line(name: str, state: str, training: TrainingConfig, rows: int, size: Size, parameters: float, note: str) -> Line:
    if training.epochs is not None:
        seen = rows * training.epochs
        tokens = seen * size.per_row
    else:
        tokens = float((training.steps or 0) * training.batch_tokens)
        seen = int(tokens / max(1.0, size.per_row))
    return Line(name, state, seen, int(tokens), 0, 0, 6.0 * parameters * tokens, note)


def table(name: str, found: list[Line]) -> Table:
    shown = Table(title=f"{name}: nothing was launched", title_justify="left", box=None, pad_edge=False)
    for title in ("stage", "state", "rows", "tokens", "bytes/row", "bytes", "FLOPs", ""):
        shown.add_column(title, justify="left" if title in ("stage", "state", "") else "right")
    for line in found:
        size = (f"{line.bytes_per_row:.0f}", _human(line.bytes)) if line.bytes else ("", "")
        flops = f"{line.flops:.1e}" if line.flops else ""
        shown.add_row(line.stage, line.state, f"{line.rows:,}", f"{line.tokens:,}", *size, flops, line.note)
    total = sum(line.flops for line in found if line.state == "to do")
    shown.add_row("total to do", "", "", "", "", _human(sum(line.bytes for line in found if line.state == "to do")), f"{total:.1e}", "")
    return shown


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _state(plan: Plan, stage: Any) -> str:
    return "in the store" if plan.found(stage) else "to do"


def corpus_size(plan: Plan) -> Size:
    """As the corpus in the store says, or from a sample of its sources before duplicates are dropped."""
    if (manifest := plan.found(plan.corpus)) is not None:
        rows = {split: manifest.rows(split) for split in SPLITS}
        tokens = {split: manifest.tokens(split) for split in SPLITS}
        return Size(
            rows,
            tokens,
            manifest.facts["labelled"]["train"],
            manifest.total_bytes() / max(1, sum(rows.values())),
            len(manifest.facts["labels"]),
            True,
        )
    from transformers import AutoTokenizer

    job, texts, labels = plan.job, [], set(getattr(plan.job.corpus, "packages", ()))
    units = sources.units(job.corpus, job.task)
    counted = rows_by_split(units)
    shares = {name: share for name in ("validation", "test") if isinstance(share := getattr(job.corpus, name), float)}
    set_aside = {name: share * counted["train"] for name, share in shares.items()}
    rows = {split: int(counted[split] + set_aside.get(split, 0) - (sum(set_aside.values()) if split == "train" else 0)) for split in SPLITS}
    for unit in units[:: max(1, len(units) // 4)][:4]:
        few = replace(unit, stop=min(unit.stop, unit.start + SAMPLE_ROWS // 4))  # a table of a whole library takes seconds
        for found in sources.read(few, job.task):
            texts += found.column("text").to_pylist()[: SAMPLE_ROWS // 4]
            labels |= set(found.column("label").to_pylist()) - {None}
            break
    tokenizer = AutoTokenizer.from_pretrained(plan.model, trust_remote_code=False, local_files_only=True)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=job.task.max_length)["input_ids"]] if texts else []
    mean_tokens, mean_bytes = sum(lengths) / max(1, len(lengths)), sum(len(text.encode()) for text in texts) / max(1, len(texts))
    tokens = {split: int(rows[split] * mean_tokens) for split in SPLITS}
    return Size(
        rows,
        tokens,
        int(rows["train"] * job.corpus.labelled),
        mean_bytes + 4 * mean_tokens + ROW_BYTES,
        len(job.task.labels or labels),
        False,
    )


def _target_bytes(job: JobConfig, plan: Plan, width: int, labels: int) -> float:
    """Of one row: id, logits, and what was asked of the features."""
    if plan.targets and (manifest := plan.found(plan.targets)) is not None:
        return manifest.total_bytes() / max(1, manifest.rows("train") + manifest.rows("validation"))
    targets, item = job.teacher.targets, {"float16": 2, "float32": 4}
    features = targets.features
    inner = (len(features.layers) + features.pooled) * width * item[features.dtype] if features else 0
    return 36 + labels * item[targets.logits.dtype] + inner


def _body_parameters(config: dict[str, Any]) -> int:
    """Parameters outside the embeddings, from the sizes of a transformer: 4 h^2 attention and 2 h i feed forward a layer."""
    width = width_of(config) or 0
    inner = int(config.get("intermediate_size", config.get("hidden_dim", 4 * width)))
    return max(1, (depth_of(config) or 0) * (4 * width * width + 2 * width * inner))


def _student_share(student: Any, depth: int, body: int) -> float:
    """Body of a student over the teacher's."""
    if isinstance(student, LayersStudent):
        return len(chosen_layers(student, depth)) / depth
    if isinstance(student, ScratchStudent):
        return student.layers * (4 * student.hidden_size**2 + 2 * student.hidden_size * student.intermediate_size) / body
    if isinstance(student, ProbeStudent):
        return 0.0
    assert isinstance(student, PretrainedStudent)
    return (
        _body_parameters(read_config(models.locate(student.model, revision=student.revision, pickled_weights=student.pickled_weights)))
        / body
    )
