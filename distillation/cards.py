"""The model card of a student: what it can do, how it is used with plain transformers, and how it was made."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from distillation.config import Embedding, ImageClassification, TaskConfig, TextClassification
from distillation.evaluate import Evaluation

CARD = """{front}
# {name}

{what}, distilled from `{teacher}` on the corpus `{corpus}`.

{verdict}

## Evaluation

{rows} held-out rows, {labelled} of them labelled; {device}, {precision}, {threads} threads. Intervals are 95 %: {intervals}.
The baseline is the same student with the same start and the same steps, trained on labels alone.

{table}

## Use

```python
{usage}
```

## Training

Made by Distillery from this job file. Fingerprints: {fingerprints}. Versions: {versions}.

````yaml
{config}
````

## Limits

{limits}
"""


class Facts(BaseModel):
    """Where a model comes from, for people: what the card and the report print."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    teacher: str
    """As the job file names it."""
    corpus: str
    max_length: int
    """Tokens of a row, special tokens included."""
    task: TaskConfig = TextClassification()
    config: str
    """The resolved job file, YAML."""
    fingerprints: dict[str, str] = {}
    versions: dict[str, str] = {}


class Metric(NamedTuple):
    title: str
    share: bool
    """Between 0 and 1, and shown in percent."""


METRICS = {
    "accuracy": Metric("accuracy", True),
    "macro_f1": Metric("macro F1", False),
    "ece": Metric("calibration error", False),
    "nll": Metric("nll", False),
    "f1": Metric("F1", True),
    "exact_match": Metric("exact match", True),
    "pearson": Metric("Pearson", False),
    "spearman": Metric("Spearman", False),
    "mse": Metric("MSE", False),
    "mae": Metric("MAE", False),
    "perplexity": Metric("perplexity", False),
    "bits_per_byte": Metric("bits per byte", False),
    "recall_at_1": Metric("recall@1", True),
    "probe_accuracy": Metric("probe accuracy", True),
    "cosine": Metric("cosine", False),
    "neighbours": Metric("same neighbour", True),
    "agreement": Metric("agreement", True),
    "kl_to_teacher": Metric("KL to teacher", False),
    "mse_to_teacher": Metric("MSE to teacher", False),
    "cosine_to_teacher": Metric("cosine to teacher", False),
}
"""How metrics are called and shown, wherever people read them."""


class About(NamedTuple):
    what: str
    pipeline: str
    """Tag of the hub."""
    columns: tuple[str, ...]
    """Of the table, after the headline."""
    answers: str
    """Of the limits: what every input is answered with."""


ABOUT = {
    "text_classification": About(
        "A text classifier with {labels}", "text-classification", ("macro_f1", "ece"),
        "It gives one of its labels to every text, also to one that fits none of them.",
    ),
    "multi_label": About(
        "A text classifier that gives any number of {labels}", "text-classification", ("exact_match",),
        "A label is given where its probability is above 1/2; other thresholds were not tried.",
    ),
    "regression": About(
        "A model that gives every text a number", "text-classification", ("spearman", "mse"),
        "It gives a number to every text, also to one unlike those that it was trained on.",
    ),
    "token_classification": About(
        "A model that finds entities, with {labels} for words", "token-classification", ("accuracy",),
        "Words were given one by one; where a text is cut into words otherwise, entities may begin and end elsewhere.",
    ),
    "causal_lm": About(
        "A language model", "text-generation", ("bits_per_byte", "accuracy"),
        "It was scored by how well it foretells text, not by what it writes: it states what is false as fluently as what is true.",
    ),
    "masked_lm": About(
        "A masked language model", "fill-mask", ("accuracy",),
        "It was scored by how well it fills in hidden tokens; tasks built upon it were not tried.",
    ),
    "image_classification": About(
        "An image classifier with {labels}", "image-classification", ("macro_f1", "ece"),
        "It gives one of its labels to every image, also to one that fits none of them.",
    ),
    "embedding": About(
        "A model that turns a text into a vector", "feature-extraction", ("probe_accuracy",),
        "Its vectors compare by cosine, and only with each other: those of the teacher lie elsewhere.",
    ),
}  # fmt: skip


