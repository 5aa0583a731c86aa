"""What a job will cost, before it runs: rows, tokens, bytes and FLOPs of every stage, exact where the corpus is there, else from a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rich.table import Table

from cluster import sources
from distillation import encoding, models
from distillation.answers import bytes_per_position
from distillation.config import (
    ONLY,
    CausalLM,
    ConvolutionalStudent,
    ImageClassification,
    LayersStudent,
    MaskedLM,
    PretrainedStudent,
    ProbeStudent,
    ScratchStudent,
    TrainingConfig,
    only_labels,
)
from distillation.errors import ConfigError
from distillation.models import depth_of, read_config, width_of
from distillation.students import chosen_layers
from jobs.counting import rows_by_split
from jobs.plan import Plan

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
    scored: float
    """Scored positions of a row."""

    @property
    def per_row(self) -> float:
        """Tokens of a row of train."""
        return self.tokens["train"] / max(1, self.rows["train"])


def lines(plan: Plan) -> list[Line]:
    """One line a stage. FLOPs: 2 per parameter outside the embeddings and token forward, 6 with the backward pass; attention left out."""
    job, size = plan.job, corpus_size(plan)
    config = read_config(plan.model)
    depth, body = depth_of(config) or 0, body_parameters(config)
    rows, tokens = sum(size.rows.values()), sum(size.tokens.values())
    note = "" if size.exact else "estimated from a sample"
    found = [Line("corpus", _state(plan, plan.corpus), rows, tokens, size.bytes_per_row, int(rows * size.bytes_per_row), 0.0, note)]
    for reading in plan.readings:
        title = f"read by {reading.tokenizer.name}"
        found.append(Line(title, _state(plan, reading.stage), rows, tokens, size.bytes_per_row, int(rows * size.bytes_per_row), 0.0,
                          "the same rows in a student's own tokens, counted as the corpus's"))  # fmt: skip
    for name, teacher in job.all_teachers.items():
        if teacher.training:
            own = body_parameters(read_config(plan.models[name]))
            found.append(_training_line(name, _state(plan, plan.teachers[name]), teacher.training, size.labelled, size, own, "fine-tuning"))
    for name, stage in plan.targets.items():
        asked, answered = (count["train"] + count["validation"] for count in (size.rows, size.tokens))
        each, told = _target_bytes(plan, name, size)
        title = "targets" if name == ONLY else f"targets of {name}"
        own = body_parameters(read_config(plan.models[name]))
        found.append(Line(title, _state(plan, stage), asked, answered, each, int(asked * each), 2.0 * own * answered, told))
    scored = size.labelled if only_labels(job.active_losses) else size.rows["train"]
    for run in plan.runs:
        parameters = body * student_share(run.student, depth, body)
        found.append(_training_line(run.name, _state(plan, run.stage), run.training, scored, size, parameters, run.role))
    return found


def require_budget(plan: Plan, found: Sequence[Line] | None = None) -> None:
    """Raise ConfigError if the answers of the teachers take more than store.budget: of the corpus as it is, or as a sample of its sources says.

    found: the lines of this plan, if they are known.
    """
    budget = plan.job.store.budget
    if budget is None:
        return
    needed = sum(line.bytes for line in (found or lines(plan)) if line.stage.startswith("targets"))
    if needed > budget:
        raise ConfigError(
            "DST-2034", "target store would be larger than its budget", where="store.budget", expected=f"at most {budget:,.0f} bytes",
            found=f"{needed:,} bytes", do="Raise it, or keep less: top-k logits with a smaller k, fewer layers",
        )  # fmt: skip


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
        size = (f"{line.bytes_per_row:.0f}", human(line.bytes)) if line.bytes else ("", "")
        flops = f"{line.flops:.1e}" if line.flops else ""
        shown.add_row(line.stage, line.state, f"{line.rows:,}", f"{line.tokens:,}", *size, flops, line.note)
    total = sum(line.flops for line in found if line.state == "to do")
    shown.add_row("total to do", "", "", "", "", human(sum(line.bytes for line in found if line.state == "to do")), f"{total:.1e}", "")
    return shown


def human(size: float) -> str:
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
            manifest.facts["scored"]["train"] / max(1, rows["train"]),
        )
    job, contents, labels = plan.job, [], set(getattr(plan.job.corpus, "packages", ()))
    units = sources.units(job.corpus, job.task)
    counted = rows_by_split(units)
    shares = {name: share for name in ("validation", "test") if isinstance(share := getattr(job.corpus, name), float)}
    set_aside = {name: share * counted["train"] for name, share in shares.items()}
    texts = {split: counted[split] + set_aside.get(split, 0) - (sum(set_aside.values()) if split == "train" else 0) for split in SPLITS}
    for unit in units[:: max(1, len(units) // 4)][:4]:
        few = replace(unit, stop=min(unit.stop, unit.start + SAMPLE_ROWS // 4))  # a table of a whole library takes seconds
        for found in sources.read(few, job.task):
            contents += [content for content in found.column("text").to_pylist() if content][: SAMPLE_ROWS // 4]
            labels |= {name for label in found.column("label").to_pylist() for name in encoding.classes(job.task, label)}
            break
    made = encoding.encode(job.task, _tokenizer(plan), [f"{i:032x}" for i in range(len(contents))], contents)
    # Long texts of language models are several rows each.
    cut, count = len(made.source) / max(1, len(contents)), max(1, len(made.source))
    rows = {split: int(texts[split] * cut) for split in SPLITS}
    mean_tokens, mean_scored = (sum(made.columns[name]) / count for name in ("length", "scored"))
    mean_bytes = sum(len(content if isinstance(content, bytes) else content.encode()) for content in contents) / count
    return Size(
        rows,
        {split: int(rows[split] * mean_tokens) for split in SPLITS},
        int(rows["train"] * job.corpus.labelled),
        mean_bytes + 4 * mean_tokens + ROW_BYTES,
        len(getattr(job.task, "labels", None) or labels),
        False,
        mean_scored,
    )


def _tokenizer(plan: Plan) -> Any:
    from transformers import AutoTokenizer

    if isinstance(plan.job.task, ImageClassification):
        return None
    return AutoTokenizer.from_pretrained(plan.model, trust_remote_code=False, local_files_only=True)


def _target_bytes(plan: Plan, name: str, size: Size) -> tuple[float, str]:
    """Of one row of a teacher's answers, and how much that is for a position."""
    targets, task, stage = plan.job.targets(name), plan.job.task, plan.targets[name]
    config = read_config(plan.models[name])
    words = isinstance(task, CausalLM | MaskedLM)
    position, token = bytes_per_position(targets, int(config.get("vocab_size", 0)) if words else max(1, size.labels), width_of(config) or 0)
    told = f"once for all students; {position:.0f} bytes a position" + (f", {token:.0f} a token" if token else "")
    if (manifest := plan.found(stage)) is not None:
        return manifest.total_bytes() / max(1, manifest.rows("train") + manifest.rows("validation")), told
    return 36 + size.scored * position + size.per_row * token, told


def body_parameters(config: dict[str, Any]) -> int:
    """Parameters outside the embeddings, from the sizes of a transformer: 4 h^2 attention and 2 h i feed forward a layer; of a ResNet 0."""
    width = width_of(config) or 0
    inner = int(config.get("intermediate_size", config.get("hidden_dim", 4 * width)))
    return max(1, (depth_of(config) or 0) * (4 * width * width + 2 * width * inner))


def student_share(student: Any, depth: int, body: int) -> float:
    """Body of a student over the teacher's."""
    if isinstance(student, LayersStudent):
        return len(chosen_layers(student, depth)) / depth
    if isinstance(student, ScratchStudent):
        return student.layers * (4 * student.hidden_size**2 + 2 * student.hidden_size * student.intermediate_size) / body
    if isinstance(student, ProbeStudent | ConvolutionalStudent):
        return 0.0
    assert isinstance(student, PretrainedStudent)
    return (
        body_parameters(read_config(models.locate(student.model, revision=student.revision, pickled_weights=student.pickled_weights)))
        / body
    )
