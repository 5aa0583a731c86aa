"""The weighted sum of terms: what binds a term to its numbers, and the algebra that a search and the loop rely on."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import nn

from distillation import divergences, features, losses, signals
from distillation.batches import cut, share
from distillation.config import (
    CrossEntropy,
    ForwardKL,
    JensenShannon,
    L2Distil,
    LossConfig,
    PatientKD,
    Ramp,
    hard_loss,
)
from distillation.losses import CLASS_TERMS, STATE_TERMS, at, describe, gradient_squares, group_of, student_layers, unit_of, weigh
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal

CLASSES = 5


def loss(type_, **knobs):
    return TypeAdapter(LossConfig).validate_python({"type": type_, **knobs})


def batch(labels, teacher=None, **fields):
    """Rows of one scored position each; what the teacher says beside its logits in `fields`."""
    labels = labels if isinstance(labels, torch.Tensor) else torch.tensor(labels)
    n = len(labels)
    signals_ = {"teacher": TeacherSignal(logits=teacher, **fields)} if teacher is not None or fields else {}
    one = torch.ones(n, dtype=torch.int64)
    return Batch([str(i) for i in range(n)], {}, torch.arange(n), torch.arange(n), one, one, labels, signals_)


def counts_of(losses_, rows):
    labelled = int(rows.labelled.sum())
    return {name: {"labels": labelled}.get(unit_of(one, "scored"), len(rows.labels)) for name, one in losses_.items()}


def draw(seed, *shape, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------- binding


LITERALS = {get_args(kind.model_fields["type"].annotation)[0]: kind for kind in get_args(get_args(LossConfig)[0])}


def test_every_term_of_the_job_file_has_a_function_and_no_other():
    assert set(CLASS_TERMS) | set(STATE_TERMS) == set(LITERALS)
    assert not set(CLASS_TERMS) & set(STATE_TERMS)
    assert set(TypeAdapter(LossConfig).json_schema()["discriminator"]["mapping"]) == set(LITERALS)


KNOBS = {
    "pkd": {"layers": {0: 7, 1: 9}}, "attention_kl": {"layers": {0: 7, 1: 9}}, "relation_kl": {"heads": 2}, "dist": {"group": 3},
    "rkd_distance": {"group": 4}, "rkd_angle": {"group": 4}, "similarity_preserving": {"group": 4}, "similarity_kl": {"group": 4},
    "contrastive": {"group": 4, "temperature": 1.0},
}  # fmt: skip
NO_MATCH = {"cross_entropy", "binary_cross_entropy", "label_mse", "contrastive"}
"""Terms that are not at their least where student and teacher agree."""


def everything(type_, n=6, at_match=True, seed=0):
    """Outputs with a gradient, the batch and what was varied, for a term: at the teacher's own numbers, or elsewhere."""
    classes = 1 if type_ in ("teacher_mse", "label_mse") else CLASSES
    told = {
        "logits": draw(seed, n, classes), "hidden": draw(seed + 1, n, 3, 8), "pooled": draw(seed + 2, n, 8),
        "attentions": draw(seed + 4, 2, 3, 2, 3, 3).softmax(-1),
    }  # fmt: skip
    relations = tuple(draw(seed + 5 + i, n, 8) for i in range(3))
    signal = TeacherSignal(**told, relations=relations, layers=(5, 7, 9))
    labels = {
        "label_mse": draw(seed + 9, n), "teacher_mse": draw(seed + 9, n), "binary_cross_entropy": (draw(seed + 9, n, classes) > 0).float(),
        "binary_kl": (draw(seed + 9, n, classes) > 0).float(),
    }.get(type_, torch.arange(n) % classes)  # fmt: skip
    mask = torch.tensor([[1, 1, 1], [1, 1, 1]])
    rows = Batch(["a", "b"], {"attention_mask": mask}, torch.arange(n), torch.arange(n), torch.tensor([3, 3]), torch.tensor([3, 3]), labels,
                 {"teacher": signal})  # fmt: skip
    noise = 0.0 if at_match else 0.3
    mine = [told["logits"], told["hidden"][:, 1:], told["pooled"], *relations, told["attentions"][:, 1:]]
    mine = [(value + noise * draw(seed + 20 + i, *value.shape)).requires_grad_() for i, value in enumerate(mine)]
    attention = mine[6] if at_match else mine[6].softmax(-1)
    outputs = Outputs(mine[0], None, None, mine[1], mine[2], tuple(mine[3:6]), attention, {}, layers=(0, 1))
    return outputs, rows, mine


