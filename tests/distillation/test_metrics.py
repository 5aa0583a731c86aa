"""The names of what a task reports are those that it reports, and what the store holds of a teacher says how good it is."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distillation.config import CausalLM, MaskedLM, TextClassification, TokenClassification
from distillation.metrics import OF_TEACHER, REPORTED, headline
from distillation.signals import UNLABELLED, Batch, TeacherSignal
from distillation.tasks import TASKS, build_task
from distillation.told import statistics_of_teacher


@pytest.mark.parametrize("kind", TASKS)
def test_what_is_said_to_be_reported_is_what_metrics_gives(kind):
    task = TASKS[kind](None)
    with np.errstate(all="ignore"):
        found = task.metrics(np.ones(len(task.names)))
    assert tuple(found) == REPORTED[kind]
    assert headline(kind) == task.headline == next(iter(found))


@pytest.mark.parametrize("kind", TASKS)
def test_without_a_teacher_just_what_is_of_it_is_missing(kind):
    task = TASKS[kind](None)
    # rows that differ, so that there is something to correlate
    sums = {name: 0.0 if name in ("answered", "agree", "kl", "to_teacher") else 8.0 for name in task.names}
    sums |= {name: 1.0 for name in ("x", "y", "xy") if name in sums}
    if kind == "embedding":
        sums = dict.fromkeys(task.names, 0.0)
    assert set(REPORTED[kind]) - set(task.scores(np.array(list(sums.values())))) == OF_TEACHER & set(REPORTED[kind])


def test_no_task_is_missing():
    assert set(REPORTED) == set(TASKS)


def batch(labels, signal, positions, size=None):
    rows, labels = len(positions), torch.tensor(labels)
    places = torch.arange(len(labels))
    return Batch(
        [str(i) for i in range(rows)], {}, places, places, torch.tensor(positions), torch.tensor(positions), labels, {"teacher": signal},
        bytes=None if size is None else torch.tensor(size),
    )  # fmt: skip


def logs(*rows):
    return torch.tensor([[math.log(p) for p in row] for row in rows])


DENSE = logs((0.7, 0.2, 0.1), (0.5, 0.3, 0.2), (0.1, 0.3, 0.6))
LABELS = [0, 1, UNLABELLED]
TOP = TeacherSignal(
    ids=torch.tensor([[0], [0], [2]]), log_p=DENSE[[0, 1, 2], [0, 0, 2]][:, None],
    label_log_p=torch.tensor([math.log(0.7), math.log(0.3), 0.0]),
)  # fmt: skip


@pytest.mark.parametrize("signal", [TeacherSignal(logits=DENSE), TOP], ids=["dense", "the likeliest class alone"])
def test_a_teacher_of_classes_by_hand(signal):
    task = build_task(TextClassification(), labels=("a", "b", "c"))
    found = statistics_of_teacher(task, batch(LABELS, signal, [1, 1, 1]), 3)
    scores = task.scores(found.sum(0).numpy())
    assert scores == {
        "accuracy": 0.5, "nll": pytest.approx(-(math.log(0.7) + math.log(0.3)) / 2, abs=1e-6), "agreement": 1.0,
        "kl_to_teacher": pytest.approx(0, abs=1e-6),
    }  # fmt: skip


def test_a_teacher_of_words_by_hand():
    signal = TeacherSignal(
        ids=torch.tensor([[3, 1], [2, 0], [9, 3]]), log_p=logs((0.5, 0.2), (0.6, 0.3), (0.4, 0.3)),
        label_log_p=torch.tensor([math.log(0.5), math.log(0.3), math.log(0.05)]),
    )  # fmt: skip
    task = build_task(CausalLM(type="causal_lm"))
    found = statistics_of_teacher(task, batch([3, 0, 7], signal, [2, 1], [6, 4]), 0)
    nll = -math.log(0.5 * 0.3 * 0.05)
    assert found[:, 0].tolist() == [2, 1]
    assert task.scores(found.sum(0).numpy()) == {
        "perplexity": pytest.approx(math.exp(nll / 3), rel=1e-6), "bits_per_byte": pytest.approx(nll / math.log(2) / 10, rel=1e-6),
        "accuracy": pytest.approx(1 / 3), "nll": pytest.approx(nll / 3, rel=1e-6), "agreement": 1.0, "kl_to_teacher": 0.0,
    }  # fmt: skip
    hidden = build_task(MaskedLM(type="masked_lm"))
    found = statistics_of_teacher(hidden, batch([3, UNLABELLED, 7], signal, [2, 1]), 0)
    assert hidden.scores(found.sum(0).numpy())["perplexity"] == pytest.approx(math.exp(-math.log(0.5 * 0.05) / 2), rel=1e-6)


def test_a_teacher_of_entities_by_hand():
    # O, B-X, I-X: it says B-X O | B-X, and the labels are B-X I-X | B-X: two found, two true, one of them both
    signal = TeacherSignal(
        ids=torch.tensor([[1], [0], [1]]), log_p=logs((0.6,), (0.5,), (0.9,)), label_log_p=torch.tensor([0.6, 0.4, 0.9]).log()
    )
    task = build_task(TokenClassification(type="token_classification"), labels=("O", "B-X", "I-X"))
    scores = task.scores(statistics_of_teacher(task, batch([1, 2, 1], signal, [2, 1]), 3).sum(0).numpy())
    assert (scores["f1"], scores["accuracy"]) == (pytest.approx(0.5), pytest.approx(2 / 3))


def test_draws_of_a_vocabulary_say_it_with_the_labels_own_probability():
    signal = TeacherSignal(ids=torch.tensor([[0, 1], [2, 0]]), weights=torch.tensor([[0.75, 0.25], [0.5, 0.5]]),
                           label_log_p=torch.log(torch.tensor([0.5, 0.25])))  # fmt: skip
    task = build_task(CausalLM(type="causal_lm"))
    scores = task.scores(statistics_of_teacher(task, batch([0, 1], signal, [2], [4]), 0).sum(0).numpy())
    assert scores["perplexity"] == pytest.approx(math.sqrt(8))
    assert scores["accuracy"] == 0.5  # drawn most often: 0, which is the label, and 2, which is not


def test_draws_of_a_few_classes_say_nothing_of_it():
    signal = TeacherSignal(ids=torch.tensor([[0, 1]]), weights=torch.tensor([[0.5, 0.5]]))
    assert statistics_of_teacher(build_task(TextClassification(type="text_classification")), batch([0], signal, [1]), 0) is None


def test_an_embedding_is_itself():
    task = TASKS["embedding"](None)
    found = statistics_of_teacher(task, batch([UNLABELLED], TeacherSignal(pooled=torch.tensor([[3.0, 4.0]])), [1]), 0)
    assert task.scores(found.sum(0).numpy()) == {"cosine": pytest.approx(1.0), "mse_to_teacher": 0.0}
