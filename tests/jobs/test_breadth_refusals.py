"""What cannot work is refused by `distill plan` and by the start of `distill run`: one sentence, the right exit code, before anything expensive."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml
from PIL import Image

from distillation.errors import DistilleryError
from jobs import cli
from jobs.config import load, recipes
from tests import kinds
from tests.tiny import model_folder, texts, tokenizer

# Ray Data warns of its own old settings whenever it makes its context, also with the defaults.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context")

SOFT = {"soft": {"type": "forward_kl"}}
REST = {"training": {"steps": 2, "batch_tokens": 256}, "cluster": {"storage": "storage"}}
LABELS = {
    "name": "labels", "task": {"type": "text_classification", "max_length": 32}, "corpus": {"type": "files", "train": "rows.jsonl"},
    "teacher": {"model": "./model"}, "student": {"type": "layers", "layers": [0]}, "losses": SOFT, **REST,
}  # fmt: skip
WORDS = {
    **LABELS, "name": "words", "task": {"type": "causal_lm", "max_length": 32},
    "teacher": {"model": "./gpt", "targets": {"logits": {"type": "topk", "k": 8}}},
    "losses": {"soft": {"type": "forward_kl", "temperature": 1.0}},
}  # fmt: skip
IMAGES = {
    **LABELS, "name": "images", "task": {"type": "image_classification", "size": 8}, "corpus": {"type": "files", "train": "images.parquet"},
    "teacher": {"model": {"architecture": "resnet", "depths": [1, 1], "hidden_sizes": [8, 12]}, "training": {"steps": 2, "batch_tokens": 16}},
    "student": {"type": "convolutional", "depths": [1], "hidden_sizes": [8]}, "training": {"steps": 2, "batch_tokens": 16},
}  # fmt: skip
BASES = {"labels": LABELS, "words": WORDS, "images": IMAGES}
SCRATCH = {"type": "scratch", "layers": 2, "hidden_size": 16, "heads": 2, "intermediate_size": 32}
RELATIONS = {"teacher.targets": {"features": {"relations": 3}}}
TWO = {
    "teacher": None,
    "teachers": {"deep": {"model": "./model"}, "wide": {"model": "./wide", "live": True, "targets": {"features": {"layers": [0, 1]}}}},
    "losses.soft.teacher": "deep",
}  # fmt: skip
HIDDEN = {"teacher.targets": {"features": {"layers": [3]}}}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    model_folder(folder / "model")
    model_folder(folder / "wide", layers=2, hidden=24)
    kinds.save(folder / "gpt", "causal_lm")
    kinds.save(folder / "other", "text_classification")
    tokenizer(kinds.save(folder / "masked", "masked_lm"))
    kinds.save(folder / "foreign", "causal_lm")
    tokenizer(folder / "foreign")
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in texts(200)))
    generator = np.random.default_rng(0)
    for name, shape in {"images": (8, 8, 3), "grey": (8, 8)}.items():
        rows = []
        for number in range(60):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, shape, np.uint8)).save(file, "PNG")
            rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": ["red", "blue"][number % 2]})
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


def written(place, base, changes):
    """A job file: changes by dotted path, None takes out."""
    job = copy.deepcopy(BASES[base])
    for path, value in changes.items():
        *above, last = path.split(".")
        at = job
        for key in above:
            at = at.setdefault(key, {})
        if value is None:
            del at[last]
        else:
            at[last] = value
    (place / "job.yaml").write_text(yaml.safe_dump(job))
    return "job.yaml"


def planned(place, base, changes):
    with contextlib.chdir(place):
        cli.plan(written(place, base, changes))


@pytest.mark.parametrize("base", BASES)
def test_without_a_change_there_is_nothing_to_refuse(place, base, capsys):
    planned(place, base, {})
    assert "nothing was launched" in capsys.readouterr().out


REFUSED = {
    "another tokenizer, token by token": (
        "labels", {**RELATIONS, "student": {"type": "pretrained", "model": "./other"}, "losses.inner": {"type": "relation_kl", "heads": 2}}, 3,
        r"DST-3212\]: student and teacher have different tokenizers: .*other: .*, or leave out losses\.inner, which goes by token"),
    "another tokenizer of a language model": (
        "words", {"student": {"type": "pretrained", "model": "./foreign"}}, 3,
        r"DST-3212\]: .*foreign: .*, or let universal_logit be the only loss that asks the teacher"),
    "another tokenizer and a live teacher": (
        "labels", {"student": {"type": "pretrained", "model": "./other"}, "teacher.live": True}, 3,
        r"DST-3212\]: .*, or let no teacher be live"),
    "another tokenizer and hidden words": (
        "words", {"task.type": "masked_lm", "teacher.model": "./masked", "student": {"type": "pretrained", "model": "./other"}}, 3,
        r"DST-3212\]: .*Take a student of the teacher's family$"),
    "sorted probabilities of draws": (
        "words", {"teacher.targets": {"logits": {"type": "sampled", "temperature": 1.0}}, "losses.soft": {"type": "universal_logit"}}, 2,
        r"DST-2005\]: .*losses\.soft: universal_logit needs distribution of the teacher; set"),
    "no such layer for a student": ("labels", {"student.layers": [0, 4]}, 2,
                                    r"DST-2011\]: .*student\.layers: expected layers 0 to 3 but found 4"),
    "more layers than the teacher has": ("labels", {"student": {"type": "layers", "count": 5}}, 2,
                                         r"DST-2011\]: .*expected layers 0 to 3 but found 4"),
    "no such layer of the teacher": ("labels", {"teacher.targets": {"features": {"layers": [4]}}}, 2,
                                     r"DST-2011\]: .*teacher\.targets\.features: expected layers 0 to 3 but found \[4\]"),
    "no such layer in a loss": ("labels", {**HIDDEN, "losses.inner": {"type": "hidden_mse", "layers": {1: 3}}}, 2,
                                r"DST-2012\]: student has no such layer: .*expected layers 0 to 0 but found \[1\]"),
    "a layer that is not kept": ("labels", {**HIDDEN, "losses.inner": {"type": "hidden_mse", "layers": {0: 2}}}, 2,
                                 r"DST-2005\]: .*losses\.inner\.layers: teacher layers \[2\] are not in .*\[3\]"),
    "a map deeper than the teacher": (
        "labels", {**HIDDEN, "student": {**SCRATCH, "layers": 6}, "losses.inner": {"type": "hidden_mse", "layers": "last"}},
                                      2, r"DST-2031\]: layer map does not fit: losses\.inner\.layers"),
    "a student of another width": (
        "labels", {**HIDDEN, "student": {**SCRATCH, "hidden_size": 8}, "losses.inner": {"type": "hidden_mse", "layers": {0: 3}}},
                                   2, r"DST-2013\]: .*hidden_size: expected 16 but found 8\. .*projection: true"),
    "a student cut to another width": (
        "labels", {**HIDDEN, "student": {"type": "layers", "hidden_size": 8}, "losses.inner": {"type": "cosine", "layers": {0: 3}}}, 2,
        r"DST-2013\]: .*hidden_size: expected 16 but found 8\. "),
    "a student of fewer heads": (
        "labels", {**HIDDEN, "student": {"type": "layers", "heads": 1}, "losses.inner": {"type": "cosine", "layers": {0: 3}}}, 2,
        r"DST-2013\]: .*hidden_size: expected 16 but found 8\. "),
    "another width than the second teacher's": (
        "labels", {**TWO, "losses.inner": {"type": "hidden_mse", "teacher": "wide", "layers": {0: 1}}}, 2,
        r"DST-2013\]: .*hidden_size: expected 24 but found 16\. "),
    "no such layer of the second teacher": (
        "labels", {**TWO, "losses.inner": {"type": "attention_kl", "teacher": "wide", "layers": {0: 2}}}, 2,
        r"DST-2011\]: .*losses\.inner\.layers: expected layers 0 to 1 but found \[2\]"),
    "a map deeper than the second teacher": (
        "labels", {**TWO, "student": {**SCRATCH, "layers": 3}, "losses.inner": {"type": "hidden_mse", "teacher": "wide", "layers": "even"}}, 2,
        r"DST-2031\]: .*losses\.inner\.layers: .*teacher of 2"),
    "logits of top-k targets": ("words", {"losses.far": {"type": "l2_distil"}}, 2,
                                r"DST-2005\]: .*losses\.far: l2_distil needs logits of the teacher; set"),
    "states that are not kept": ("labels", {"losses.inner": {"type": "hidden_mse", "layers": {0: 3}}}, 2,
                                 r"DST-2005\]: .*losses\.inner: hidden_mse needs hidden of the teacher; add teacher\.targets\.features"),
    "pooled output that is not kept": ("labels", {"losses.group": {"type": "rkd_angle"}}, 2,
                                       r"DST-2005\]: .*rkd_angle needs pooled of the teacher; add"),
    "relations that are not kept": ("labels", {"losses.inner": {"type": "relation_kl"}}, 2,
                                    r"DST-2005\]: .*relation_kl needs relations of the teacher; add"),
    "heads that do not divide the width, cut": ("labels", {"student": {"type": "layers", "hidden_size": 9, "heads": 2}}, 2,
                                                r"DST-2023\]: .*hidden_size: expected"),
    "heads that do not divide the width, scratch": ("labels", {"student": {**SCRATCH, "heads": 3}}, 2,
                                                    r"DST-2005\]: .*student: hidden_size 16 is not a multiple of heads 3"),
    "heads that do not divide the width, new teacher": (
        "words", {"teacher": {"model": {"architecture": "gpt2", "layers": 1, "hidden_size": 16, "heads": 3}, "training": {"steps": 1}}}, 2,
        r"DST-2005\]: .*teacher\.model: hidden_size 16 is not a multiple of heads 3"),
    "relation heads that do not divide the width": ("labels", {**RELATIONS, "losses.inner": {"type": "relation_kl", "heads": 3}}, 2,
                                                    r"DST-2025\]: .*losses\.inner\.heads: expected a divisor of \[16\] but found 3 for student"),
    "wider than the teacher": ("labels", {"student": {"type": "layers", "hidden_size": 32}}, 2, r"DST-2021\]: .*hidden_size"),
    "more classes than the vocabulary has": ("words", {"teacher.targets.logits.k": 41}, 2,
                                             r"DST-2032\]: k is larger than the vocabulary: .*logits\.k: expected at most 40 but found 41"),
    "images of another size": ("images", {"task.size": 16}, 3, r"DST-3462\]: .*images\.parquet.*expected 16x16.*found 8x8.*task\.resize"),
    "grey images": ("images", {"corpus.train": "grey.parquet"}, 3, r"DST-3463\]: .*grey\.parquet.*task\.channels"),
    "coloured images": ("images", {"task.channels": 1}, 3, r"DST-3463\]: .*images\.parquet.*task\.channels"),
    "a store over its budget": ("labels", {"store": {"budget": 1000}}, 2,
                                r"DST-2034\]: .*store\.budget: expected at most 1,000 bytes but found [\d,]+ bytes"),
    "a temperature that is not exact": ("words", {"losses.soft.temperature": 2.0}, 2,
                                        r"DST-2005\]: .*losses\.soft\.temperature is 2, but the teacher's topk targets are exact at 1 only; add"),
    "a ramp of temperatures": ("words", {"losses.soft.temperature": {"start": 1, "end": 2}}, 2,
                               r"DST-2005\]: .*losses\.soft\.temperature is a ramp"),
    "attention of a stored teacher": ("labels", {"losses.map": {"type": "attention_kl", "layers": {0: 3}}}, 2,
                                      r"DST-2005\]: .*losses\.map: attention_kl needs attentions of the teacher; set teacher\.live: true"),
    "mixed rows and a stored teacher": ("labels", {"training.augment": {"type": "mixup"}}, 2,
                                        r"DST-2005\]: .*training\.augment: teacher said nothing about mixed or masked rows; set live: true"),
    "masks drawn anew and a stored teacher": (
        "words", {"task.type": "masked_lm", "teacher.model": "./masked", "training.augment": {"type": "draw_masks"}}, 2,
        r"DST-2005\]: .*training\.augment: teacher said nothing about mixed or masked rows; set live: true"),
    "masks of another task": ("words", {"training.augment": {"type": "draw_masks"}, "teacher.live": True}, 2,
                              r"DST-2005\]: .*training\.augment: draw_masks is for masked_lm, the task is causal_lm"),
    "mixed rows of a language model": ("words", {"training.augment": {"type": "mixup"}, "teacher.live": True}, 2,
                                       r"DST-2005\]: .*training\.augment: mixup is for text_classification and image_classification"),
    "pairs without their second text": ("labels", {"task.pair": "question"}, 3,
                                        r"DST-3407\]: column is missing: .*rows\.jsonl: expected 'question' but found"),
    "a student that no job finished": ("labels", {"teacher.model": "student:elsewhere/small"}, 3,
                                       r"DST-3231\]: no finished student of that name: student:elsewhere/small: .*found none.*Run that job first"),
    "a student of a job without its name": ("labels", {"teacher.model": "student:elsewhere"}, 3, r"DST-3231\]: .*student:elsewhere: "),
    "a probe for a language model": ("words", {"student": {"type": "probe"}}, 2,
                                     r"DST-2005\]: .*students\.student: a probe answers once a row; causal_lm"),
    "a convolution that reads text": ("labels", {"student": {"type": "convolutional", "depths": [1], "hidden_sizes": [8]}}, 2,
                                      r"DST-2005\]: .*a convolutional student reads images; the task is text_classification"),
    "groups of tokens": ("words", {"losses.group": {"type": "similarity_kl"}}, 2,
                         r"DST-2005\]: .*losses\.group: similarity_kl is no loss of causal_lm; it has"),
    "groups of words": ("labels", {"task": {"type": "token_classification"}, "losses.group": {"type": "dist"}}, 2,
                        r"DST-2005\]: .*losses\.group: dist is no loss of token_classification"),
    "an architecture of another task": (
        "words", {"teacher": {"model": {"architecture": "bert", "layers": 1, "hidden_size": 16, "heads": 2}, "training": {"steps": 1}}},
        2, r"DST-2035\]: .*teacher\.model\.architecture: expected gpt2, llama but found bert for causal_lm"),
    "rows longer than the model reads": ("words", {"task.max_length": 65}, 2,
                                         r"DST-2014\]: .*task\.max_length: expected at most 64 .*found 65"),
    "two teachers, and nobody named": ("labels", {"teacher": None, "teachers": {"a": {"model": "./model"}, "b": {"model": "./model"}}}, 2,
                                       r"DST-2005\]: .*losses\.soft\.teacher: say which of a, b"),
    "teachers of two vocabularies": (
        "labels", {"teacher": None, "teachers": {"a": {"model": "./model"}, "b": {"model": "./other"}}, "losses.soft.teacher": "a"}, 3,
        r"DST-3212\]: .*other"),
    "labels on an embedding": ("labels", {"task": {"type": "embedding"}, "losses": {"near": {"type": "cosine"}},
                                          "teacher.targets": {"features": {"pooled": True}}}, 2,
                               r"DST-2005\]: .*baseline: embedding has no labels to train on without a teacher; set baseline: false"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_a_bad_job_is_refused_in_one_sentence(place, what):
    base, changes, exit_code, message = REFUSED[what]
    started = time.monotonic()
    with pytest.raises(DistilleryError, match=message) as caught:
        planned(place, base, changes)
    assert caught.value.exit_code == exit_code, str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 20
    assert not ray.is_initialized()
    assert not list((place / "storage").glob("corpora/*"))


OFFLINE = ("code_tokens", "embeddings", "gpt_source", "quickstart", "resnet_digits")


def test_every_recipe_is_known_here():
    assert set(OFFLINE) < set(recipes())


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_load_and_plan(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load(name)
    if name not in OFFLINE:
        assert "Needs the Hugging Face hub" in recipes()[name]
        with pytest.raises(DistilleryError, match=r"DST-3209|DST-3432") as caught:
            cli.plan(name)
        assert (caught.value.exit_code, "\n" in str(caught.value)) == (3, False)
        return
    cli.plan(name)
    shown = capsys.readouterr().out
    assert "nothing was launched" in shown
    assert "targets" in shown