@pytest.mark.parametrize("type_", sorted(LITERALS))
def test_a_term_is_nothing_and_pulls_nowhere_where_student_and_teacher_agree(type_):
    one = {"x": loss(type_, **KNOBS.get(type_, {}))}
    outputs, rows, mine = everything(type_)
    value, sums = weigh(one, outputs, rows, {"x": 6})
    value.backward()
    pull = max(float(v.grad.abs().max()) for v in mine if v.grad is not None)
    if type_ not in NO_MATCH:
        assert value.item() == pytest.approx(0.0, abs=2e-6)
        assert pull < 2e-6
    outputs, rows, mine = everything(type_, at_match=False)
    value, sums = weigh(one, outputs, rows, {"x": 6})
    assert value.item() == pytest.approx(float(sums["x"]) / 6, rel=1e-5)
    value.backward()
    assert value.item() > 1e-3
    assert max(float(v.grad.abs().max()) for v in mine if v.grad is not None) > 1e-4
    squares = gradient_squares(one, outputs, rows, {"x": 6})["x"]
    leaves = mine[:6] if type_ != "attention_kl" else []  # of attention the gradient is that behind a softmax here
    if leaves:
        assert squares.item() == pytest.approx(sum(float(v.grad.square().sum()) for v in leaves if v.grad is not None), rel=1e-4)


def test_terms_are_their_functions():
    outputs, rows, _ = everything("forward_kl", at_match=False)
    signal, s, t = rows.signal, outputs.logits, rows.signal.logits
    soft = {temperature: (divergences.soften(s, temperature), divergences.soften(t, temperature)) for temperature in (1.0, 3.0)}
    hidden, stored = outputs.hidden, signal.hidden[:, [1, 2]]
    expected = {
        ("forward_kl", 3.0): 9 * divergences.forward_kl(*soft[3.0]), ("reverse_kl", 3.0): 9 * divergences.reverse_kl(*soft[3.0]),
        ("jsd", 3.0): 9 * divergences.jsd(*soft[3.0], 0.2), ("skewed_kl", 3.0): 9 * divergences.skewed_kl(*soft[3.0], 0.4),
        ("skewed_reverse_kl", 3.0): 9 * divergences.skewed_reverse_kl(*soft[3.0], 0.4),
        ("adaptive_kl", 3.0): 9 * divergences.adaptive_kl(*soft[3.0], 0.7), ("total_variation", 3.0): 3 * divergences.total_variation(*soft[3.0]),
        ("universal_logit", 3.0): divergences.universal_logit(*soft[3.0]), ("l2_distil", 3.0): divergences.l2_distil(s, t, 3.0),
        ("logit_mse", None): divergences.logit_mse(s, t), ("teacher_mse", None): divergences.squared_error(s, t),
        ("standardised_kl", 3.0): divergences.standardised_kl(s, t, 3.0), ("binary_kl", 3.0): divergences.binary_kl(s, t, 3.0),
        ("decoupled_kd", 3.0): divergences.decoupled_kd(s, t, rows.labels, 3.0, 0.5, 2.0),
        ("hidden_mse", None): features.hidden_mse(hidden, stored, False).sum(-1), ("cosine", None): features.cosine(hidden, stored).sum(-1),
        ("pkd", None): features.pkd(hidden, stored),
    }  # fmt: skip
    knobs = {
        "jsd": {"beta": 0.2}, "skewed_kl": {"alpha": 0.4}, "skewed_reverse_kl": {"alpha": 0.4}, "adaptive_kl": {"head": 0.7},
        "decoupled_kd": {"alpha": 0.5, "beta": 2.0}, "hidden_mse": {"layers": {0: 7, 1: 9}, "normalise": False},
        "cosine": {"layers": {0: 7, 1: 9}}, "pkd": {"layers": {0: 7, 1: 9}},
    }  # fmt: skip
    for (type_, temperature), value in expected.items():
        one = {"x": loss(type_, **knobs.get(type_, {}), **({"temperature": temperature} if temperature else {}))}
        assert float(weigh(one, outputs, rows, {"x": 6})[1]["x"]) == pytest.approx(value.sum().item(), rel=1e-6), type_