def card(student: Evaluation, evaluations: Sequence[Evaluation], facts: Facts, verdict: str = "") -> str:
    """The model card: YAML front matter as the Hugging Face hub reads it, then Markdown."""
    about = ABOUT[facts.task.type]
    elsewhere = [e.device for e in evaluations if e.role == "teacher" and e.device != student.device]
    return CARD.format(
        front=f"---\n{_front(student, facts, about)}\n---",
        name=student.name,
        what=about.what.format(labels=_labels(student.labels)),
        teacher=facts.teacher,
        corpus=facts.corpus,
        verdict=verdict,
        rows=student.rows,
        labelled=student.labelled,
        device=student.device + "".join(f"; the teacher on {device}" for device in elsewhere),
        precision=student.precision,
        threads=int(student.cost["threads"]),
        intervals="Wilson for accuracy, paired bootstrap over rows for retention" if student.headline == "accuracy" else "paired bootstrap over rows",
        table=_table([e for e in evaluations if e.role == "teacher" or e.name in (student.name, student.baseline)], about),
        usage=usage(facts.task, facts.max_length),
        fingerprints=", ".join(f"{key} `{value}`" for key, value in facts.fingerprints.items()) or "none",
        versions=", ".join(f"{key} {value}" for key, value in facts.versions.items()) or "not recorded",
        config=facts.config.strip(),
        limits="\n".join(f"- {line}" for line in _limits(student, facts, about)),
    )  # fmt: skip


def _labels(labels: Sequence[str]) -> str:
    return f"{len(labels)} labels ({', '.join(_plain(label) for label in labels[:20])}{', ...' if len(labels) > 20 else ''})"


def _front(student: Evaluation, facts: Facts, about: About) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    names = {"macro_f1": "f1", "pearson": "pearsonr", "spearman": "spearmanr"}
    shown = (student.headline, *(key for key in _columns(student, about) if key in student.quality and key != "ece"))
    results: list[Any] = [
        EvalResult(
            task_type=about.pipeline, dataset_type=facts.corpus, dataset_name=facts.corpus, metric_type=names.get(key, key),
            metric_value=round(student.quality[key], 4),
        )
        for key in shown
    ]  # fmt: skip
    front = ModelCardData(
        base_model=facts.teacher if re.fullmatch(r"[\w.-]+/[\w.-]+", facts.teacher) else None,
        library_name="transformers",
        pipeline_tag=about.pipeline,
        tags=["knowledge-distillation"],
        metrics=[names.get(key, key) for key in shown],
        model_name=student.name,
        eval_results=results,
    )
    return str(front.to_yaml())


def _columns(e: Evaluation, about: About) -> tuple[str, ...]:
    """Beside the headline; of models with different tokens nothing else compares."""
    return () if e.headline == "bits_per_byte" else about.columns


def _limits(student: Evaluation, facts: Facts, about: About) -> list[str]:
    image, quality, beside = isinstance(facts.task, ImageClassification), student.quality, student.against
    most = f"texts of at most {facts.max_length} tokens; longer ones are cut"
    size = (
        f"images of {facts.task.size} by {facts.task.size} pixels; others are scaled"
        if isinstance(facts.task, ImageClassification)
        else most
    )
    found = [f"It was trained and evaluated on {size}, and other kinds of {'image' if image else 'text'} were not tried.", about.answers]
    imitates = "It imitates its teacher, mistakes included"
    if "agreement" in beside:
        scored = "held-out rows" if student.positions <= student.rows else "scored positions of the held-out rows"
        same = "have the same nearest neighbour for" if isinstance(facts.task, Embedding) else "give the same answer to"
        imitates += f": the two {same} {beside['agreement']:.1%} of the {scored}"
    found.append(f"{imitates}.")
    if "ece" in quality:
        found.append("Probabilities are calibrated only as far as the expected calibration error in the table says.")
    if isinstance(facts.task, ImageClassification) and facts.task.channels == 1:
        found.append("Its images have one channel: the pipeline of transformers, which makes every image RGB, does not serve it.")
    return found


