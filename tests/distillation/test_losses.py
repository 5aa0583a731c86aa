"""Losses against numbers worked out by hand, and the algebra that a search relies on."""

import math

import pytest
import torch

from distillation import config as settings
from distillation.config import CrossEntropy, ForwardKL, JensenShannon, L2Distil, LogitMSE, PatientKD, ReverseKL
from distillation.divergences import forward_kl, jsd, l2_distil, logit_mse, pkd, reverse_kl
from distillation.losses import TERMS, describe, gradient_squares, scored, student_layers, weigh
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal


def batch(labels, teacher=None, hidden=None, layers=()):
    n = len(labels)
    signal = TeacherSignal(logits=teacher, hidden=hidden, layers=layers)
    return Batch([str(i) for i in range(n)], torch.zeros(n, 2).long(), torch.ones(n, 2).long(), torch.tensor(labels), signal)


def test_terms_are_those_of_the_job_file():
    configs = [CrossEntropy, ForwardKL, ReverseKL, JensenShannon, L2Distil, LogitMSE, PatientKD]
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


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def test_reverse_kl_of_two_classes_by_hand():
    # p = (3/4, 1/4), q = (1/2, 1/2): 1/2 ln(2/3) + 1/2 ln 2
    t, s = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    assert reverse_kl(s, t, 1.0).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert reverse_kl(s, t, 2.0).item() == pytest.approx(4 * kl((0.5, 0.5), (p, 1 - p)), abs=1e-6)


def test_jsd_of_two_classes_by_hand():
    t, s = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)
    p, q, half, quarter = (3 / 4, 1 / 4), (1 / 2, 1 / 2), (5 / 8, 3 / 8), (9 / 16, 7 / 16)
    assert jsd(s, t, 1.0, 0.5).item() == pytest.approx(4 * (kl(p, half) / 2 + kl(q, half) / 2), abs=1e-6)
    # beta = 1/4: (1/4 KL(p || m) + 3/4 KL(q || m)) / (3/16)
    assert jsd(s, t, 1.0, 0.25).item() == pytest.approx((kl(p, quarter) + 3 * kl(q, quarter)) * 4 / 3, abs=1e-6)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    m = ((p + 0.5) / 2, (1.5 - p) / 2)
    assert jsd(s, t, 2.0, 0.5).item() == pytest.approx(8 * (kl((p, 1 - p), m) + kl(q, m)), abs=1e-6)


def draw(seed, scale, n=6, c=9):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, c, generator=generator), scale * torch.randn(n, c, generator=generator)


def with_gradient(value, s, *rest):
    s = s.clone().requires_grad_()
    found = value(s, *rest)
    found.sum().backward()
    return found.detach(), s.grad


def exact(s, t, temperature, beta):
    """The formula as it is written, in float64, for beta between the ends."""
    log_p, log_q = (x.double() / temperature - (x.double() / temperature).logsumexp(-1, keepdim=True) for x in (t, s))
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    to_p, to_q = (log_p.exp() * (log_p - log_m)).sum(-1), (log_q.exp() * (log_q - log_m)).sum(-1)
    return temperature**2 * (to_p / (1 - beta) + to_q / beta)


@pytest.mark.parametrize("beta", [1e-6, 1e-4, 1e-3, 0.1, 0.5, 0.8, 0.999, 1 - 1e-6])
@pytest.mark.parametrize(("scale", "temperature"), [(0.01, 1.0), (1.0, 1.0), (3.0, 2.0), (30.0, 1.0), (30.0, 8.0)])
def test_jsd_and_its_gradient_are_those_of_float64(beta, scale, temperature):
    s, t = draw(4, scale)
    found, expected = with_gradient(jsd, s, t, temperature, beta), with_gradient(exact, s, t, temperature, beta)
    for mine, its in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), its.double(), rtol=1e-4, atol=2e-6 * max(1.0, float(its.abs().max())))