def test_the_pooled_output_is_compared_where_no_layers_are_named():
    outputs, rows, _ = everything("cosine", at_match=False)
    for type_, function in (("cosine", features.cosine), ("hidden_mse", lambda s, t: features.hidden_mse(s, t, True))):
        raw = weigh({"x": loss(type_)}, outputs, rows, {"x": 6})[1]["x"]
        assert raw.item() == pytest.approx(function(outputs.pooled, rows.signal.pooled).sum().item(), rel=1e-6)
    changed = Outputs(outputs.logits, pooled=outputs.pooled, projected={"x": rows.signal.pooled[:, None]})
    assert weigh({"x": loss("cosine", projection=True)}, changed, rows, {"x": 6})[0].item() == pytest.approx(0.0, abs=1e-6)


def test_pkd_matches_the_layers_of_its_map():
    hidden = torch.eye(4)[None, [0, 1]].repeat(2, 1, 1)  # student layers 0 and 1
    stored = torch.eye(4)[None, [3, 1, 0]].repeat(2, 1, 1)  # teacher layers 1, 5, 9
    rows = batch([0, 0], hidden=stored, layers=(1, 5, 9))
    straight, crossed = PatientKD(type="pkd", layers={1: 5, 0: 9}), PatientKD(type="pkd", layers={1: 9, 0: 5})
    outputs = Outputs(torch.zeros(2, 2), hidden=hidden, layers=(0, 1))
    assert STATE_TERMS["pkd"](straight, "x", outputs, rows).tolist() == [0.0, 0.0]
    assert STATE_TERMS["pkd"](crossed, "x", outputs, rows).tolist() == [4.0, 4.0]
    more = Outputs(
        torch.zeros(2, 2), hidden=torch.cat([torch.ones(2, 1, 4), hidden], 1), layers=(6, 0, 1)
    )  # another term wants layer 6, too
    assert STATE_TERMS["pkd"](straight, "x", more, rows).tolist() == [0.0, 0.0]
    assert student_layers({"x": straight, "hard": CrossEntropy(type="cross_entropy"), "y": loss("cosine")}) == (0, 1)


def test_units_and_hard_terms():
    assert {type_: unit_of(kind.model_construct(layers={0: 0}), "tokens") for type_, kind in LITERALS.items()} == {
        **dict.fromkeys(LITERALS, "positions"), **dict.fromkeys(["cross_entropy", "binary_cross_entropy", "label_mse"], "labels"),
        **dict.fromkeys(["hidden_mse", "cosine", "pkd"], "tokens"),
        **dict.fromkeys(["dist", "attention_kl", "relation_kl", "rkd_distance", "rkd_angle", "similarity_preserving", "similarity_kl", "contrastive"],
                        "rows"),
    }  # fmt: skip
    assert unit_of(loss("cosine"), "tokens") == unit_of(loss("cosine", layers={0: 0}), "scored") == "positions"
    from distillation.config import MultiLabel, Regression, TextClassification

    assert hard_loss(TextClassification(), 0.5) == CrossEntropy(type="cross_entropy", weight=0.5)
    assert [hard_loss(kind(type=name)).type for kind, name in ((MultiLabel, "multi_label"), (Regression, "regression"))] == [
        "binary_cross_entropy", "label_mse"
    ]  # fmt: skip


