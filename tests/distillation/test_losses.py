"""Losses against numbers worked out by hand, and the algebra that a search relies on."""

import math

import pytest
import torch

from distillation import config as settings
from distillation.config import CrossEntropy, ForwardKL, L2Distil, LogitMSE, PatientKD
from distillation.divergences import forward_kl, l2_distil, logit_mse, pkd
from distillation.losses import TERMS, describe, scored, student_layers, weigh
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal


def batch(labels, teacher=None, hidden=None, layers=()):
    n = len(labels)
    signal = TeacherSignal(logits=teacher, hidden=hidden, layers=layers)
    return Batch([str(i) for i in range(n)], torch.zeros(n, 2).long(), torch.ones(n, 2).long(), torch.tensor(labels), signal)


def test_terms_are_those_of_the_job_file():
    configs = [CrossEntropy, ForwardKL, L2Distil, LogitMSE, PatientKD]
    assert set(TERMS) == {c.model_fields["type"].annotation.__args__[0] for c in configs}
    assert {c.__name__ for c in configs} == {c.__name__ for c in settings.LossConfig.__origin__.__args__}


def test_forward_kl_of_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)
    t, s = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert forward_kl(s, t, 1.0).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    # T = 2 halves the logits: p = (sqrt 3, 1) / (1 + sqrt 3); times 4
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert forward_kl(s, t, 2.0).item() == pytest.approx(4 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))), abs=1e-6)


def test_forward_kl_is_zero_with_zero_gradient_at_a_match_and_blind_to_a_shift():
    t = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    s = (t + 3.0).requires_grad_()
    value = forward_kl(s, t, 3.0).sum()
    value.backward()
    assert abs(value.item()) < 1e-5
    assert s.grad.abs().max() < 1e-5


def test_t_squared_keeps_the_gradient_and_its_limit_is_the_logit_difference():
    generator = torch.Generator().manual_seed(1)
    t, s = torch.randn(1, 6, generator=generator).double(), torch.randn(1, 6, generator=generator).double().requires_grad_()
    forward_kl(s.float(), t.float(), 100.0).sum().backward()
    limit = ((s - s.mean()) - (t - t.mean())) / 6  # Hinton et al. 2015, equation 4, times T^2
    assert torch.allclose(s.grad, limit, atol=0.02 * limit.abs().max().item())


def test_l2_distil_by_hand():
    # q = (1/2, 1/2), p = (3/4, 1/4): 2 * (1/4)^2
    assert l2_distil(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), 1.0).item() == pytest.approx(0.125)
    assert l2_distil(torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]]), 1.0).item() == pytest.approx(2.0)


def test_logit_mse_is_centred():
    s, t = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[10.0, 10.0, 10.0]])
    assert logit_mse(s, t).item() == pytest.approx((4 + 1 + 9) / 3)  # s - 3 = (-2, -1, 3)
    assert logit_mse(t + 5, t).item() == 0.0


def test_pkd_by_hand():
    student, teacher = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 5.0], [0.0, 1.0]]])
    assert pkd(student, teacher).item() == pytest.approx(2.0)  # orthogonal: 2; parallel: 0


def test_pkd_matches_the_layers_of_its_map():
    hidden = torch.eye(4)[None, [0, 1]].repeat(2, 1, 1)  # student layers 0 and 1
    stored = torch.eye(4)[None, [3, 1, 0]].repeat(2, 1, 1)  # teacher layers 1, 5, 9
    config = PatientKD(type="pkd", layers={1: 5, 0: 9})
    values = TERMS["pkd"](config, Outputs(torch.zeros(2, 2), hidden), batch([0, 0], hidden=stored, layers=(1, 5, 9)))
    assert values.tolist() == [0.0, 0.0]
    crossed = PatientKD(type="pkd", layers={1: 9, 0: 5})
    assert TERMS["pkd"](crossed, Outputs(torch.zeros(2, 2), hidden), batch([0, 0], hidden=stored, layers=(1, 5, 9))).tolist() == [4.0, 4.0]
    assert student_layers({"x": config, "hard": CrossEntropy(type="cross_entropy")}) == (0, 1)


def test_unlabelled_rows_are_masked_out_of_the_hard_term_only():
    losses = {"hard": CrossEntropy(type="cross_entropy", weight=0.5), "soft": ForwardKL(type="forward_kl", temperature=1.0, weight=2.0)}
    teacher = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    rows = batch([1, UNLABELLED, 0], teacher)
    counts = {name: scored(loss, rows.labels) for name, loss in losses.items()}
    assert counts == {"hard": 2, "soft": 3}
    loss, sums = weigh(losses, Outputs(torch.zeros(3, 2)), rows, counts)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 2.0 * kl)
    point = describe(losses, {name: float(v) for name, v in sums.items()}, counts)
    assert point == pytest.approx(
        {"train/loss": 0.5 * math.log(2) + 2 * kl, "train/loss/hard": math.log(2), "train/loss/soft": kl,
         "train/weighted/hard": 0.5 * math.log(2), "train/weighted/soft": 2 * kl}
    )  # fmt: skip


def test_a_step_without_any_label_has_zero_loss_and_a_gradient():
    logits = torch.randn(2, 3, requires_grad=True)
    losses = {"hard": CrossEntropy(type="cross_entropy")}
    loss, _ = weigh(losses, Outputs(logits), batch([UNLABELLED, UNLABELLED]), {"hard": 0})
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.abs().sum().item() == 0.0


def test_the_gradient_does_not_depend_on_the_cut():
    generator = torch.Generator().manual_seed(2)
    s, t = torch.randn(9, 4, generator=generator), torch.randn(9, 4, generator=generator)
    labels = [0, 1, UNLABELLED, 3, UNLABELLED, UNLABELLED, 1, 2, 0]
    losses = {
        "hard": CrossEntropy(type="cross_entropy", label_smoothing=0.1),
        "soft": ForwardKL(type="forward_kl"),
        "l2": L2Distil(type="l2_distil"),
    }

    def gradient(cuts):
        logits = s.clone().requires_grad_()
        counts = {name: scored(loss, torch.tensor(labels)) for name, loss in losses.items()}
        for i, j in zip([0, *cuts], [*cuts, 9], strict=True):
            weigh(losses, Outputs(logits[i:j]), batch(labels[i:j], t[i:j]), counts)[0].backward()
        return logits.grad

    whole = gradient([])
    for cuts in ([1], [3, 4], [2, 5, 6], list(range(1, 9))):
        assert torch.allclose(gradient(cuts), whole, atol=1e-7)


def test_a_weight_of_zero_is_exactly_the_other_terms():
    s = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))
    grads = []
    for losses in (
        {"hard": CrossEntropy(type="cross_entropy")},
        {"hard": CrossEntropy(type="cross_entropy"), "soft": ForwardKL(type="forward_kl", weight=0)},
    ):
        logits = s.clone().requires_grad_()
        weigh(losses, Outputs(logits), batch([0, 1, 2, 0], torch.zeros(4, 3)), dict.fromkeys(losses, 4))[0].backward()
        grads.append(logits.grad)
    assert torch.equal(*grads)
