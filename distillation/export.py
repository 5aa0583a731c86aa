"""Hand a student over: the folder that plain transformers loads, with a model card that says what it can do and how it was made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillation import curves, models
from distillation.cards import ABOUT, Facts, card
from distillation.config import Embedding, ImageClassification, TaskConfig, TextClassification
from distillation.errors import InputError
from distillation.evaluate import Evaluation
from distillation.inference import NAMED
from distillation.models import tokenizer_fingerprint
from distillation.storage import Storage
from distillation.store import MANIFEST

PROBES = ("A short text.", "x", "One more text, longer than the others, so that padding and position play a part in the answer.")
"""Texts on which the exported folder must answer like its source."""
PREPROCESSOR = "preprocessor_config.json"


def export(model_dir: Path, destination: Path, evaluations: Sequence[Evaluation], facts: Facts, *, name: str, verdict: str = "") -> None:
    """Write `model_dir` (safetensors, tokenizer, config) with a README.md to `destination`, which appears whole or not at all.

    evaluations: with those of the student called `name`, its teacher and its baseline, which the card shows. A folder of an image model
    also says how images become its input. An older folder is replaced only when the new one loads with plain transformers (with the
    pipeline of its task, where there is one), knows its label names and answers as its source does. Raises InputError if not.
    """
    if destination.resolve() == model_dir.resolve():
        raise InputError("DST-3311", "export would overwrite its source", where=str(destination), do="Choose another folder")
    if not isinstance(facts.task, ImageClassification):
        tokenizer_fingerprint(model_dir)  # transformers makes up an empty tokenizer where a folder has none
    student = next(e for e in evaluations if e.name == name)
    with Storage(str(destination.resolve().parent)).writing_folder(destination.name, last="README.md") as beside:
        shutil.copytree(model_dir, beside, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, curves.FILE, "README.md"))
        if isinstance(facts.task, ImageClassification) and not (beside / PREPROCESSOR).is_file():
            (beside / PREPROCESSOR).write_text(json.dumps(preprocessor(facts.task), indent=1), encoding="utf-8")
        (beside / "README.md").write_text(card(student, evaluations, facts, verdict), encoding="utf-8")
        _require_same_answers(model_dir, beside, facts, student.labels)


def preprocessor(task: ImageClassification) -> dict[str, Any]:
    """How images become the input of a model, as transformers writes it. What it names needs Pillow, not torchvision."""
    mean, std = (list(value) if len(value) > 1 else list(value) * task.channels for value in (task.mean, task.std))
    return {
        "image_processor_type": "ViTImageProcessor", "do_resize": True, "size": {"height": task.size, "width": task.size}, "resample": 2,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": mean, "image_std": std,
    }  # fmt: skip


def _require_same_answers(source: Path, copy: Path, facts: Facts, labels: Sequence[str]) -> None:
    task = facts.task
    try:
        loaded, pipe = _plainly_loaded(copy, task)
        inputs = _probes(source, task, facts.max_length)
        if pipe is not None and isinstance(task, TextClassification):
            given = [pipe(text, top_k=None, function_to_apply="none") for text in PROBES]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            "DST-3312", "exported model does not load with transformers.pipeline", where=str(source), found=str(error).splitlines()[0],
            do="Check that the folder holds model and tokenizer as save_pretrained writes them",
        ) from error  # fmt: skip
    model = models.load(source, task).eval()
    names = list(model.config.id2label.values())
    if isinstance(task, NAMED) and set(names) != set(labels):
        raise _different(source, ", ".join(labels), ", ".join(map(str, names)))
    for place, row in enumerate(inputs):
        with torch.inference_mode():
            wanted, found = (_answer(each(**row)) for each in (model, loaded))
        if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=0, atol=1e-4):
            raise _different(source, str(wanted.flatten()[:8].tolist()), str(found.flatten()[:8].tolist()))
        if pipe is not None and isinstance(task, TextClassification):
            by_name = {score["label"]: score["score"] for score in given[place]}
            expected = dict(zip(names, wanted[0].tolist(), strict=True))
            if set(by_name) != set(names) or any(abs(by_name[label] - expected[label]) > 1e-4 for label in names):
                raise _different(source, str(expected), str(by_name))


def _different(source: Path, expected: str, found: str) -> InputError:
    return InputError(
        "DST-3313", "exported model answers differently", where=str(source), expected=expected, found=found,
        do="Export again, and report it if it stays",
    )  # fmt: skip


def _plainly_loaded(folder: Path, task: TaskConfig) -> tuple[Any, Any]:
    """A model as anyone loads it, and its pipeline; None where no pipeline serves it."""
    from transformers import pipeline

    if isinstance(task, Embedding) or (isinstance(task, ImageClassification) and task.channels == 1):
        return models.auto_class(task).from_pretrained(folder, trust_remote_code=False, local_files_only=True).eval(), None
    pipe = pipeline(ABOUT[task.type].pipeline, model=str(folder), device="cpu", trust_remote_code=False)
    return pipe.model.eval(), pipe


def _probes(folder: Path, task: TaskConfig, max_length: int) -> list[Mapping[str, Tensor]]:
    """Inputs of a model: texts, or images drawn at random."""
    if isinstance(task, ImageClassification):
        generator = torch.Generator().manual_seed(0)
        return [{"pixel_values": torch.randn(2, task.channels, task.size, task.size, generator=generator)}]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    names = ("input_ids", "attention_mask")
    made = [tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt") for text in PROBES]
    return [{name: each[name] for name in names if name in each} for each in made]


def _answer(result: Any) -> Tensor:
    answer: Tensor = result.logits if "logits" in result else result.last_hidden_state
    return answer.float()