def test_hard_terms_by_hand_and_unlabelled_rows_are_masked():
    logits = torch.tensor([[0.0, math.log(3.0)], [1.0, -1.0]], requires_grad=True)
    many = batch(torch.tensor([[1.0, 1.0], [torch.nan, torch.nan]]))
    value, _ = weigh({"x": loss("binary_cross_entropy")}, Outputs(logits), many, {"x": 1})
    assert value.item() == pytest.approx(math.log(2) + math.log(4 / 3), rel=1e-6)
    value.backward()
    assert logits.grad[1].tolist() == [0.0, 0.0]
    number = torch.tensor([[2.0], [7.0]], requires_grad=True)
    value, _ = weigh({"x": loss("label_mse", weight=0.5)}, Outputs(number), batch(torch.tensor([5.0, torch.nan])), {"x": 1})
    assert value.item() == 4.5
    value.backward()
    assert number.grad.tolist() == [[-3.0], [0.0]]


def test_unlabelled_rows_are_masked_out_of_the_hard_term_only():
    losses_ = {"hard": CrossEntropy(type="cross_entropy", weight=0.5), "soft": ForwardKL(type="forward_kl", temperature=1.0, weight=2.0)}
    teacher = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    rows = batch([1, UNLABELLED, 0], teacher)
    counts = counts_of(losses_, rows)
    assert counts == {"hard": 2, "soft": 3}
    value, sums = weigh(losses_, Outputs(torch.zeros(3, 2)), rows, counts)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert value.item() == pytest.approx(0.5 * math.log(2) + 2.0 * kl)
    point = describe(losses_, {name: float(v) for name, v in sums.items()}, counts)
    assert point == pytest.approx(
        {"train/loss": 0.5 * math.log(2) + 2 * kl, "train/loss/hard": math.log(2), "train/loss/soft": kl,
         "train/weighted/hard": 0.5 * math.log(2), "train/weighted/soft": 2 * kl}
    )  # fmt: skip


@pytest.mark.parametrize("lazy", [False, True])
def test_a_step_without_any_label_has_zero_loss_and_a_gradient(lazy):
    head, states = nn.Linear(4, 3), draw(1, 2, 4).requires_grad_()
    outputs = Outputs(states=states, head=head) if lazy else Outputs(head(states))
    value, _ = weigh({"hard": CrossEntropy(type="cross_entropy")}, outputs, batch([UNLABELLED, UNLABELLED]), {"hard": 0})
    value.backward()
    assert value.item() == 0.0
    assert states.grad.abs().sum().item() == 0.0
    assert head.weight.grad.abs().sum().item() == 0.0


def test_the_gradient_does_not_depend_on_the_cut():
    s, t = draw(2, 9, 4), draw(3, 9, 4)
    labels = [0, 1, UNLABELLED, 3, UNLABELLED, UNLABELLED, 1, 2, 0]
    losses_ = {
        "hard": CrossEntropy(type="cross_entropy", label_smoothing=0.1),
        "soft": ForwardKL(type="forward_kl"),
        "l2": L2Distil(type="l2_distil"),
    }

    def gradient(cuts):
        logits = s.clone().requires_grad_()
        counts = counts_of(losses_, batch(labels))
        for i, j in zip([0, *cuts], [*cuts, 9], strict=True):
            weigh(losses_, Outputs(logits[i:j]), batch(labels[i:j], t[i:j]), counts)[0].backward()
        return logits.grad

    whole = gradient([])
    for cuts in ([1], [3, 4], [2, 5, 6], list(range(1, 9))):
        assert torch.allclose(gradient(cuts), whole, atol=1e-7)


def test_a_weight_of_zero_is_exactly_the_other_terms():
    grads = []
    for losses_ in (
        {"hard": CrossEntropy(type="cross_entropy")},
        {"hard": CrossEntropy(type="cross_entropy"), "soft": ForwardKL(type="forward_kl", weight=0)},
    ):
        logits = draw(3, 4, 3).requires_grad_()
        weigh(losses_, Outputs(logits), batch([0, 1, 2, 0], torch.zeros(4, 3)), dict.fromkeys(losses_, 4))[0].backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)


# -------------------------------------------------------------------------------------------------------- gradients of terms


