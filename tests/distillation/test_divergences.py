"""Divergences against numbers worked out by hand and formulas in float64, and the algebra that a search relies on."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from torch.utils._python_dispatch import TorchDispatchMode

from distillation import divergences, picked
from distillation.divergences import (
    POWER,
    adaptive_kl,
    binary_kl,
    bucketed,
    decoupled_kd,
    dist_inter,
    dist_intra,
    forward_kl,
    jsd,
    l2_distil,
    logit_mse,
    reverse_kl,
    sampled_cross_entropy,
    skewed_kl,
    skewed_reverse_kl,
    soften,
    squared_error,
    standardised_kl,
    total_variation,
    universal_logit,
)

PAIRS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": lambda log_q, log_p: jsd(log_q, log_p, 0.3),
    "skewed_kl": lambda log_q, log_p: skewed_kl(log_q, log_p, 0.1),
    "skewed_reverse_kl": lambda log_q, log_p: skewed_reverse_kl(log_q, log_p, 0.1),
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "universal_logit": universal_logit,
}
"""What takes a pair of log-probabilities; all but the last look at which class is which."""

LABELS = torch.tensor([0, 2, -1, 8, 3, 3])

LOGITS = {
    **{name: lambda s, t, T, name=name: T ** POWER[name] * PAIRS[name](soften(s, T), soften(t, T)) for name in PAIRS},
    "l2_distil": l2_distil,
    "logit_mse": lambda s, t, T: logit_mse(s, t),
    "squared_error": lambda s, t, T: squared_error(s, t),
    "standardised_kl": standardised_kl,
    "decoupled_kd": lambda s, t, T: decoupled_kd(s, t, LABELS[: len(s)], T, 1.0, 8.0),
    "binary_kl": binary_kl,
    "dist_inter": dist_inter,
    "dist_intra": lambda s, t, T: dist_intra(s[None], t[None], T).expand(len(s)),
}
"""Everything as a function of two sets of logits, with the power of T."""

QUARTERS, HALVES = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
"""A teacher of (3/4, 1/4), a student of (1/2, 1/2)."""


def draw(seed, scale, n=6, c=9):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, c, generator=generator), scale * torch.randn(n, c, generator=generator)


def with_gradient(value, s, *rest):
    s = s.clone().requires_grad_()
    found = value(s, *rest)
    found.sum().backward()
    return found.detach(), s.grad


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def test_every_pair_has_a_power_of_t():
    functions = inspect.getmembers(divergences, inspect.isfunction)
    takes = {name for name, function in functions if "log_q" in inspect.signature(function).parameters}
    assert takes == set(PAIRS)
    assert set(POWER) == takes | {"sampled_cross_entropy"}


# ------------------------------------------------------------------------------------------------------------------------- by hand


def test_soften_is_the_log_softmax():
    s, _ = draw(0, 20.0)
    assert torch.allclose(soften(s, 2.5).double(), torch.from_numpy(special.log_softmax(s.double().numpy() / 2.5, axis=-1)), atol=1e-5)
    assert soften(s.bfloat16(), 1.0).dtype == torch.float32


def test_kl_of_two_classes_by_hand():
    assert forward_kl(HALVES, QUARTERS).item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)
    assert reverse_kl(HALVES, QUARTERS).item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-6)
    # T = 2 halves the logits of (3/4, 1/4): p = (sqrt 3, 1) / (1 + sqrt 3)
    p, log_p = math.sqrt(3) / (1 + math.sqrt(3)), soften(torch.tensor([[math.log(3.0), 0.0]]), 2.0)
    assert forward_kl(HALVES, log_p).item() == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)), abs=1e-6)


def test_jsd_of_two_classes_by_hand():
    p, q, half, quarter = (3 / 4, 1 / 4), (1 / 2, 1 / 2), (5 / 8, 3 / 8), (9 / 16, 7 / 16)
    assert jsd(HALVES, QUARTERS, 0.5).item() == pytest.approx(4 * (kl(p, half) / 2 + kl(q, half) / 2), abs=1e-6)
    # beta = 1/4: (1/4 KL(p || m) + 3/4 KL(q || m)) / (3/16)
    assert jsd(HALVES, QUARTERS, 0.25).item() == pytest.approx((kl(p, quarter) + 3 * kl(q, quarter)) * 4 / 3, abs=1e-6)


def test_skewed_kl_by_hand():
    p, q = (3 / 4, 1 / 4), (1 / 2, 1 / 2)
    assert skewed_kl(HALVES, QUARTERS, 0.25).item() == pytest.approx(kl(p, (9 / 16, 7 / 16)), abs=1e-6)  # m = p / 4 + 3 q / 4
    assert skewed_reverse_kl(HALVES, QUARTERS, 0.25).item() == pytest.approx(kl(q, (11 / 16, 5 / 16)), abs=1e-6)  # m = 3 p / 4 + q / 4


def test_skewed_kl_is_bounded_where_nothing_overlaps():
    log_q, log_p = soften(1000 * torch.eye(2), 1.0), soften(1000 * torch.eye(2)[[1, 0]], 1.0)
    for divergence in (skewed_kl, skewed_reverse_kl):
        assert divergence(log_q, log_p, 0.1).tolist() == pytest.approx([-math.log(0.1)] * 2)


def test_adaptive_kl_by_hand():
    # The head up to 1/2 is class 0, which alone holds 0.6; |p - q| is 0.2 there, 0.15 + 0.05 in the tail: half of each KL.
    p, q = (0.25, 0.6, 0.15), (0.4, 0.4, 0.2)
    log_q, log_p = torch.tensor([q]).log(), torch.tensor([p]).log()
    assert adaptive_kl(log_q, log_p).item() == pytest.approx(0.5 * kl(p, q) + 0.5 * kl(q, p), abs=1e-6)
    # Up to 0.7 it takes class 0 too: (0.2 + 0.15) / 0.4.
    assert adaptive_kl(log_q, log_p, head=0.7).item() == pytest.approx(0.875 * kl(p, q) + 0.125 * kl(q, p), abs=1e-6)


def test_adaptive_kl_holds_its_weights():
    s, t = draw(20, 2.0)
    _, gradient = with_gradient(lambda s: adaptive_kl(soften(s, 1.0), soften(t, 1.0)), s)
    p, q = soften(t, 1.0).exp(), soften(s, 1.0).exp()
    gaps = (p - q).abs()
    weights = []
    for row, gap in zip(p, gaps, strict=True):
        order = row.argsort(descending=True)
        size = int((row[order].cumsum(0) < 0.5).sum()) + 1
        weights.append(gap[order[:size]].sum() / gap.sum())
    w = torch.stack(weights)[:, None]
    _, ahead = with_gradient(lambda s: forward_kl(soften(s, 1.0), soften(t, 1.0)), s)
    _, back = with_gradient(lambda s: reverse_kl(soften(s, 1.0), soften(t, 1.0)), s)
    assert torch.allclose(gradient, w * ahead + (1 - w) * back, atol=1e-6)


def test_total_variation_by_hand():
    assert total_variation(HALVES, QUARTERS).item() == pytest.approx(0.25)
    assert total_variation(soften(1e4 * torch.eye(2), 1.0), soften(1e4 * torch.eye(2)[[1, 0]], 1.0)).tolist() == [1.0, 1.0]


def test_universal_logit_by_hand():
    log_q, log_p = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.1, 0.3, 0.6]]).log()
    assert universal_logit(log_q, log_p).item() == pytest.approx(0.2 + 0.1 + 0.1)  # (0.8, 0.2, 0) against (0.6, 0.3, 0.1)
    assert universal_logit(log_p, log_q).item() == pytest.approx(0.4)
    assert universal_logit(log_p[:, [2, 0, 1]], log_p).item() == 0.0
    _, gradient = with_gradient(lambda s: universal_logit(s, log_p), log_q)
    assert gradient[0].tolist() == pytest.approx([-0.2, 0.8])  # sign times q
    thousand = torch.full((1, 1000), -math.log(1000))
    assert universal_logit(torch.zeros(1, 1), thousand).item() == pytest.approx(2 * 0.999, abs=1e-5)


def test_l2_distil_by_hand():
    # q = (1/2, 1/2), p = (3/4, 1/4): 2 * (1/4)^2
    assert l2_distil(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), 1.0).item() == pytest.approx(0.125)
    assert l2_distil(torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]]), 1.0).item() == pytest.approx(2.0)


def test_logit_mse_is_centred():
    s, t = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[10.0, 10.0, 10.0]])
    assert logit_mse(s, t).item() == pytest.approx((4 + 1 + 9) / 3)  # s - 3 = (-2, -1, 3)
    assert logit_mse(t + 5, t).item() == 0.0


def test_squared_error_by_hand():
    assert squared_error(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])).tolist() == [5.0, 0.0]


def test_standardised_kl_by_hand():
    # z of two logits is (1, -1) or (-1, 1), whatever they are. Against each other at T = 2: p = (e, 1) / (1 + e), and q the other way round.
    s, t = torch.tensor([[0.0, 5.0], [7.0, 3.0]]), torch.tensor([[100.0, 1.0], [2.0, 1.9]])
    p = math.e / (1 + math.e)
    assert standardised_kl(s, t, 2.0).tolist() == pytest.approx([4 * kl((p, 1 - p), (1 - p, p)), 0.0], abs=1e-5)


def test_standardised_kl_is_that_of_z_scores():
    s, t = draw(21, 3.0)
    p, q = (special.softmax(stats.zscore(x.double().numpy(), axis=-1) / 2.0, axis=-1) for x in (t, s))
    assert standardised_kl(s, t, 2.0).numpy() == pytest.approx(4 * stats.entropy(p, q, axis=-1), rel=1e-4)
    assert standardised_kl(3 * t + 5, t, 2.0).abs().max() < 1e-5


def test_decoupled_kd_by_hand():
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2). Target 0: (1/2, 1/2) against (1/4, 3/4), the others (1/2, 1/2) against (1/3, 2/3).
    t, s = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    target, others = kl((0.5, 0.5), (0.25, 0.75)), kl((0.5, 0.5), (1 / 3, 2 / 3))
    label = torch.tensor([0])
    assert decoupled_kd(s, t, label, 1.0, 1.0, 0.0).item() == pytest.approx(target, abs=1e-6)
    assert decoupled_kd(s, t, label, 1.0, 0.0, 1.0).item() == pytest.approx(others, abs=1e-6)
    assert decoupled_kd(s, t, label, 1.0, 1.0, 8.0).item() == pytest.approx(target + 8 * others, abs=1e-5)
    # Without a label the target is the teacher's argmax, 0 too. With label 2: (1/4, 3/4) against (1/2, 1/2), (2/3, 1/3) against (1/2, 1/2).
    assert decoupled_kd(s, t, torch.tensor([-100]), 1.0, 2.0, 3.0).item() == pytest.approx(2 * target + 3 * others, abs=1e-5)
    expected = kl((0.25, 0.75), (0.5, 0.5)) + kl((2 / 3, 1 / 3), (0.5, 0.5))
    assert decoupled_kd(s, t, torch.tensor([2]), 1.0, 1.0, 1.0).item() == pytest.approx(expected, abs=1e-6)


def test_decoupled_kd_adds_up_to_forward_kl():
    s, t = draw(22, 3.0)
    target = torch.where(LABELS < 0, t.argmax(-1), LABELS)
    rest = 1 - soften(t, 4.0).exp().gather(-1, target[:, None])[:, 0]
    both = decoupled_kd(s, t, LABELS, 4.0, 1.0, 0.0) + rest * decoupled_kd(s, t, LABELS, 4.0, 0.0, 1.0)
    assert torch.allclose(both, 16 * forward_kl(soften(s, 4.0), soften(t, 4.0)), rtol=1e-5)


def test_dist_is_one_minus_pearson():
    s, t = draw(23, 2.0)
    q, p = (special.softmax(x.double().numpy() / 2.0, axis=-1) for x in (s, t))
    assert dist_inter(s, t, 2.0).numpy() == pytest.approx([1 - stats.pearsonr(a, b).statistic for a, b in zip(q, p, strict=True)], abs=1e-5)
    columns = [1 - stats.pearsonr(a, b).statistic for a, b in zip(q.T, p.T, strict=True)]
    assert dist_intra(s[None], t[None], 2.0).item() == pytest.approx(np.mean(columns), abs=1e-5)
    # (q, 1 - q) against (p, 1 - p): one ranking or the other
    one, two = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])
    assert dist_inter(one, two, 1.0).item() == pytest.approx(2.0)
    assert dist_inter(one, -two, 1.0).item() == pytest.approx(0.0, abs=1e-6)


def test_dist_has_no_gradient_where_nothing_varies():
    s, t = draw(24, 2.0)
    flat = torch.full_like(s, 0.1)
    for value, gradient in (with_gradient(dist_inter, flat, t, 1.0), with_gradient(dist_inter, s, flat, 1.0)):
        assert torch.isfinite(value).all()
        assert gradient.abs().max() == 0.0
    assert dist_inter(flat, t, 1.0).tolist() == [1.0] * 6
    assert dist_inter(s, flat, 1.0).tolist() == [0.0] * 6
    value, gradient = with_gradient(dist_intra, s[:, None], t[:, None], 1.0)  # groups of one row
    assert (value.abs().max(), gradient.abs().max()) == (0.0, 0.0)
    value, gradient = with_gradient(dist_intra, s[None, [0, 0, 0]], t[None, :3], 1.0)  # equal rows of a student
    assert value.tolist() == [1.0]
    assert gradient.abs().max() == 0.0


def test_binary_kl_by_hand():
    # sigmoid(ln 3) = 3/4, sigmoid(0) = 1/2; the second label is a match
    t, s = torch.tensor([[math.log(3.0), 1.0]]), torch.tensor([[0.0, 1.0]])
    assert binary_kl(s, t, 1.0).item() == pytest.approx(kl((0.75, 0.25), (0.5, 0.5)), abs=1e-6)
    t = torch.tensor([[2 * math.log(3.0), -4 * math.log(3.0)]])  # at T = 2: 3/4 and 1/10
    assert binary_kl(torch.zeros(1, 2), t, 2.0).item() == pytest.approx(
        4 * (kl((0.75, 0.25), (0.5, 0.5)) + kl((0.1, 0.9), (0.5, 0.5))), abs=1e-5
    )


# -------------------------------------------------------------------------------------------------------------------- against float64


def as_written(name, s, t):
    """The formulas, in float64, by scipy."""
    q, p = (special.softmax(x.double().numpy(), axis=-1) for x in (s, t))
    if name == "jsd":
        m = 0.3 * p + 0.7 * q
        return stats.entropy(p, m, axis=-1) / 0.7 + stats.entropy(q, m, axis=-1) / 0.3
    return {
        "forward_kl": lambda: special.rel_entr(p, q).sum(-1),
        "reverse_kl": lambda: special.rel_entr(q, p).sum(-1),
        "skewed_kl": lambda: special.rel_entr(p, 0.1 * p + 0.9 * q).sum(-1),
        "skewed_reverse_kl": lambda: special.rel_entr(q, 0.9 * p + 0.1 * q).sum(-1),
        "total_variation": lambda: np.abs(p - q).sum(-1) / 2,
        "universal_logit": lambda: np.abs(np.sort(p) - np.sort(q)).sum(-1),
    }[name]()


@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"adaptive_kl"}))
@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 20.0])
def test_pairs_are_their_formulas(name, scale):
    s, t = draw(3, scale, c=40)
    assert PAIRS[name](soften(s, 1.0), soften(t, 1.0)).numpy() == pytest.approx(as_written(name, s, t), rel=1e-4, abs=1e-6)


# Not those of adaptive_kl, which holds its weights, and of universal_logit, which has a kink wherever two classes change places.
@pytest.mark.parametrize("name", sorted(set(LOGITS) - {"adaptive_kl", "universal_logit"}))
def test_gradients_are_those_of_small_steps(name):
    s, t = draw(2, 1.5)
    _, gradient = with_gradient(LOGITS[name], s, t, 2.0)
    way = torch.randn(s.shape, generator=torch.Generator().manual_seed(3))
    ahead, behind = (LOGITS[name](s + step * way, t, 2.0).double().sum() for step in (1e-2, -1e-2))
    assert float((gradient * way).sum()) == pytest.approx(float(ahead - behind) / 2e-2, rel=5e-3, abs=1e-4)


def smooth_jsd(s, t, temperature, beta):
    return temperature**2 * jsd(soften(s, temperature), soften(t, temperature), beta)


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
    found, expected = with_gradient(smooth_jsd, s, t, temperature, beta), with_gradient(exact, s, t, temperature, beta)
    for mine, its in zip(found, expected, strict=True):
        assert torch.allclose(mine.double(), its.double(), rtol=1e-4, atol=2e-6 * max(1.0, float(its.abs().max())))


@pytest.mark.parametrize(("end", "name"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
@pytest.mark.parametrize(("scale", "temperature"), [(1.0, 1.0), (2.0, 2.0), (40.0, 1.0)])
def test_jsd_is_forward_kl_at_0_and_reverse_kl_at_1(end, name, scale, temperature):
    s, t = draw(5, scale)
    found, expected = with_gradient(smooth_jsd, s, t, temperature, end), with_gradient(LOGITS[name], s, t, temperature)
    for mine, its in zip(found, expected, strict=True):
        assert torch.allclose(mine, its, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_skewed_kl_at_its_ends(alpha):
    s, t = draw(5, 2.0)
    for skewed, name in ((skewed_kl, "forward_kl"), (skewed_reverse_kl, "reverse_kl")):
        value, gradient = with_gradient(lambda s, f=skewed: f(soften(s, 1.0), soften(t, 1.0), alpha), s)
        expected, slope = with_gradient(LOGITS[name], s, t, 1.0)
        assert torch.allclose(value, (1 - alpha) * expected, atol=1e-6)
        assert torch.allclose(gradient, (1 - alpha) * slope, atol=1e-6)


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_jsd_leaves_its_ends_without_a_jump(end):
    s, t = draw(6, 1.0)
    at_end = with_gradient(smooth_jsd, s, t, 2.0, end)
    assert at_end[1].norm() > 1
    steps = [1e-6, 1e-4, 1e-3, 1e-2]
    for part in (0, 1):  # value, gradient
        moved = [float((with_gradient(smooth_jsd, s, t, 2.0, abs(end - step))[part] - at_end[part]).abs().max()) for step in steps]
        assert moved[0] < 1e-4
        assert 5 < moved[2] / moved[1] < 15  # ten times the way, about ten times the change
        assert 5 < moved[3] / moved[2] < 15


def test_jsd_looks_the_same_from_both_sides():
    s, t = draw(7, 4.0)
    assert torch.equal(smooth_jsd(s, t, 2.0, 0.5), smooth_jsd(t, s, 2.0, 0.5))
    assert torch.allclose(smooth_jsd(s, t, 2.0, 0.125), smooth_jsd(t, s, 2.0, 0.875), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1e-30, 1e-17, 1e-6, 0.5, 1 - 1e-6, 1.0])
@pytest.mark.parametrize("gap", [0.0, 20.0, 100.0, 1e4])
def test_jsd_stands_extremes(beta, gap):
    sure = gap * torch.eye(3)
    s, t = sure[[0, 0, 1, 2]], torch.cat([sure[[0, 1, 2]], torch.zeros(1, 3)])
    value, gradient = with_gradient(smooth_jsd, s, t, 1.0, beta)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    assert (value >= 0).all()
    assert (value[0], gradient[0].abs().max()) == (0.0, 0.0)  # a match
    if 0 < beta < 1 and gap >= 100:  # no overlap: KL(p || m) = -log beta, KL(q || m) = -log(1 - beta)
        assert value[1].item() == pytest.approx(-math.log(beta) / (1 - beta) - math.log1p(-beta) / beta, rel=1e-4)


def test_jsd_has_no_gradient_at_a_match():
    s, _ = draw(8, 10.0)
    for beta in (0.0, 1e-6, 0.3, 1.0):
        value, gradient = with_gradient(smooth_jsd, s, s, 2.0, beta)
        assert value.abs().max() == 0.0
        assert gradient.abs().max() == 0.0


# ------------------------------------------------------------------------------------------------------------------ what all have to do


@pytest.mark.parametrize("name", sorted(LOGITS))
def test_a_match_is_0_and_pulls_nowhere(name):
    for temperature, scale in itertools.product((1.0, 3.0), (0.1, 4.0)):
        t, _ = draw(9, scale)
        value, gradient = with_gradient(LOGITS[name], t, t, temperature)
        assert value.abs().max() < 1e-5, (temperature, scale)
        # Pearson divides by the spread of q, and a rounding with it.
        assert gradient.abs().max() < (1e-4 if name.startswith("dist") else 1e-5), (temperature, scale)


@pytest.mark.parametrize("name", sorted(set(LOGITS) - {"squared_error", "binary_kl"}))
def test_a_shift_of_all_logits_is_nothing(name):
    s, t = draw(10, 1.0)
    assert torch.allclose(LOGITS[name](s + 3.0, t - 1.0, 2.0), LOGITS[name](s, t, 2.0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "adaptive_kl", "binary_kl"])
def test_the_limit_of_a_high_temperature_is_the_logit_difference(name):
    s, t = draw(1, 1.0, n=1, c=6)
    _, gradient = with_gradient(LOGITS[name], s, t, 100.0)
    limit = (s - t) / 4 if name == "binary_kl" else ((s - s.mean()) - (t - t.mean())) / 6  # Hinton et al. 2015, equation 4, times T^2
    assert torch.allclose(gradient, limit, atol=0.02 * limit.abs().max().item())


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_the_power_keeps_the_size_of_the_gradient(name):
    s, t = draw(11, 1.0)
    sizes = [with_gradient(LOGITS[name], s, t, temperature)[1].norm().item() for temperature in (20.0, 40.0)]
    assert sizes[1] / sizes[0] == pytest.approx(1.0, abs=0.1)


def test_without_a_power_the_gradient_falls_with_t_or_its_square():
    s, t = draw(11, 1.0)
    for name, fall in (("forward_kl", 4.0), ("total_variation", 2.0)):
        sizes = [with_gradient(lambda s, T, f=PAIRS[name]: f(soften(s, T), soften(t, T)), s, T)[1].norm() for T in (20.0, 40.0)]
        assert (sizes[0] / sizes[1]).item() == pytest.approx(fall, rel=0.1)


@pytest.mark.parametrize("name", sorted(LOGITS))
@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_extreme_logits_are_no_nan(name, gap):
    sure = gap * torch.eye(3)
    s, t = sure[[0, 0, 1, 2]], torch.cat([sure[[0, 1, 2]], torch.zeros(1, 3)])
    labels = torch.tensor([0, 0, -1, 1])
    divergence = (lambda s, t, T: decoupled_kd(s, t, labels, T, 1.0, 8.0)) if name == "decoupled_kd" else LOGITS[name]
    value, gradient = with_gradient(divergence, s, t, 1.0)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_classes_without_any_probability_are_no_nan(name):
    s, t = draw(12, 2.0)
    t[:, 3] = -math.inf
    value, gradient = with_gradient(LOGITS[name], s, t, 2.0)  # the teacher rules one out
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()
    if name != "universal_logit":
        assert (gradient[:, 3] > 0).all()  # and the student is pulled away from it
    s[:, 3] = -math.inf  # both do: as if it were not there
    value, gradient = with_gradient(LOGITS[name], s, t, 2.0)
    kept = [0, 1, 2, 4, 5, 6, 7, 8]
    expected, slope = with_gradient(LOGITS[name], s[:, kept], t[:, kept], 2.0)
    assert torch.allclose(value, expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(gradient[:, kept], slope, rtol=1e-4, atol=1e-6)
    assert gradient[:, 3].abs().max() == 0.0
    s, t = draw(12, 2.0)
    s[:, 3] = -math.inf  # the student rules one out, for good
    value, gradient = with_gradient(LOGITS[name], s, t, 2.0)
    assert torch.isfinite(value).all()
    assert torch.isfinite(gradient).all()


numbers = st.lists(st.floats(-30, 30, width=32), min_size=4, max_size=4)


@settings(max_examples=40, deadline=None)
@given(numbers, numbers, st.floats(0.5, 8))
def test_distances_are_not_negative(s, t, temperature):
    s, t = torch.tensor([s]), torch.tensor([t])
    for name, distance in LOGITS.items():
        value = distance(s, t, temperature).item()
        assert value >= -1e-5 * temperature**2, name
        if name in ("forward_kl", "jsd", "total_variation"):  # as two buckets there is less to tell apart
            ids, told = torch.tensor([[2]]), soften(t, 1.0)
            merged = bucketed(s, ids, told.gather(-1, ids), temperature, (told / temperature).logsumexp(-1))
            assert temperature ** POWER[name] * PAIRS[name](*merged).item() <= value * (1 + 1e-4) + 1e-4, name


@settings(max_examples=40, deadline=None)
@given(numbers, numbers, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_jsd_turned_round_is_jsd_of_the_other_beta(s, t, beta):
    s, t = soften(torch.tensor([s]), 1.0), soften(torch.tensor([t]), 1.0)
    assert jsd(s, t, beta).item() == pytest.approx(jsd(t, s, 1 - beta).item(), rel=1e-4, abs=1e-6)


# ------------------------------------------------------------------------------------------------------------------------- buckets


def top(t, k, temperature):
    """What a teacher's pass stores of its logits: ids and log-probabilities at T = 1, and the normaliser of `temperature`."""
    told = soften(t, 1.0)
    log_p, ids = told.topk(k, dim=-1)
    return ids, log_p, (told / temperature).logsumexp(-1)