@pytest.mark.parametrize(("end", "divergence"), [(0.0, forward_kl), (1.0, reverse_kl)])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (2.0, 2.0), (40.0, 1.0)])
def test_jsd_is_forward_kl_at_0_and_reverse_kl_at_1(end, divergence, scale, temperature):
    s, t = draw(5, scale)
    for mine, its in zip(with_gradient(jsd, s, t, temperature, end), with_gradient(divergence, s, t, temperature), strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_jsd_leaves_its_ends_without_a_jump(end):
    s, t = draw(6, 1.0)
    at_end = with_gradient(jsd, s, t, 2.0, end)
    assert at_end[1].norm() > 1
    steps = [1e-6, 1e-4, 1e-3, 1e-2]
    for part in (0, 1):  # value, gradient
        moved = [float((with_gradient(jsd, s, t, 2.0, abs(end - step))[part] - at_end[part]).abs().max()) for step in steps]
        assert moved[0] < 1e-4
        assert 5 < moved[2] / moved[1] < 15  # ten times the way, about ten times the change
        assert 5 < moved[3] / moved[2] < 15


def test_jsd_looks_the_same_from_both_sides():
    s, t = draw(7, 4.0)
    assert torch.equal(jsd(s, t, 2.0, 0.5), jsd(t, s, 2.0, 0.5))
    assert torch.allclose(jsd(s, t, 2.0, 0.125), jsd(t, s, 2.0, 0.875), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1e-30, 1e-17, 1e-6, 0.5, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("gap", [0.0, 20.0, 100.0, 1e4])
def test_jsd_stands_extremes(beta, gap):
    sure = gap * torch.eye(3)
    s, t = sure[[0, 0, 1, 2]], torch.cat([sure[[0, 1, 2]], torch.zeros(1, 3)])
    value, gradient = with_gradient(jsd, s, t, 1.0, beta)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value >= 0).all()
    assert (value[0], gradient[0].abs().max()) == (0.0, 0.0)  # a match
    if 0 < beta < 1 and gap >= 100:  # no overlap: KL(p || m) = -log beta, KL(q || m) = -log(1 - beta)
        assert value[1].item() == pytest.approx(-math.log(beta) / (1 - beta) - math.log1p(-beta) / beta, rel=1e-4)


def test_jsd_has_no_gradient_at_a_match():
    s, _ = draw(8, 10.0)
    for beta in (0.0, 1e-6, 0.3, 1.0):
        value, gradient = with_gradient(jsd, s, s, 2.0, beta)
        assert value.abs().max() == 0.0
        assert gradient.abs().max() == 0.0


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


def squares_of(losses, outputs, rows):
    counts = {name: scored(loss, rows.labels) for name, loss in losses.items()}
    return {name: float(value) for name, value in gradient_squares(losses, outputs, rows, counts).items()}


def test_gradients_of_terms_by_hand():
    losses = {
        "hard": CrossEntropy(type="cross_entropy", weight=0.5),
        "soft": ForwardKL(type="forward_kl", temperature=1.0, weight=2.0),
        "inner": PatientKD(type="pkd", layers={0: 0}),
        "idle": L2Distil(type="l2_distil", weight=0),
    }
    teacher = torch.tensor([[math.log(3.0), 0.0]]).repeat(3, 1)
    hidden, stored = torch.tensor([[[3.0, 0.0]]]).repeat(3, 1, 1), torch.tensor([[[0.0, 5.0]]]).repeat(3, 1, 1)
    rows = batch([1, UNLABELLED, 0], teacher, stored, (0,))
    found = squares_of(losses, Outputs(torch.zeros(3, 2), hidden), rows)
    # cross entropy: (q - one-hot) / 2 is (1/4, -1/4) on two rows, times 1/2. forward KL: (q - p) / 3 is (-1/12, 1/12) on three, times 2.
    # pkd: 2 - 2 cos of the angle between (3, 0) and (0, 5) has the gradient (0, -2 / 3), a third of it on three rows.
    assert found == pytest.approx({"hard": 2 * 2 * (1 / 8) ** 2, "soft": 3 * 2 * (1 / 6) ** 2, "inner": 3 * (2 / 9) ** 2, "idle": 0.0})
    assert gradient_squares({"hard": losses["hard"]}, Outputs(torch.zeros(1, 2)), batch([UNLABELLED]), {"hard": 0})["hard"] == 0.0


def test_gradients_of_terms_do_not_depend_on_the_cut_and_leave_the_graph_alone():
    s, t = draw(9, 1.0, n=9, c=4)
    labels = [0, 1, UNLABELLED, 3, UNLABELLED, UNLABELLED, 1, 2, 0]
    losses = {"hard": CrossEntropy(type="cross_entropy"), "soft": JensenShannon(type="jsd", beta=0.2)}
    counts = {"hard": 6, "soft": 9}
    logits = s.clone().requires_grad_()

    def total(cuts):
        pairs = zip([0, *cuts], [*cuts, 9], strict=True)
        pieces = [gradient_squares(losses, Outputs(logits[i:j]), batch(labels[i:j], t[i:j]), counts) for i, j in pairs]
        return {name: sum(float(piece[name]) for piece in pieces) for name in losses}

    whole = total([])
    for name, loss in losses.items():
        own = s.clone().requires_grad_()
        weigh({name: loss}, Outputs(own), batch(labels, t), counts)[0].backward()
        assert whole[name] == pytest.approx(float(own.grad.square().sum()), rel=1e-5)
    for cuts in ([1], [3, 4], [2, 5, 6]):
        assert total(cuts) == pytest.approx(whole, rel=1e-5)
    assert logits.grad is None