def test_gradients_of_terms_by_hand():
    losses_ = {
        "hard": CrossEntropy(type="cross_entropy", weight=0.5),
        "soft": ForwardKL(type="forward_kl", temperature=1.0, weight=2.0),
        "inner": PatientKD(type="pkd", layers={0: 0}),
        "idle": L2Distil(type="l2_distil", weight=0),
    }
    teacher = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    hidden, stored = torch.tensor([[[3.0, 0.0]]]).repeat(3, 1, 1), torch.tensor([[[0.0, 5.0]]]).repeat(3, 1, 1)
    rows = batch([1, UNLABELLED, 0], teacher, hidden=stored, layers=(0,))
    found = gradient_squares(losses_, Outputs(torch.zeros(3, 2), hidden=hidden, layers=(0,)), rows, counts_of(losses_, rows))
    # cross entropy: (q - one-hot) / 2 is (1/4, -1/4) on two rows, times 1/2. forward KL: (q - p) / 3 is (-1/12, 1/12) on three, times 2.
    # pkd: 2 - 2 cos of the angle between (3, 0) and (0, 5) has the gradient (0, -2 / 3), a third of it on three rows.
    expected = {"hard": 2 * 2 * (1 / 8) ** 2, "soft": 3 * 2 * (1 / 6) ** 2, "inner": 3 * (2 / 9) ** 2, "idle": 0.0}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(expected)
    assert gradient_squares({"hard": losses_["hard"]}, Outputs(torch.zeros(1, 2)), batch([UNLABELLED]), {"hard": 0})["hard"] == 0.0


def test_gradients_of_terms_do_not_depend_on_the_cut_and_leave_the_graph_alone():
    s, t = draw(9, 9, 4), draw(10, 9, 4)
    labels = [0, 1, UNLABELLED, 3, UNLABELLED, UNLABELLED, 1, 2, 0]
    losses_ = {"hard": CrossEntropy(type="cross_entropy"), "soft": JensenShannon(type="jsd", beta=0.2)}
    counts = {"hard": 6, "soft": 9}
    logits = s.clone().requires_grad_()

    def total(cuts):
        pairs = zip([0, *cuts], [*cuts, 9], strict=True)
        pieces = [gradient_squares(losses_, Outputs(logits[i:j]), batch(labels[i:j], t[i:j]), counts) for i, j in pairs]
        return {name: sum(float(piece[name]) for piece in pieces) for name in losses_}

    whole = total([])
    for name, one in losses_.items():
        own = s.clone().requires_grad_()
        weigh({name: one}, Outputs(own), batch(labels, t), counts)[0].backward()
        assert whole[name] == pytest.approx(float(own.grad.square().sum()), rel=1e-5)
    for cuts in ([1], [3, 4], [2, 5, 6]):
        assert total(cuts) == pytest.approx(whole, rel=1e-5)
    assert logits.grad is None


# ------------------------------------------------------------------------------------------------------------- vocabularies


VOCABULARY = 40
WORDS = {
    "hard": loss("cross_entropy", weight=0.3, label_smoothing=0.1), "soft": loss("forward_kl", temperature=2.0),
    "back": loss("reverse_kl", weight=0.2, temperature=1.0), "between": loss("jsd", beta=0.3, weight=0.7), "tv": loss("total_variation", weight=0.1),
}  # fmt: skip


def words(n=23, kind="topk", seed=0):
    """Rows of two positions or three, and what a teacher says about each: two lines out of a vocabulary."""
    from distillation.config import DenseLogits, SampledLogits, TopKLogits
    from distillation.network import compress

    logits, labels = draw(seed, n, VOCABULARY, scale=2.0), torch.arange(n) * 7 % VOCABULARY
    labels[[3, 11]] = UNLABELLED
    rows = batch(labels)
    config = {
        "topk": TopKLogits(type="topk", k=5, temperatures=(1.0, 2.0)), "dense": DenseLogits(), "sampled": SampledLogits(type="sampled", draws=9),
    }[kind]  # fmt: skip
    said = compress(logits, rows, config, torch.linspace(0, 0.99, n).double())
    temperatures = {"topk": (2.0,), "sampled": (1.0,)}.get(kind, ())
    return batch(labels, **said, temperatures=temperatures) if kind != "dense" else batch(labels, said["logits"])