def merged(x, ids, temperature):
    """The distribution with everything outside of `ids` as one class, in float64."""
    p = torch.softmax(x.double() / temperature, dim=-1)
    inside = p.gather(-1, ids)
    return torch.cat([inside, p.scatter(-1, ids, 0.0).sum(-1, keepdim=True)], dim=-1)


def bucketed_kl(s, ids, log_p, temperature, log_normaliser):
    return temperature**2 * forward_kl(*bucketed(s, ids, log_p, temperature, log_normaliser))


def test_buckets_by_hand():
    # Teacher (1/2, 1/4, 1/8, 1/8), student uniform; the two most probable and the rest: (1/2, 1/4, 1/4) against (1/4, 1/4, 1/2).
    t, s = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log(), torch.zeros(1, 4)
    ids = torch.tensor([[0, 1]])
    log_q, log_p = bucketed(s, ids, t[:, :2], 1.0, torch.zeros(1))
    assert log_p.exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert log_q.exp()[0].tolist() == pytest.approx([0.25, 0.25, 0.5])
    # T = 1/2 squares and normalises: (1/4, 1/16, 1/64, 1/64) / (11/32) = (8, 2, 1/2, 1/2) / 11
    log_q, log_p = bucketed(s, ids, t[:, :2], 0.5, torch.tensor([math.log(11 / 32)]))
    assert log_p.exp()[0].tolist() == pytest.approx([8 / 11, 2 / 11, 1 / 11])
    value, gradient = with_gradient(lambda s: forward_kl(*bucketed(s, ids, t[:, :2], 1.0, torch.zeros(1))), s)
    assert value.item() == pytest.approx(kl((0.5, 0.25, 0.25), (0.25, 0.25, 0.5)), abs=1e-6)
    # q - p on the two; half of (1/2 - 1/4) on each of the rest
    assert gradient[0].tolist() == pytest.approx([-0.25, 0.0, 0.125, 0.125], abs=1e-6)