def _table(evaluations: Sequence[Evaluation], about: About) -> str:
    first = evaluations[0]
    extra = [key for key in _columns(first, about) if all(key in e.quality for e in evaluations)]
    near = next((key for key in ("agreement", "mse_to_teacher") if any(key in e.against for e in evaluations)), "agreement")
    lower = " (lower is better)" if first.better == "min" else ""
    titles = (METRICS[first.headline].title + lower, *(METRICS[key].title for key in extra), "retention", METRICS[near].title)
    head = ("model", *titles, "parameters", "p50 / p95 ms", "MB")
    lines = [head, ("---",) * len(head)]
    for e in evaluations:
        quality, beside, cost = e.quality, e.against, e.cost
        low, high = (show(e.headline, quality[f"{e.headline}_{end}"]) for end in ("low", "high"))
        lines.append(
            (
                f"{_plain(e.name)} ({e.role})" if _plain(e.name) != e.role else e.role,
                f"{show(e.headline, quality[e.headline])} [{low}, {high}]",
                *(show(key, quality[key]) for key in extra),
                f"{beside['retention']:.1%} [{beside['retention_low']:.1%}, {beside['retention_high']:.1%}]" if beside else "",
                show(near, beside[near]) if near in beside else "",
                f"{cost['parameters'] / 1e6:.2f} M",
                f"{cost['latency_ms_p50']:.1f} / {cost['latency_ms_p95']:.1f}",
                f"{cost['bytes'] / 1e6:.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(metric: str, value: float) -> str:
    """A metric for people: percent where it is a share, else three decimals or four digits."""
    if METRICS[metric].share:
        return f"{value:.1%}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.4g}"


def _plain(text: str) -> str:
    """A name from data as Markdown text: one line, no markup of its own."""
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split()))


# ----------------------------------------------------------------------------------------------------------------- usage

PIPELINES = {
    "text_classification": 'classify("some text", truncation=True, max_length={length})',
    "multi_label": (
        'scores = classify("some text", top_k=None, truncation=True, max_length={length})\n'
        '[score["label"] for score in scores if score["score"] > 0.5]'
    ),
    "regression": 'classify("some text", function_to_apply="none", truncation=True, max_length={length})[0]["score"]',
    "token_classification": 'classify("some text", aggregation_strategy="first")',
    "causal_lm": 'generate("some text", max_new_tokens=20)',
    "masked_lm": 'fill(f"some {{fill.tokenizer.mask_token}} text")',
    "image_classification": 'classify("picture.png")',
}
"""What is done with a pipeline of the task; `length` is the most tokens of a row."""

EMBED = """import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModel.from_pretrained("path/to/this/folder").eval()
batch = tokenizer(["some text", "another one"], padding=True, truncation=True, max_length={length}, return_tensors="pt")
with torch.no_grad():
    states = model(**batch).last_hidden_state
{pooled}"""

POOLED = {
    "mean": 'mask = batch["attention_mask"][..., None]\nvectors = (states * mask).sum(1) / mask.sum(1)',
    "first": "vectors = states[:, 0]",
}

ONE_CHANNEL = """import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("path/to/this/folder")
model = AutoModelForImageClassification.from_pretrained("path/to/this/folder").eval()
with torch.no_grad():
    logits = model(**processor(Image.open("picture.png").convert("L"), return_tensors="pt")).logits
model.config.id2label[int(logits.argmax())]"""


def usage(task: TaskConfig, max_length: int) -> str:
    """Python that uses the folder with transformers alone."""
    if isinstance(task, Embedding):
        return EMBED.format(length=max_length, pooled=POOLED[task.pooling])
    if isinstance(task, ImageClassification) and task.channels == 1:
        return ONE_CHANNEL
    call = PIPELINES[task.type].format(length=max_length)
    if getattr(task, "pair", None):
        call = call.replace('"some text"', '{"text": "some text", "text_pair": "another one"}')
    name = {"causal_lm": "generate", "masked_lm": "fill"}.get(task.type, "classify")
    made = f'{name} = pipeline("{ABOUT[task.type].pipeline}", model="path/to/this/folder")'
    return f"from transformers import pipeline\n\n{made}\n{call}"