def told(rows, losses_, head, states, extra=None):
    """Value, sums, and gradients of states, head and whatever is tied to it."""
    for p in head.parameters():
        p.grad = None
    states = states.clone().requires_grad_()
    tied = states + head.weight[:1].mean(-1) if extra == "tied" else states  # the body uses the same weights
    outputs = Outputs(states=tied, head=head)
    counts = counts_of(losses_, rows)
    value, sums = weigh(losses_, outputs, rows, counts)
    (3.0 * value).backward()
    squares = gradient_squares(losses_, outputs, rows, counts)
    return [value.detach(), states.grad, *(p.grad for p in head.parameters()), *sums.values(), *squares.values()]


@pytest.mark.parametrize("kind", ["topk", "dense", "sampled"])
@pytest.mark.parametrize("extra", [None, "tied"])
def test_logits_made_in_pieces_are_those_made_at_once(kind, extra, monkeypatch):
    rows, states, head = words(kind=kind), draw(31, 23, 8), nn.Linear(8, VOCABULARY)
    losses_ = WORDS if kind != "sampled" else {"hard": WORDS["hard"], "soft": loss("forward_kl", temperature=1.0)}
    whole = told(rows, losses_, head, states, extra)
    for p in head.parameters():
        p.grad = None
    leaf = states.clone().requires_grad_()  # and all of it by autograd, with all the logits there
    logits = head(leaf + head.weight[:1].mean(-1) if extra == "tied" else leaf)
    value, sums = weigh(losses_, Outputs(logits), rows, counts_of(losses_, rows))
    (3.0 * value).backward()
    plain = [value.detach(), leaf.grad, *(p.grad for p in head.parameters()), *sums.values()]
    for mine, its in zip(whole, plain, strict=False):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-6)
    for size in (3 * VOCABULARY, 7 * VOCABULARY + 5, 22 * VOCABULARY):
        monkeypatch.setattr(signals, "CHUNK_VALUES", size)
        assert len(Outputs(states=states, head=head).chunks()) == math.ceil(23 / max(1, size // VOCABULARY))
        for mine, its in zip(told(rows, losses_, head, states, extra), whole, strict=True):
            assert torch.allclose(mine, its, rtol=1e-5, atol=1e-6)


def test_no_position_at_all_is_a_loss_of_nothing():
    head, states = nn.Linear(8, VOCABULARY), torch.zeros(0, 8, requires_grad=True)
    value, sums = weigh(WORDS, Outputs(states=states, head=head), words().part(slice(0, 0)), dict.fromkeys(WORDS, 7))
    value.backward()
    assert (value.item(), {float(raw) for raw in sums.values()}) == (0.0, {0.0})
    assert head.weight.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_of_an_autocast_that_is_over(dtype, monkeypatch):
    """A body under autocast hands over bf16; the loss and its gradient are finite, and those of fp32 within bf16."""
    monkeypatch.setattr(signals, "CHUNK_VALUES", 4 * VOCABULARY)
    body, head, x = nn.Linear(8, 8), nn.Linear(8, VOCABULARY), draw(40, 23, 8)
    found = []
    for autocast in (True, False):
        for p in (*body.parameters(), *head.parameters()):
            p.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            states = body(x)
        states = states.to(dtype) if autocast else states
        rows = words()
        value, _ = weigh(WORDS, Outputs(states=states, head=head), rows, counts_of(WORDS, rows))
        value.backward()
        assert all(
            torch.isfinite(v).all()
            for v in gradient_squares(WORDS, Outputs(states=states, head=head), rows, counts_of(WORDS, rows)).values()
        )
        found.append([value.detach(), body.weight.grad.clone(), head.weight.grad.clone()])
        assert all(torch.isfinite(v).all() for v in found[-1])
    for mine, its in zip(*found, strict=True):
        assert (mine - its).norm() < 0.02 * its.norm()


# ------------------------------------------------------------------------------------------------------------------- groups


GROUPED = ["rkd_distance", "rkd_angle", "similarity_preserving", "similarity_kl", "contrastive", "dist"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 23), st.integers(1, 4), st.integers(4, 200), st.sampled_from([(3,), (2, 3), (4, 2)]))
def test_losses_of_groups_do_not_depend_on_the_cut(n, workers, tokens, sizes):
    losses_ = {f"{type_}-{size}": loss(type_, group=size, weight=0.5) for type_ in GROUPED for size in sizes}
    lengths, together = np.sort(np.arange(n) * 5 % 17 + 2), group_of(losses_)
    assert together == math.lcm(*sizes)
    pooled, its, logits, teachers = draw(1, n, 6), draw(2, n, 6), draw(3, n, CLASSES), draw(4, n, CLASSES)

    def run(pieces):
        mine, said = pooled.clone().requires_grad_(), logits.clone().requires_grad_()
        total = 0.0
        for piece in pieces:
            rows = batch([0] * len(piece), teachers[piece], pooled=its[piece])
            value, _ = weigh(losses_, Outputs(said[piece], pooled=mine[piece]), rows, dict.fromkeys(losses_, n))
            value.backward()
            total += value.item()
        return total, mine.grad, said.grad

    order = np.arange(n)
    shares = [share(order, lengths, rank, workers, together) for rank in range(workers)]
    assert np.concatenate(shares).tolist() == order.tolist()
    pieces = [piece for mine in shares for piece in cut(mine, lengths[mine], tokens, together)]
    assert np.concatenate(pieces).tolist() == order.tolist()
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    assert (starts % together == 0).all()
    whole, cut_up = run([order]), run(pieces)
    assert cut_up[0] == pytest.approx(whole[0], rel=1e-5, abs=1e-6)
    for mine, expected in zip(cut_up[1:], whole[1:], strict=True):
        assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-6)