@pytest.mark.parametrize("name", sorted(PAIRS))
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_buckets_of_all_classes_are_the_dense_divergence(name, temperature):
    s, t = draw(13, 3.0)
    ids, log_p, normaliser = top(t, 9, temperature)
    found = with_gradient(lambda s: temperature ** POWER[name] * PAIRS[name](*bucketed(s, ids, log_p, temperature, normaliser)), s)
    for mine, its in zip(found, with_gradient(LOGITS[name], s, t, temperature), strict=True):
        assert torch.allclose(mine, its, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_buckets_pull_nowhere_at_a_match(name):
    for k, temperature, scale in itertools.product((1, 3, 9), (1.0, 4.0), (1.0, 10.0)):
        t, _ = draw(14, scale)
        ids, log_p, normaliser = top(t, k, temperature)
        value, gradient = with_gradient(lambda s, *told: PAIRS[name](*bucketed(s, *told)), t, ids, log_p, temperature, normaliser)
        assert value.abs().max() < 1e-5, (k, temperature, scale)
        assert gradient.abs().max() < 1e-6, (k, temperature, scale)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_with_little_mass_on_the_k_pays_for_it(temperature):
    generator = torch.Generator().manual_seed(15)
    t, s = torch.randn(4, 50, generator=generator), torch.randn(4, 50, generator=generator)
    t[:, :5] += 6.0
    mass = torch.softmax(s / temperature, -1)[:, :5].sum(-1, keepdim=True)
    s[:, :5] += temperature * (math.log(0.03 / 0.97) - (mass / (1 - mass)).log())  # 3 % at this temperature
    ids, log_p, normaliser = top(t, 5, temperature)
    p, q = merged(t, ids, temperature), merged(s, ids, temperature)
    assert q[:, :5].sum(-1).tolist() == pytest.approx([0.03] * 4, rel=1e-4)
    found = bucketed_kl(s, ids, log_p, temperature, normaliser)
    assert found.numpy() == pytest.approx(temperature**2 * stats.entropy(p.numpy(), q.numpy(), axis=-1), rel=1e-5)
    # p_K log(p_K / q_K) + (1 - p_K) log((1 - p_K) / (1 - q_K)) alone, whatever the split among the k
    leak = stats.entropy([[x, 1 - x] for x in p[:, :5].sum(-1).tolist()], [[0.03, 0.97]] * 4, axis=-1)
    assert (found.numpy() >= temperature**2 * leak - 1e-4).all()
    assert leak.min() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cells", [1, 40, 1 << 20])
def test_the_gradient_of_buckets_is_that_of_the_merged_distribution(dtype, cells, monkeypatch):
    monkeypatch.setattr(picked, "_CELLS", cells)
    s, t = draw(16, 2.0, n=5, c=30)
    s = s.to(dtype)
    ids, log_p, normaliser = top(t, 4, 2.0)
    value, gradient = with_gradient(bucketed_kl, s, ids, log_p, 2.0, normaliser)

    def plain(s):
        p, q = merged(t, ids, 2.0), merged(s, ids, 2.0)
        return 4 * (p * (p / q).log()).sum(-1)

    expected, slope = with_gradient(plain, s.double())
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    assert torch.allclose(value.double(), expected, rtol=1e-5)
    assert torch.allclose(gradient.double(), slope, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-5)


def test_a_student_that_is_sure_of_the_k_still_learns_the_rest():
    # 1 - q_K is 1e-20 here, which is 0 beside 1; the teacher keeps 0.4 outside. In full: q - p on the one, (q - p) of the rest shared by size.
    t = torch.tensor([[0.6, 0.2, 0.2]]).log()
    s = torch.tensor([[46.0, 0.0, 0.0]])
    value, gradient = with_gradient(bucketed_kl, s, torch.tensor([[0]]), t[:, :1], 1.0, torch.zeros(1))
    assert value.item() == pytest.approx(0.6 * math.log(0.6) + 0.4 * (math.log(0.4) + 46.0 - math.log(2)), rel=1e-5)
    assert gradient[0].tolist() == pytest.approx([0.4, -0.2, -0.2], abs=1e-6)


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_padding_of_buckets_is_nothing(name):
    s, t = draw(17, 2.0)
    ids, log_p, normaliser = top(t, 3, 2.0)

    def value(s, ids, log_p):
        return PAIRS[name](*bucketed(s, ids, log_p, 2.0, normaliser))

    expected, slope = with_gradient(value, s, ids, log_p)
    for anything in (0, int(ids[0, 0]), 8, -1, 10**6):  # also one that is among the three, and ones that are nowhere
        padded = torch.cat([ids, torch.full((6, 2), anything)], dim=-1)
        found, gradient = with_gradient(value, s, padded, torch.cat([log_p, torch.full((6, 2), -math.inf)], dim=-1))
        assert torch.allclose(found, expected, atol=1e-6)
        assert torch.allclose(gradient, slope, atol=1e-6)
    nothing, gradient = with_gradient(value, s, ids, torch.full_like(log_p, -math.inf))  # a row of padding: all is in the rest
    assert max(nothing.abs().max(), gradient.abs().max()) < 1e-7


@pytest.mark.parametrize("name", sorted(PAIRS))
def test_buckets_stand_extremes(name):
    sure = 1e4 * torch.eye(4)
    s, t = sure[[0, 0, 1, 2]], torch.cat([sure[[0, 1, 2]], torch.zeros(1, 4)])
    s[1, 3] = -math.inf
    for k in (1, 3, 4):
        ids, log_p, normaliser = top(t, k, 2.0)
        value, gradient = with_gradient(lambda s, *told: PAIRS[name](*bucketed(s, *told)), s, ids, log_p, 2.0, normaliser)
        assert torch.isfinite(value).all()
        assert torch.isfinite(gradient).all()


def test_log_probabilities_of_16_bits_may_sum_to_more_than_1():
    t = torch.tensor([[0.9, 0.09, 0.0099, 0.0001]]).log()
    log_p = t[:, :3].half() + 0.001
    assert log_p.float().exp().sum() > 1
    log_q, told = bucketed(t, torch.tensor([[0, 1, 2]]), log_p, 1.0, torch.zeros(1))
    assert told.exp().sum().item() == pytest.approx(1.0)
    assert 0 <= forward_kl(log_q, told).item() < 1e-3


def kept_and_made(value, s):
    """Floats that the graph of value(s) keeps, and the size of the biggest tensor of floats that is made forward and backward."""
    kept, made = [], [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() not in known:
                    made[-1] = max(made[-1], x.numel())
            return out

    known = {s.untyped_storage().data_ptr()}
    s.requires_grad_()
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        total = value(s).sum()
        made.append(0)
        total.backward()
    own = sum(x.numel() for x in kept if x.is_floating_point() and x.untyped_storage().data_ptr() not in known)
    return own, made[0], made[1]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buckets_hold_no_second_copy_of_the_logits(temperature, dtype, monkeypatch):
    n, v, k = 40, 2000, 8
    monkeypatch.setattr(picked, "_CELLS", 4 * v)  # blocks of four rows
    s, t = draw(18, 2.0, n=n, c=v)
    ids, log_p, normaliser = top(t, k, temperature)
    small = 4 * v + 20 * n * (k + 1)
    for value in (
        lambda s: bucketed_kl(s, ids, log_p, temperature, normaliser),
        lambda s: sampled_cross_entropy(s, ids, torch.full((n, k), 1 / k), temperature),
    ):
        kept, forward, backward = kept_and_made(value, s.detach().to(dtype))
        assert kept < 20 * n * (k + 1)
        assert forward <= small
        assert backward == n * v  # the gradient
    # what it is held against: the watch sees a plain softmax
    kept, forward, _ = kept_and_made(lambda s: forward_kl(soften(s, temperature), soften(t, temperature)), s.detach().to(dtype))
    assert kept >= n * v
    assert forward == n * v


# ------------------------------------------------------------------------------------------------------------------------- sampled


def test_sampled_cross_entropy_by_hand():
    s = torch.tensor([[0.5, 0.25, 0.25]]).log()
    weights = torch.tensor([[0.75, 0.25, 0.0]])
    for padding in (0, 1, -1, 99):
        value, gradient = with_gradient(sampled_cross_entropy, s, torch.tensor([[0, 2, padding]]), weights, 1.0)
        assert value.item() == pytest.approx(0.75 * math.log(2) + 0.25 * math.log(4), abs=1e-6)
        assert gradient[0].tolist() == pytest.approx([-0.25, 0.25, 0.0], abs=1e-6)  # q - w
    # at T = 1/2, q = (4, 1, 1) / 6, and the slope is twice q - w
    value, gradient = with_gradient(sampled_cross_entropy, s, torch.tensor([[0, 2, 0]]), weights, 0.5)
    assert value.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(6), abs=1e-6)
    assert gradient[0].tolist() == pytest.approx([2 * (4 / 6 - 0.75), 2 / 6, 2 * (1 / 6 - 0.25)], abs=1e-6)


def test_a_target_drawn_twice_counts_twice():
    s, _ = draw(19, 2.0, n=2)
    twice = with_gradient(sampled_cross_entropy, s, torch.tensor([[3, 3, 1]] * 2), torch.full((2, 3), 1 / 3), 2.0)
    once = with_gradient(sampled_cross_entropy, s, torch.tensor([[3, 1]] * 2), torch.tensor([[2 / 3, 1 / 3]] * 2), 2.0)
    for mine, its in zip(twice, once, strict=True):
        assert torch.allclose(mine, its, atol=1e-6)


def test_the_mean_over_draws_is_the_cross_entropy_to_the_teacher():
    s, t = draw(19, 2.0, n=1)
    p = soften(t, 1.0).exp()[0]
    # All draws of one id from p, each with its probability. With every id once and weight p it is one draw of them all.
    draws = [with_gradient(sampled_cross_entropy, s, torch.tensor([[c]]), torch.ones(1, 1), 2.0) for c in range(9)]
    value, gradient = with_gradient(sampled_cross_entropy, s, torch.arange(9)[None], p[None], 2.0)
    cross, slope = with_gradient(lambda s: -(p * soften(s, 2.0)).sum(-1), s)
    for mean in (
        (value, gradient),
        (sum(w * d[0] for w, d in zip(p, draws, strict=True)), sum(w * d[1] for w, d in zip(p, draws, strict=True))),
    ):
        assert torch.allclose(mean[0], cross, rtol=1e-5)
        assert torch.allclose(mean[1], slope, atol=1e-6)


def test_a_sampled_class_that_the_student_rules_out_is_no_nan():
    s = torch.tensor([[0.0, -math.inf, 1.0]])
    _, gradient = with_gradient(sampled_cross_entropy, s, torch.tensor([[0, 1]]), torch.tensor([[1.0, 0.0]]), 1.0)
    assert torch.isfinite(gradient).all()
