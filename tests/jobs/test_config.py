"""A wrong job file is refused at once, in one line that names every problem; no text does anything else than load or be refused."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from distillation.config import LossConfig, StudentConfig, TaskConfig
from distillation.errors import ConfigError, SecurityError
from distillation.tasks import TASKS
from jobs import config
from jobs.config import Name, dump, load, parse, recipes

ROOT = Path(__file__).parent.parent.parent

GOOD = {
    "name": "j",
    "task": {"type": "text_classification", "max_length": 64},
    "corpus": {"type": "files", "train": "a.csv"},
    "teacher": {"model": "some/model"},
    "student": {"type": "layers", "layers": [0]},
    "losses": {"soft": {"type": "forward_kl"}},
    "training": {"epochs": 1},
}


def changed(path, value):
    """GOOD with one setting set, as YAML."""
    content = copy.deepcopy(GOOD)
    inner = content
    *above, last = path.split(".")
    for part in above:
        inner = inner.setdefault(part, {})
    inner[last] = value
    return yaml.safe_dump(content, sort_keys=False)


def text(**changes):
    return yaml.safe_dump({key: value for key, value in {**GOOD, **changes}.items() if value is not None}, sort_keys=False)


def refused(content, message, kind=ConfigError, overrides=()):
    with pytest.raises(kind, match=message) as caught:
        parse(content, overrides, "job.yaml")
    line = str(caught.value)
    assert line.startswith(f"error[{caught.value.code}]: ")
    assert "\n" not in line
    return line


# ------------------------------------------------------------------------------------------------------------- what loads


@pytest.mark.parametrize("name", sorted(recipes()))
def test_recipes_load_and_come_back_from_their_dump(name):
    job = load(name)
    assert parse(dump(job), (), "dump") == job
    assert pickle.loads(pickle.dumps(job)) == job
    assert re.match(r"# \S", recipes()[name]), "the first line says what the recipe is"


def test_defaults_and_what_follows_from_them():
    job = parse(text(), (), "x")
    assert (job.training.batch_tokens, job.cluster.workers, job.corpus.labelled, job.evaluation.precision) == (4096, 1, 1.0, "fp32")
    assert list(job.all_students) == ["student"]
    assert job.needs_teacher
    assert {name: loss.type for name, loss in job.baseline_losses.items()} == {"hard": "cross_entropy"}
    hard = parse(text(losses={"hard": {"type": "cross_entropy"}, "soft": {"type": "forward_kl", "weight": 0}}), (), "x")
    assert not hard.needs_teacher
    assert list(hard.active_losses) == list(hard.baseline_losses) == ["hard"]
    with pytest.raises(ValidationError, match="frozen"):
        job.name = "other"


def test_every_type_of_loss_and_student_can_be_written():
    """The table that a new variant has to be added to: one line a type, with the settings it cannot do without."""
    plain = ("cross_entropy forward_kl reverse_kl jsd skewed_kl skewed_reverse_kl adaptive_kl total_variation universal_logit l2_distil "
             "logit_mse standardised_kl decoupled_kd dist hidden_mse cosine relation_kl rkd_distance rkd_angle similarity_preserving "
             "similarity_kl contrastive binary_cross_entropy label_mse teacher_mse binary_kl")  # fmt: skip
    losses = {name: {} for name in plain.split()} | {"pkd": {"layers": {0: 3}}, "attention_kl": {"layers": {0: 3}}}
    students = {
        "layers": {"count": 2},
        "scratch": {"layers": 1, "hidden_size": 8, "heads": 2, "intermediate_size": 16},
        "convolutional": {"depths": [1, 2], "hidden_sizes": [8, 16]},
        "pretrained": {"model": "m"},
        "probe": {},
    }
    for union, listed in ((LossConfig, losses), (StudentConfig, students), (TaskConfig, TASKS)):
        assert set(TypeAdapter(union).json_schema()["discriminator"]["mapping"]) == set(listed)
    own = {"binary_cross_entropy": "multi_label", "binary_kl": "multi_label", "label_mse": "regression", "teacher_mse": "regression"}
    teacher = {"model": "m", "targets": {"features": {"layers": [3], "pooled": True, "relations": 3}}}
    for name, rest in losses.items():
        its = {"model": "m", "live": True} if name == "attention_kl" else teacher
        task = {"type": own.get(name, "text_classification"), "max_length": 64}
        job = parse(text(task=task, teacher=its, losses={"one": {"type": name, **rest}}), (), "x")
        assert parse(dump(job), (), "dump") == job
    for name, rest in students.items():
        images = {"task": {"type": "image_classification"}} if name == "convolutional" else {}
        its = {"model": "m", "targets": {"features": {"layers": [3], "pooled": True}}} if images else teacher
        job = parse(text(teacher=its, student={"type": name, **rest}, **images), (), "x")
        assert parse(dump(job), (), "dump") == job
    for name in TASKS:
        loss = {"embedding": "cosine", "multi_label": "binary_kl", "regression": "teacher_mse"}.get(name, "forward_kl")
        temperature = {"temperature": 1.0} if loss == "forward_kl" else {}
        task = {"type": name} if name == "image_classification" else {"type": name, "max_length": 64}
        its = {"model": "m", "targets": {"features": {"pooled": True}}}
        job = parse(text(teacher=its, task=task, baseline=name != "embedding", losses={"one": {"type": loss, **temperature}}), (), "x")
        assert parse(dump(job), (), "dump") == job


def test_losses_go_with_their_task_and_targets():
    def told(message, **changes):
        refused(text(**changes), message)

    lm, many = {"type": "causal_lm", "max_length": 64}, {"type": "multi_label"}
    told(r"losses\.soft: forward_kl is no loss of multi_label; it has .*binary_kl", task=many)
    told(r"losses\.soft: dist is no loss of causal_lm", task=lm, losses={"soft": {"type": "dist"}})
    told(
        r"losses\.soft: rkd_angle is no loss of token_classification",
        task={"type": "token_classification"},
        losses={"soft": {"type": "rkd_angle"}},
    )
    told(r"losses\.soft\.temperature is 2, but the teacher's sampled targets are exact at 1 only; add it to .*temperature", task=lm)
    ramp = {"type": "forward_kl", "temperature": {"start": 4, "end": 1}}
    told(r"losses\.soft\.temperature is a ramp", task=lm, losses={"soft": ramp})
    told(r"losses\.soft\.temperature: .*|temperature must not go below", losses={"soft": {**ramp, "temperature": {"start": 1, "end": 0}}})
    topk = {"model": "m", "targets": {"logits": {"type": "topk", "temperatures": [1, 2]}}}
    assert parse(text(task=lm, teacher=topk), (), "x").targets("teacher").logits.stored_temperatures == (2.0,)
    told(r"losses\.soft: logit_mse needs logits of the teacher; set teacher\.targets\.logits to \{type: dense\}", task=lm,
         losses={"soft": {"type": "logit_mse"}})  # fmt: skip
    drawn = {"model": "m", "targets": {"logits": {"type": "sampled", "temperature": 2}}}
    parse(text(task=lm, teacher=drawn), (), "x")
    told(r"losses\.soft: reverse_kl needs distribution of the teacher", task=lm, teacher=drawn, losses={"soft": {"type": "reverse_kl"}})
    told(r"teacher\.targets\.logits: topk needs one label out of several", task=many, teacher=topk, losses={"soft": {"type": "binary_kl"}})
    told(
        r"losses\.a: attention_kl needs attentions of the teacher; set teacher\.live",
        losses={"a": {"type": "attention_kl", "layers": {0: 0}}},
    )
    told(r"losses\.a: relation_kl looks at whole rows; set task\.pack: false", task=lm, losses={"a": {"type": "relation_kl"}})
    told(r"baseline: embedding has no labels", task={"type": "embedding"}, losses={"c": {"type": "cosine"}})
    told(r"corpus\.labelled: every text of causal_lm is its own label", task=lm, corpus={**GOOD["corpus"], "labelled": 0.5})
    told(r"a convolutional student reads images", student={"type": "convolutional", "depths": [1], "hidden_sizes": [8]})
    told(r"a probe answers once a row; causal_lm does not", task=lm, student={"type": "probe"})


def test_terms_say_which_of_several_teachers():
    both = {"one": {"model": "a"}, "two": {"model": "b"}}
    mean = {"type": "forward_kl", "teacher": {"one": 0.25, "two": 0.75}}
    job = parse(text(teacher=None, teachers=both, losses={"x": mean, "y": {"type": "reverse_kl", "teacher": "two"}}), (), "x")
    assert job.asked_teachers == ["one", "two"]
    assert job.lead == job.all_teachers["one"]
    refused(text(teachers=both), "set one of teacher and teachers")
    refused(text(teacher=None, teachers=both), r"losses\.soft\.teacher: say which of one, two")
    refused(
        text(teacher=None, teachers=both, losses={"x": {**mean, "teacher": "three"}}),
        r"losses\.x: there is no teacher three; there are one, two",
    )
    refused(
        text(teacher=None, teachers=both, losses={"x": {**mean, "teacher": {"one": 0.5, "two": 0.6}}}), r"must be above 0 and add up to 1"
    )
    topk = {name: {**one, "targets": {"logits": {"type": "topk", "temperatures": [2]}}} for name, one in both.items()}
    refused(
        text(teacher=None, teachers=topk, losses={"x": mean}), r"losses\.x\.teacher: topk targets of several teachers .* cannot be mixed"
    )


def test_overrides_set_one_thing_and_leave_the_rest():
    job = load("quickstart", ["training.epochs=5", "students.one-layer.layers=[1]", "losses.soft.temperature=4", "training.precision=fp32"])
    before = load("quickstart")
    assert job.training == before.training.model_copy(update={"epochs": 5, "precision": "fp32"})
    assert job.students["one-layer"].layers == (1,)
    assert job.losses["soft"].temperature == 4.0
    assert job.losses["hard"] == before.losses["hard"]
    added = load("quickstart", ["losses.mse.type=logit_mse", "corpus.test=0.2"])
    assert added.losses["mse"].type == "logit_mse"


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("WHERE", "/somewhere/${else}")
    monkeypatch.setenv("COUNT", "3")
    monkeypatch.delenv("NOT_SET", raising=False)
    storage = {"storage": "${oc.env:WHERE}/x", "workers": "${oc.env:COUNT}", "max_failures": "${oc.env:NOT_SET,4}"}
    job = parse(text(cluster=storage), (), "x")
    assert (job.cluster.storage, job.cluster.workers, job.cluster.max_failures) == ("/somewhere/${else}/x", 3, 4)
    assert parse(text(), ["cluster.storage=${oc.env:WHERE}"], "x").cluster.storage == "/somewhere/${else}"
    refused(changed("cluster.storage", "${oc.env:NOT_SET}"), "DST-2002.*NOT_SET.* not found")


def test_names_and_numbers_survive_the_dump():
    labels = ["1e3", "2024-01-01", "yes", "null", "0x10", "ä ü", "a: b", "#x", "12_3", "~", "=", "<<"]
    job = parse(json.dumps({**GOOD, "task": {"type": "text_classification", "labels": labels}}), ["training.learning_rate=1e-05"], "x")
    assert job.training.learning_rate == 1e-5
    again = parse(dump(job), (), "dump")
    assert again == job
    assert list(again.task.labels) == labels


# ----------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("path", "found", "hint"),
    [
        ("nam", "nam", 'did you mean "name"'),
        ("training.epoch", "training.epoch", 'did you mean "epochs"'),
        ("teacher.targets.logits", "teacher.targets.logits.dtyp", 'did you mean "dtype"'),
        ("losses.soft.weight", "losses.soft.weight.dtyp", "allowed: end, shape, start, until"),
        ("teacher.targets.features.pool", "teacher.targets.features.pool", 'did you mean "pooled"'),
        ("student.layer", "student.layer", 'did you mean "layers"'),
        ("corpus.trian", "corpus.trian", 'did you mean "train"'),
        ("losses.soft.temprature", "losses.soft.temprature", 'did you mean "temperature"'),
        ("task.maxlength", "task.maxlength", 'did you mean "max_length"'),
        ("cluster.worker", "cluster.worker", 'did you mean "workers"'),
        ("tracking.url", "tracking.url", 'did you mean "uri"'),
        ("evaluation.zzzzzzzz", "evaluation.zzzzzzzz", "allowed: batch_tokens, precision, repeats, threads"),
        # What another member of the union has is unknown here.
        ("student.depths", "student.depths", "allowed: choose, count, heads, hidden_size, intermediate_size"),
        ("losses.soft.label_smoothing", "losses.soft.label_smoothing", "allowed: balance, route, teacher, temperature, type, weight"),
    ],
)
def test_unknown_keys(path, found, hint):
    value = 1 if path == found else {"type": "dense", "dtyp": 1} if path.endswith("logits") else {"start": 1, "end": 0, "dtyp": 1}
    line = refused(changed(path, value), f'DST-2005.*unknown key "{re.escape(found)}"')
    assert hint in line


def test_unknown_key_of_one_of_several_students():
    students = {"a": {"type": "layers", "layers": [0]}, "b": {"type": "scratch", "layers": 1, "hidden_sise": 8}}
    line = refused(text(student=None, students=students), r'unknown key "students\.b\.hidden_sise", did you mean "hidden_size"')
    assert "students.b.heads: Field required" in line


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        # wrong type
        ("training.epochs", "three", r"training\.epochs: .*valid integer.*got 'three'"),
        ("training.epochs", 1.5, r"training\.epochs: .*integer.*got 1\.5"),
        ("training.learning_rate", [1], r"training\.learning_rate: .*number.*got \[1\]"),
        ("teacher.model", 5, r"teacher\.model: .*string.*got 5"),
        ("losses", ["soft"], r"losses: .*dictionary.*got \['soft'\]"),
        ("losses.soft", "forward_kl", r"losses\.soft: .*got 'forward_kl'"),
        ("task.labels", "a", r"task\.labels: .*tuple.*got 'a'"),
        ("task.labels", [True, False], r"task\.labels\.0: .*string.*got True"),
        ("student.layers", ["0x"], r"student\.layers\.0: .*integer"),
        ("training", None, r"training: .*got None"),
        # out of range
        ("training.epochs", 0, r"training\.epochs: .*greater than or equal to 1, got 0"),
        ("training.learning_rate", 0, r"training\.learning_rate: .*greater than 0"),
        ("training.warmup", 1.0, r"training\.warmup: .*less than 1"),
        ("training.seed", 2**31, r"training\.seed: .*less than 2147483648"),
        ("training.precision", "fp8", r"training\.precision: .*'auto', 'bf16' or 'fp32'.*got 'fp8'"),
        ("losses.soft.weight", -0.1, r"losses\.soft\.weight: .*greater than or equal to 0"),
        ("losses.soft.temperature", 0, r"losses\.soft\.temperature: .*greater than 0"),
        ("losses.soft.temperature", 101, r"losses\.soft\.temperature: .*less than or equal to 100"),
        ("task.max_length", 3, r"task\.max_length: .*greater than or equal to 4"),
        ("task.labels", ["a"], r"task: labels must be two or more different names"),
        ("task.labels", ["a", "a"], r"task: labels must be two or more different names"),
        ("corpus.labelled", 1.1, r"corpus\.labelled: .*less than or equal to 1"),
        ("corpus.test", 0.95, r"corpus: shares of validation and test .*\[0\.1, 0\.95\]"),
        ("corpus.test", 0.0, r"corpus: shares of validation and test .*above 0"),
        ("cluster.workers", 0, r"cluster\.workers: .*greater than or equal to 1, got 0"),
        ("cluster.workers", "many", r"found cluster\.workers: must be a number of workers or \{min: \.\.\., max: \.\.\.\}, got 'many'$"),
        ("cluster.workers", None, r"found cluster\.workers: must be a number of workers or .*, got None$"),
        ("cluster.workers", 1.5, r"found cluster\.workers: Input should be a valid integer, got a number with a fractional part, got 1\.5$"),
        ("cluster.workers", {"min": 0, "max": 2}, r"found cluster\.workers\.min: .*greater than or equal to 1, got 0$"),
        ("cluster.workers", {"min": 3, "max": 2}, r"found cluster\.workers: min must not be above max, got 3 and 2$"),
        ("cluster.workers", {"min": 1}, r"found cluster\.workers\.max: Field required$"),
        ("cluster.teacher.workers", {"min": 1, "max": 2, "mx": 1}, r'found unknown key "cluster\.teacher\.workers\.mx", did you mean "max"\?$'),
        ("cluster.student.workers", 0, r"found cluster\.student\.workers: .*greater than or equal to 1, got 0$"),
        ("cluster.student.cpus_per_worker", 0, r"cluster\.student\.cpus_per_worker: .*greater than or equal to 1"),
        ("cluster.teacher.gpus_per_worker", 2, r"cluster: teacher: gpus_per_worker must be 0 or 1"),
        ("cluster.student.labels", {"pool": "a b"}, r"cluster\.student\.labels: pool must be a value, !value, in\(a, b\) or !in\(a, b\), got 'a b'"),
        ("cluster.student.labels", {"": "a"}, r"cluster\.student\.labels: '' is no name of a label"),
        ("cluster.data.labels", {"pool": 3}, r"cluster\.data\.labels\.pool: .*valid string, got 3"),
        ("cluster.data.workers", 2, r'unknown key "cluster\.data\.workers" \(allowed: labels\)'),
        ("cluster.teacher.shards", "some", r"found cluster\.teacher\.shards: must be a number of workers or all, got some$"),
        ("cluster.gpus_per_worker", -1, r"cluster\.gpus_per_worker"),
        ("student.layers", [2, 1], r"student: layers must rise"),
        ("student.layers", [-1], r"student: layers must rise without repeats from 0"),
        ("student.count", 2, r"student: set one of layers and count"),
        ("training.steps", 5, r"training: set one of epochs and steps"),
        ("training.learning_rate", float("nan"), r"training\.learning_rate: .*finite number, got nan"),
        ("losses.soft.weight", float("inf"), r"losses\.soft\.weight: .*finite number"),
        # variants
        ("student.type", "layer", r"student: .*'layer' .*'layers', 'scratch', 'convolutional', 'pretrained', 'probe'"),
        ("corpus.type", "csv", r"corpus: .*'files', 'hub', 'docstrings'"),
        ("losses.soft.type", "kl", r"losses\.soft: .*'cross_entropy', 'binary_cross_entropy'"),
        # one row does not fit into a batch
        ("training.batch_tokens", 32, r"training\.batch_tokens is 32, less than one row of task\.max_length 64"),
        ("training.microbatch_tokens", 32, r"training\.microbatch_tokens is 32"),
        ("teacher.batch_tokens", 32, r"teacher\.batch_tokens is 32"),
        ("teacher.training", {"epochs": 1, "batch_tokens": 32}, r"teacher\.training\.batch_tokens is 32"),
        # things that belong together
        ("losses.soft.weight", 0, r"all weights are 0"),
        ("losses", {}, r"losses: .*at least 1 item"),
        ("cluster.storage", "s3://bucket/x", r"tracking\.uri: name an MLflow server"),
        ("tracking.uri", "ftp://host", r"tracking\.uri: .*must start with http:, https:, sqlite: or postgresql:"),
        ("tracking.uri", "http://[", r"tracking\.uri: "),
    ],
)  # fmt: skip
def test_values(path, value, message):
    refused(changed(path, value), rf"DST-2005\]: job file is refused: job.yaml: .*{message}")


def test_one_student_or_several():
    refused(text(student=None), "set one of student and students")
    refused(text(students={"a": GOOD["student"]}), "set one of student and students")
    refused(text(student=None, students={"teacher": GOOD["student"]}), r"names \['teacher'\] are taken")
    refused(text(student=None, students={"a": GOOD["student"], "a-baseline": GOOD["student"]}), r"names \['a-baseline'\] are taken")


def test_losses_that_need_what_the_targets_lack():
    pkd = {"type": "pkd", "layers": {0: 3}}
    refused(text(losses={"h": pkd}), r"losses\.h: pkd needs hidden of the teacher; add teacher\.targets\.features with layers")
    teacher = {"model": "m", "targets": {"features": {"layers": [1, 2]}}}
    refused(text(losses={"h": pkd}, teacher=teacher), r"losses\.h\.layers: teacher layers \[3\] are not in .*features\.layers \[1, 2\]")
    refused(
        text(student={"type": "probe"}), r"students\.student: probe needs pooled of the teacher; add teacher\.targets\.features with pooled"
    )
    teacher = {"model": "m", "targets": {"features": {"layers": [3], "pooled": True}}}
    refused(text(student={"type": "probe"}, losses={"h": pkd}, teacher=teacher), r"losses\.h: a probe has no layers to match")
    corpus = {**GOOD["corpus"], "labelled": 0}
    refused(text(losses={"hard": {"type": "cross_entropy"}}, corpus=corpus), r"corpus\.labelled is 0, but a loss needs labels")
    refused(text(teacher={"model": "m", "training": {"epochs": 1}}, corpus=corpus), r"corpus\.labelled is 0")


def test_several_problems_are_told_at_once():
    line = refused(
        text(name="A", training={"epochs": 0, "epoch": 1}, student={"type": "layers", "layers": ["x"]}), "DST-2005"
    )  # fmt: skip
    for part in ("name: ", "training.epochs: ", 'unknown key "training.epoch"', "student.layers.0: "):
        assert part in line
    many = refused(text(**{f"key{i:02}": 1 for i in range(30)}), "and 10 more")
    assert many.count("unknown key") == 20
    assert len(refused(changed("training.epochs", "x" * 50_000), r"got 'x{199}\.\.\.")) < 1000


def test_a_password_is_not_repeated_in_the_refusal():
    for uri in ("https://me:hunter2@host", "postgresql://me:hunter2@host/db"):
        line = refused(changed("tracking.uri", uri), r"tracking\.uri: a tracking uri must not carry a password")
        assert "hunter2" not in line


@pytest.mark.parametrize("name", ["", "a/b", "../a", "/a", "a\\b", "A", ".a", "-a", "a b", "a\n", "a\0", "ä", "a" * 64, "a:b", "~"])
def test_names_that_are_no_names(name):
    refused(changed("name", name), "name: ")
    refused(changed("tracking.experiment", name), r"tracking\.experiment: ")
    refused(text(student=None, students={name: GOOD["student"]}), "students")
    refused(text(losses={name: {"type": "forward_kl"}}), "losses")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nname: b\n", r"DST-2002.*duplicate key"),
        ("training:\n\tepochs: 1\n", r"DST-2002.*'\\t'"),
        ("name: [a\n", r"DST-2002.*expected ',' or '\]'"),
        ("- a\n- b\n", r"DST-2002.*expected settings by name but found a list"),
        ("just words\n", r"DST-2002.*expected settings by name but found a single value"),
        ("null\n", r"DST-2002.*a single value"),
        ("", r"DST-2005.*name: Field required; task: Field required"),
        ("name: a\n---\nname: b\n", r"DST-2002.*single document"),
        ("name: !!python/object/apply:os.system ['touch pwned']\n", r"DST-2002.*the tag tag:yaml\.org,2002:python/object/apply:os\.system"),
        ("name: !!python/name:os.system\n", r"DST-2002.*plain values"),
        ("name: !!timestamp x\n", r"DST-2002.*plain values"),
        ("name: *nowhere\n", r"DST-2002.*undefined alias"),
        ("name: &a [*a]\n", r"DST-2002.*at most 10000 values"),
        ("name: " + "[" * 20_000, r"DST-2002.*32 deep"),
        ("name: a\0b\n", r"DST-2002"),
        ("name: ???\n", r"DST-2002.*[Mm]issing"),
        ("1: a\n", r"DST-2005.*1: .*[Kk]eys should be strings"),
        ("name: ${task.text}\n", r"DST-2008.*expected \$\{oc\.env:NAME\}"),
        ("name: ${oc.env:${a}}\n", r"DST-2008"),
        ("name: ${oc.create:a}\n", r"DST-2008"),
        ("? ${a}\n: b\n", r"DST-2008"),
        ("seed: 0x" + "f" * 5000, r"DST-2005.*unknown key"),
        ("name: 0x" + "f" * 5000, r"DST-2005.*name: .*a number too long to print"),
    ],
)  # fmt: skip
def test_texts_that_are_no_job(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(content, message)
    assert os.listdir(tmp_path) == []


def test_aliases_are_fine_until_they_explode():
    shared = "student: &s {type: layers, layers: [0]}\nstudents: {a: *s}\n"
    refused(shared + "name: a\n", r"task: Field required.*")
    program = """