def test_groups_by_hand():
    # Rows 0 and 1, 2 and 3, and 4 alone. With two rows RKD's distances are 1 and 1 whatever they are; Gram rows are unit vectors.
    pooled = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 0.0], [5.0, 5.0]])
    its = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    rows, outputs = batch([0] * 5, pooled=its), Outputs(torch.zeros(5, 2), pooled=pooled)
    values = {
        type_: losses.STATE_TERMS[type_](loss(type_, group=2), "x", outputs, rows) for type_ in ("rkd_distance", "similarity_preserving")
    }
    # Group 0: (1, 0), (0, 1) against (1, 1) / sqrt 2 twice: 2 ((1 - h)^2 + h^2) / 4, h = sqrt 1/2. Each value counts for the rows of its group.
    h = math.sqrt(0.5)
    assert values["similarity_preserving"].tolist() == pytest.approx([2 * ((1 - h) ** 2 + h**2) / 2, 2 * self_gap(), 0.0], abs=1e-6)
    # Two equal rows of the teacher: no distance at all there, 1 at the student. Huber of 1 is 1/2.
    assert values["rkd_distance"].tolist() == pytest.approx([2 * 0.5, 0.0, 0.0], abs=1e-6)


def self_gap():
    """Mean squared difference of the Gram rows (1, 3), (3, 9), both (1, 3) / sqrt 10, to (1, 0) and (0, 1)."""
    a, b = 1 / math.sqrt(10), 3 / math.sqrt(10)
    return ((a - 1) ** 2 + b**2 + a**2 + (b - 1) ** 2) / 4


