"""What a job will cost, before it runs: rows, tokens, bytes and FLOPs of every stage, exact where the corpus is there, else from a sample."""

from __future__ import annotations

from typing import Any, NamedTuple

from rich.table import Table

from cluster import sources
from distillation import models
from distillation.config import LayersStudent, PretrainedStudent, ProbeStudent, ScratchStudent
from distillation.models import read_config
from distillation.students import chosen_layers
from jobs.config import JobConfig
from jobs.plan import Plan

SAMPLE_ROWS = 512


class Line(NamedTuple):
    stage: str
    state: str
    rows: int
    tokens: int
    bytes_per_row: float
    bytes: int
    flops: float
    note: str


def lines(plan: Plan) -> list[Line]:
    """One line a stage. FLOPs: 2 per parameter outside the embeddings and token forward, 6 with the backward pass; attention left out."""
    job = plan.job
    rows, tokens, text_bytes, exact = _corpus_size(plan)
    per_row = tokens / max(1, rows)
    note = "" if exact else "estimated from a sample"
    config = read_config(plan.model)
    depth, width = _depth(config), int(config.get("hidden_size", config.get("dim", 0)))
    body = _body_parameters(config)
    train_rows = int(rows * _share(plan, "train"))
    labelled = int(train_rows * job.corpus.labelled)
    found = [Line("corpus", _state(plan, plan.corpus), rows, tokens, text_bytes, int(rows * text_bytes), 0.0, note)]
    if job.teacher.training:
        seen = _rows_seen(job.teacher.training, labelled, per_row)
        found.append(
            Line("teacher", _state(plan, plan.teacher), seen, int(seen * per_row), 0, 0, 6.0 * body * seen * per_row, "fine-tuning")
        )
    if plan.targets:
        size = _target_bytes(job, plan, width)
        asked = int(rows * (_share(plan, "train") + _share(plan, "validation")))
        forward = 2.0 * body * asked * per_row
        found.append(
            Line(
                "targets",
                _state(plan, plan.targets),
                asked,
                int(asked * per_row),
                size,
                int(asked * size),
                forward,
                "once for all students",
            )
        )
    for run in plan.runs:
        share = _student_share(run.student, depth, body)
        seen = _rows_seen(
            job.training, labelled if all("labels" in loss.needs for loss in job.active_losses.values()) else train_rows, per_row
        )
        found.append(
            Line(run.name, _state(plan, run.stage), seen, int(seen * per_row), 0, 0, 6.0 * body * share * seen * per_row, run.role)
        )
    return found


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


def _corpus_size(plan: Plan) -> tuple[int, int, float, bool]:
    """Rows, tokens, bytes a row in the store, and whether they are exact."""
    if (manifest := plan.found(plan.corpus)) is not None:
        rows = sum(manifest.rows(split) for split in manifest.splits)
        return rows, sum(manifest.tokens(split) for split in manifest.splits), manifest.total_bytes() / max(1, rows), True
    from transformers import AutoTokenizer

    job, texts, rows = plan.job, [], 0.0
    units = sources.units(job.corpus, job.task)
    for unit in units[:: max(1, len(units) // 4)][:4]:
        for found in sources.read(unit, job.task):
            texts += found.column("text").to_pylist()[: SAMPLE_ROWS // 4]
            break
    mean_bytes = sum(len(text.encode()) for text in texts) / max(1, len(texts))
    for unit in units:
        rows += unit.stop - unit.start if unit.stop > unit.start else unit.bytes / max(1.0, mean_bytes)
    tokenizer = AutoTokenizer.from_pretrained(plan.model, trust_remote_code=False, local_files_only=True)
    lengths = [len(ids) for ids in tokenizer(texts, truncation=True, max_length=job.task.max_length)["input_ids"]] if texts else [0]
    mean_tokens = sum(lengths) / max(1, len(lengths))
    return int(rows), int(rows * mean_tokens), mean_bytes + 4 * mean_tokens + 48, False


def _share(plan: Plan, split: str) -> float:
    if (manifest := plan.found(plan.corpus)) is not None:
        return manifest.rows(split) / max(1, sum(manifest.rows(s) for s in manifest.splits))
    shares = {name: value if isinstance(value := getattr(plan.job.corpus, name), float) else 0.1 for name in ("validation", "test")}
    return {**shares, "train": 1 - sum(shares.values())}[split]


def _rows_seen(training: Any, rows: int, tokens_per_row: float) -> int:
    return int(rows * training.epochs if training.epochs else training.steps * training.batch_tokens / max(1.0, tokens_per_row))


def _target_bytes(job: JobConfig, plan: Plan, width: int) -> float:
    """Of one row: id, logits, and what was asked of the features."""
    if (manifest := plan.targets and plan.found(plan.targets)) is not None and manifest:
        return manifest.total_bytes() / max(1, manifest.rows("train") + manifest.rows("validation"))
    targets, item = job.teacher.targets, {"float16": 2, "float32": 4}
    classes = len(job.task.labels or getattr(job.corpus, "packages", ()) or models.label_names(read_config(plan.model)) or (0, 0))
    features = targets.features
    inner = (len(features.layers) + features.pooled) * width * item[features.dtype] if features else 0
    return 36 + classes * item[targets.logits.dtype] + inner


def _depth(config: dict[str, Any]) -> int:
    return int(next(config[key] for key in ("num_hidden_layers", "n_layers", "n_layer") if key in config))


def _body_parameters(config: dict[str, Any]) -> int:
    """Parameters outside the embeddings, from the sizes of a transformer: 4 h^2 attention and 2 h i feed forward a layer."""
    width = int(config.get("hidden_size", config.get("dim", 0)))
    inner = int(config.get("intermediate_size", config.get("hidden_dim", 4 * width)))
    return _depth(config) * (4 * width * width + 2 * width * inner)


def _student_share(student: Any, depth: int, body: int) -> float:
    """Body of a student over the teacher's."""
    if isinstance(student, LayersStudent):
        return len(chosen_layers(student, depth)) / depth
    if isinstance(student, ScratchStudent):
        return student.layers * (4 * student.hidden_size**2 + 2 * student.hidden_size * student.intermediate_size) / body
    if isinstance(student, ProbeStudent):
        return 0.0
    assert isinstance(student, PretrainedStudent)
    flags = {"trust_remote_code": student.trust_remote_code, "pickled_weights": student.pickled_weights}
    return _body_parameters(read_config(models.locate(student.model, revision=student.revision, **flags))) / body