import resource, sys, time
from jobs.config import parse
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\\n" for i in range(1, 12))
try:
    parse(text + sys.argv[1], (), "bomb")
except Exception as error:
    print(type(error).__name__, error.code, time.process_time() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    for ending in ("", "b: {<<: [*a11, *a11]}\n", "name: *a11\n"):
        done = subprocess.run([sys.executable, "-c", program, ending], cwd=ROOT, capture_output=True, text=True, check=True)
        kind, code, seconds, megabytes = done.stdout.split()
        assert (kind, code) == ("ConfigError", "DST-2002")
        assert float(seconds) < 1
        assert float(megabytes) < 100


@pytest.mark.parametrize(
    "override", ["", "=", "=1", "training.epochs", "--epochs=1", "a b=1", "training.=1", ".a=1", "a..b=1", "a[0]=1", "1a=1", "ä=1"]
)
def test_overrides_that_cannot_be_understood(override):
    refused(text(), r"DST-2004.*expected path\.to\.setting=value", overrides=[override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=[1", r"DST-2004.*'training\.epochs=\[1'"),
        ("training.epochs=!!python/name:os.system", r"DST-2002.*plain values"),
        ("training.epochs=${oc.env:HOME", r"DST-2008"),
        ("training.epoch=1", r'DST-2005.*unknown key "training\.epoch", did you mean "epochs"'),
        ("name.x=1", r"DST-2005.*name: "),
        ("losses.soft=5", r"DST-2005.*losses\.soft"),
        ("training.epochs=", r"DST-2005.*set one of epochs and steps"),
    ],
)
def test_overrides_that_do_not_fit(override, message):
    refused(text(), message, overrides=[override])


@pytest.mark.parametrize(
    "value",
    [
        "${oc.env:HF_TOKEN}", "x${oc.env:AWS_SECRET_ACCESS_KEY}y", "${oc.env: db_password }", "${oc.env:A,${oc.env:MY_API_KEY}}",
        "${oc.env:'HF_TOKEN'}", "${oc.env:GOOGLE_APPLICATION_CREDENTIALS,x}",
    ],
)  # fmt: skip
def test_secrets_do_not_go_through_the_file(value, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_hunter2")
    line = refused(changed("teacher.model", value), r"DST-9007.*must not read secrets", SecurityError)
    assert "hunter2" not in line
    refused(
        text(),
        "DST-9007",
        SecurityError,
        overrides=[f"teacher.model={value!r}" if '"' not in value and "'" not in value else f'a="{value}"'],
    )
    # Written so that only a YAML parser sees what it says.
    hidden = "".join(f"\\x{ord(c):02x}" for c in value)
    refused(text() + f'extra: "{hidden}"\n', "DST-9007", SecurityError)


def test_a_name_that_only_looks_like_a_secret(monkeypatch):
    monkeypatch.setenv("TOKENIZER_FOLDER", "/models/x")
    assert parse(changed("teacher.model", "${oc.env:TOKENIZER_FOLDER}"), (), "x").teacher.model == "/models/x"


def test_files_that_cannot_be_read(tmp_path):
    def refused_file(path, message):
        with pytest.raises(ConfigError, match=message):
            load(str(path))

    refused_file(tmp_path / "none.yaml", r"DST-2001.*recipe \(code_tokens, embeddings, .*quickstart, .*\).*No such file")
    refused_file("quickstrat", r"DST-2001.*quickstart")
    refused_file(tmp_path, r"DST-2001.*directory")
    refused_file("/dev/zero", r"DST-2002.*at most 100000 bytes")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")
    refused_file(tmp_path / "latin.yaml", r"DST-2002.*expected UTF-8")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbf" + text().encode())
    assert load(str(tmp_path / "bom.yaml")).name == "j"


# ---------------------------------------------------------------------------------------------------------------- any text

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
PIECES = st.sampled_from([
    "\n", "\n  ", "  ", "|", "---\n", "\\", "\ud800", "\0", "\x85", "\ufeff", "type: layers", ": ", ", ", "- ", "&a ", "*a", "!!int ", "! ",
    "name", "task", "losses", "student", ":", "{", "}", "[", "]", ">", "'", '"', "#", "?", "...", "%", "@", "`", "<<", "=", "~", "1", "0x_", "0b_",
    "._", "1e5", "1:60", ".nan", "2024-01-01", "yes", "null", "${", "${a}", "${oc.env:HOME}", "é",
])  # fmt: skip


def loads_or_is_refused(content, overrides=()):
    started, line = time.process_time(), ""
    try:
        parse(content, overrides, "x")
    except (ConfigError, SecurityError) as error:
        line = str(error)
    assert line.isprintable()
    assert time.process_time() - started < 1


@QUICK
@given(st.lists(PIECES, max_size=25).map("".join))
@example("a: !!int ''")
@example("a: =")
@example("a: <<")
@example("<<: 1")
@example("a: 0x_")
@example("? [a]\n: b")
@example("? {a: b}\n: b")
@example("? .nan\n: b")
@example("a: \ud800")
def test_any_text_loads_or_is_refused(content):
    loads_or_is_refused(content)


@QUICK
@given(st.text(max_size=300))
def test_any_characters_load_or_are_refused(content):
    loads_or_is_refused(content)


@QUICK
@given(
    st.sampled_from([line.partition(":")[0] for line in text().splitlines() if not line.startswith(" ")]),
    st.lists(PIECES, max_size=10).map("".join),
)
def test_any_override_is_taken_or_refused(path, value):
    loads_or_is_refused(text(), [f"{path}={value}"])
    loads_or_is_refused(text(), [f"{path}.x={value}"])
    loads_or_is_refused(text(), [value])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=8,
)


PLACES = [
    "name", "task", "corpus", "teacher", "student", "students", "losses", "training", "cluster", "tracking", "evaluation", "losses.soft",
    "teacher.targets.features", "student.layers", "task.labels", "training.seed", "corpus.validation",
]  # fmt: skip


@QUICK
@given(st.sampled_from(PLACES), VALUES)
def test_any_value_anywhere_loads_or_is_refused(path, value):
    loads_or_is_refused(changed(path, value))


@QUICK
@given(
    st.text(max_size=70) | st.lists(st.sampled_from(["a", ".", "..", "/", "\\", "-", "_", "0", "\n", "~", "\0"]), max_size=8).map("".join)
)
@example("a/../..")
@example("..")
@example("a\n")
def test_a_name_is_refused_or_stays_inside_the_root(tmp_path_factory, name):
    root = Path("/storage/runs")
    try:
        TypeAdapter(Name).validate_python(name)
    except ValidationError:
        return
    assert "\0" not in name
    assert Path(os.path.normpath(root / name)).parent == root
    assert Path(os.path.normpath(root / name)).name == name


def test_flat_is_what_one_writes_on_the_command_line():
    job = parse(text(losses={"soft": {"type": "forward_kl"}}), (), "x")
    flat = config.flat(job.model_dump(mode="json"))
    assert flat["losses.soft.temperature"] == 2.0
    assert flat["student.layers"] == [0]
    assert flat["students"] == {}
    again = parse(
        text(), [f"{key}={value}" for key, value in flat.items() if value is not None and key.startswith(("losses.", "training.l"))], "x"
    )
    assert again == job


ELASTIC = {"cluster": {"workers": {"min": 1, "max": 2}}}
IMAGES = {
    "task": {"type": "image_classification"}, "corpus": {"type": "digits"}, "baseline": False,
    "student": {"type": "convolutional", "depths": [1, 1], "hidden_sizes": [8, 16]},
}  # fmt: skip


def test_workers_may_come_and_go_where_nothing_depends_on_their_number():
    assert parse(text(**ELASTIC), (), "x").cluster.group("student").elastic
    refused(
        text(**ELASTIC, training={"epochs": 1, "dropout": None}),
        r"training\.dropout: every number.*set cluster\.student\.workers to a number",
    )
    fixed = {"workers": {"min": 1, "max": 2}, "student": {"workers": 2}}
    dropping = {"model": "a/b", "training": {"epochs": 1, "dropout": 0.1}}
    assert parse(text(cluster=fixed, training={"epochs": 1, "dropout": 0.1}), (), "x").cluster.group("teacher").elastic
    refused(text(cluster=fixed, teacher=dropping), r"teacher\.training\.dropout: every number.*set cluster\.teacher\.workers to a number")
    refused(text(**ELASTIC, **IMAGES), r"training: batch norms learn something else with every number of workers")


@pytest.mark.parametrize("wanted", ["spot", "!spot", "in(a, b)", "!in(a,b)", "A100", "us-east-1a"])
def test_labels_that_ray_knows(wanted):
    from ray._private.label_utils import validate_label_selector

    # Ray takes a space after a comma for a part of the value.
    (found,) = parse(changed("cluster.data.labels", {"ray.io/accelerator-type": wanted}), (), "x").cluster.data.labels.values()
    assert found == wanted.replace(" ", "")
    assert validate_label_selector({"ray.io/accelerator-type": wanted}) is None
