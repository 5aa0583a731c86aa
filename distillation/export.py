"""Hand a student over: the folder that plain transformers loads, with a model card that says what it can do and how it was made."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from distillation.errors import InputError
from distillation.evaluate import Evaluation
from distillation.models import load_classifier, tokenizer_fingerprint
from distillation.storage import Storage
from distillation.store import MANIFEST

PROBES = ("A short text.", "x", "One more text, longer than the others, so that padding and position play a part in the answer.")
"""Texts on which the exported folder must answer like its source."""

CARD = """{front}
# {name}

A text classifier with {labels} labels ({label_names}), distilled from `{teacher}` on the corpus `{corpus}`.

{verdict}

## Evaluation

{rows} held-out rows, {labelled} of them labelled; {device}, {precision}, {threads} threads. Intervals are 95 %: Wilson for accuracy, paired
bootstrap over rows for retention. The baseline is the same student with the same start and the same steps, trained on labels alone.

{table}

## Use

```python
from transformers import pipeline

classify = pipeline("text-classification", model="path/to/this/folder")
classify("some text", truncation=True, max_length={max_length})
```

## Training

Made by Distillery from this job file. Fingerprints: {fingerprints}. Versions: {versions}.

````yaml
{config}
````

## Limits

- It was trained and evaluated on texts of at most {max_length} tokens; longer ones are cut, and other kinds of text were not tried.
- It gives one of its labels to every text, also to one that fits none of them.
- It imitates its teacher, mistakes included: the two give the same answer to {agreement} of the held-out rows.
- Probabilities are calibrated only as far as the expected calibration error in the table says.
"""


class Facts(BaseModel):
    """Where a model comes from, for people: what the card and the report print."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    """As the job file names it."""
    corpus: str
    max_length: int
    """Tokens of a row, special tokens included."""
    config: str
    """The resolved job file, YAML."""
    fingerprints: dict[str, str] = {}
    versions: dict[str, str] = {}


def export(model_dir: Path, destination: Path, evaluations: Sequence[Evaluation], facts: Facts, *, name: str, verdict: str = "") -> None:
    """Write `model_dir` (safetensors, tokenizer, config) with a README.md to `destination`, which appears whole or not at all.

    evaluations: with those of the student called `name`, its teacher and its baseline, which the card shows. An older folder is replaced
    only when the new one loads with the plain pipeline, knows its label names and gives the logits of its source. Raises InputError if not.
    """
    if destination.resolve() == model_dir.resolve():
        raise InputError("DST-3311", "export would overwrite its source", where=str(destination), do="Choose another folder")
    tokenizer_fingerprint(model_dir)  # transformers makes up an empty tokenizer where a folder has none
    student = next(e for e in evaluations if e.name == name)
    with Storage(str(destination.resolve().parent)).writing_folder(destination.name, last="README.md") as beside:
        shutil.copytree(model_dir, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, "README.md"))
        (beside / "README.md").write_text(card(student, evaluations, facts, verdict), encoding="utf-8")
        _require_same_answers(model_dir, beside, student.labels)


def card(student: Evaluation, evaluations: Sequence[Evaluation], facts: Facts, verdict: str = "") -> str:
    """The model card: YAML front matter as the Hugging Face hub reads it, then Markdown."""
    from huggingface_hub import EvalResult, ModelCardData

    def result(metric: str, key: str) -> Any:
        value = round(student.quality[key], 4)
        return EvalResult(
            task_type="text-classification", dataset_type=facts.corpus, dataset_name=facts.corpus, metric_type=metric, metric_value=value
        )

    front = ModelCardData(
        base_model=facts.teacher if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.teacher) else None,
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["knowledge-distillation"],
        metrics=["accuracy", "f1"],
        model_name=student.name,
        eval_results=[result("accuracy", "accuracy"), result("f1", "macro_f1")],
    )
    return CARD.format(
        front=f"---\n{front.to_yaml()}\n---",
        name=student.name,
        labels=len(student.labels),
        label_names=", ".join(_plain(label) for label in student.labels[:20]) + (", ..." if len(student.labels) > 20 else ""),
        teacher=facts.teacher,
        corpus=facts.corpus,
        verdict=verdict,
        rows=student.rows,
        labelled=student.labelled,
        device=student.device,
        precision=student.precision,
        threads=int(student.cost["threads"]),
        table=_table([e for e in evaluations if e.role == "teacher" or e.name in (student.name, student.baseline)]),
        max_length=facts.max_length,
        fingerprints=", ".join(f"{key} `{value}`" for key, value in facts.fingerprints.items()) or "none",
        versions=", ".join(f"{key} {value}" for key, value in facts.versions.items()) or "not recorded",
        config=facts.config.strip(),
        agreement=f"{student.against['agreement']:.1%}",
    )


def _table(evaluations: Sequence[Evaluation]) -> str:
    head = ("model", "accuracy", "macro F1", "calibration error", "retention", "agreement", "parameters", "p50 / p95 ms", "MB")
    lines = [head, ("---",) * len(head)]
    for e in evaluations:
        quality, beside, cost = e.quality, e.against, e.cost
        lines.append(
            (
                f"{_plain(e.name)} ({e.role})" if _plain(e.name) != e.role else e.role,
                f"{quality['accuracy']:.1%} [{quality['accuracy_low']:.1%}, {quality['accuracy_high']:.1%}]",
                f"{quality['macro_f1']:.3f}",
                f"{quality['ece']:.3f}",
                f"{beside['retention']:.1%} [{beside['retention_low']:.1%}, {beside['retention_high']:.1%}]" if beside else "",
                f"{beside['agreement']:.1%}" if beside else "",
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{cost['latency_ms_p50']:.1f} / {cost['latency_ms_p95']:.1f}",
                f"{cost['bytes'] / 1e6:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """A name from data as Markdown text: one line, no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _require_same_answers(source: Path, copy: Path, labels: Sequence[str]) -> None:
    from transformers import AutoTokenizer, pipeline

    try:
        classify = pipeline("text-classification", model=str(copy), device="cpu", trust_remote_code=False)
        given = [classify(text, top_k=None, function_to_apply="none") for text in PROBES]
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "DST-3312", "exported model does not load with transformers.pipeline", where=str(source), found=str(error).splitlines()[0],
            do="Check that the folder holds model and tokenizer as save_pretrained writes them",
        ) from error  # fmt: skip
    model = load_classifier(source).eval()
    for text, scores in zip(PROBES, given, strict=True):
        with torch.inference_mode():
            wanted = model(**tokenizer(text, return_tensors="pt")).logits[0]
        found = {score["label"]: score["score"] for score in scores}
        expected = {model.config.id2label[i]: float(wanted[i]) for i in range(len(wanted))}
        if set(found) != set(labels) or any(abs(found[label] - expected[label]) > 1e-4 for label in labels):
            raise InputError(
                "DST-3313", "exported model answers differently", where=str(source), expected=str(expected), found=str(found),
                do="Export again, and report it if it stays",
            )  # fmt: skip