def test_dist_by_hand():
    """Student's classes are the teacher's turned round: correlation -1 in every row, and between rows of a group."""
    t = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    rows, outputs = batch([0] * 4, t), Outputs(-t)
    raw = weigh({"x": loss("dist", temperature=1.0, gamma=0.5, group=2)}, outputs, rows, {"x": 4})
    assert float(raw[0]) == pytest.approx(2 + 0.5 * 2, rel=1e-5)  # each row once 2, each group of two rows 2 for each of them
    alone = weigh({"x": loss("dist", temperature=1.0, gamma=0.5, group=4)}, outputs, rows, {"x": 4})
    assert float(alone[0]) == pytest.approx(3, rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- ramps and teachers


def test_ramps_by_hand():
    line = Ramp(start=4, end=1)
    assert [line.at(p) for p in (0, 0.25, 0.5, 1)] == [4, 3.25, 2.5, 1]
    early = Ramp(start=0, end=1, until=0.5)
    assert [early.at(p) for p in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 1, 1]
    cosine = Ramp(start=0, end=2, shape="cosine")
    assert [cosine.at(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([0, 1 - math.sqrt(0.5), 1, 1 + math.sqrt(0.5), 2])
    losses_ = {
        "a": loss("forward_kl", weight={"start": 0, "end": 1}, temperature={"start": 4, "end": 2}),
        "b": loss("cross_entropy", weight=3),
    }
    half = at(losses_, 0.5)
    assert (half["a"].weight, half["a"].temperature, half["b"].weight) == (0.5, 3.0, 3)
    assert half["b"] is losses_["b"]
    s, t = draw(1, 3, 4), draw(2, 3, 4)
    value = weigh({"a": half["a"]}, Outputs(s), batch([0] * 3, t), {"a": 3})[0]
    assert value.item() == pytest.approx(
        0.5 * 9 * float(divergences.forward_kl(s.div(3).log_softmax(-1), t.div(3).log_softmax(-1)).mean()), rel=1e-5
    )
    assert describe({"a": half["a"]}, {"a": 6.0}, {"a": 3})["train/weighted/a"] == 1.0


def several(n=4):
    one, two = draw(5, n, CLASSES), draw(6, n, CLASSES)
    rows = batch([0] * n)
    return Batch(rows.ids, {}, rows.scored, rows.tokens, rows.lengths, rows.positions, rows.labels,
                 {"one": TeacherSignal(logits=one), "two": TeacherSignal(logits=two)}), one, two  # fmt: skip


@pytest.mark.parametrize("type_", ["forward_kl", "reverse_kl", "jsd", "total_variation"])
def test_a_mean_of_teachers_is_that_of_their_probabilities(type_):
    rows, one, two = several()
    s, shares = draw(7, 4, CLASSES), {"one": 0.25, "two": 0.75}
    mean = (0.25 * (one / 2).softmax(-1) + 0.75 * (two / 2).softmax(-1)).log() * 2  # logits whose softmax at 2 it is
    found = weigh({"x": loss(type_, teacher=shares, temperature=2)}, Outputs(s), rows, {"x": 4})[0]
    expected = weigh({"x": loss(type_, temperature=2)}, Outputs(s), batch([0] * 4, mean), {"x": 4})[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_terms_of_two_teachers_add_up():
    rows, one, two = several()
    s = draw(7, 4, CLASSES).requires_grad_()
    both = {"a": loss("forward_kl", teacher="one", weight=0.3), "b": loss("reverse_kl", teacher="two", weight=0.6)}
    value = weigh(both, Outputs(s), rows, {"a": 4, "b": 4})[0]
    value.backward()
    other = s.detach().clone().requires_grad_()
    for name, its in (("a", one), ("b", two)):
        weigh({name: both[name].model_copy(update={"teacher": None})}, Outputs(other), batch([0] * 4, its), {name: 4})[0].backward()
    assert torch.allclose(s.grad, other.grad, atol=1e-7)
    separate = [weigh({name: both[name]}, Outputs(s), rows, {name: 4})[0] for name in both]
    assert value.item() == pytest.approx(sum(separate).item(), rel=1e-6)


def test_a_routed_term_follows_the_surest_teacher_at_each_position():
    sure, vague = torch.tensor([[5.0, 0.0], [0.1, 0.0]]), torch.tensor([[0.0, 0.2], [0.0, 4.0]])
    rows = replace(batch([0, 1]), signals={"a": TeacherSignal(logits=sure), "b": TeacherSignal(logits=vague)})
    routed = ForwardKL(type="forward_kl", temperature=1.0, teacher={"a": 0.5, "b": 0.5}, route="surest")
    s = torch.tensor([[0.3, -0.2], [1.0, 0.5]])
    found = CLASS_TERMS["forward_kl"](routed, s, rows)
    expected = [divergences.forward_kl(divergences.soften(s, 1.0), divergences.soften(t, 1.0))[i] for i, t in enumerate((sure, vague))]
    assert found.tolist() == pytest.approx([float(value) for value in expected])
    with pytest.raises(ValidationError, match="route chooses among several teachers"):
        ForwardKL(type="forward_kl", route="surest")
