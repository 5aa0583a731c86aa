"""Distances between hidden states against numbers worked out by hand and formulas in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special, stats
from scipy.spatial import distance
from torch.nn import functional as F

from distillation.features import (
    attention_kl,
    contrastive,
    cosine,
    hidden_mse,
    layer_map,
    pkd,
    relation_kl,
    relations,
    rkd_angle,
    rkd_distance,
    similarity_kl,
    similarity_preserving,
)

VECTORS = {
    "hidden_mse": lambda s, t: hidden_mse(s, t, False),
    "hidden_mse normalised": lambda s, t: hidden_mse(s, t, True),
    "cosine": cosine,
    "pkd": pkd,
}
GROUPS = {
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "similarity_preserving": similarity_preserving,
    "similarity_kl": lambda s, t: similarity_kl(s, t, 0.2),
    "contrastive": lambda s, t: contrastive(s, t, 0.2),
}


def draw(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def with_gradient(value, s, *rest):
    s = s.clone().requires_grad_()
    found = value(s, *rest)
    found.sum().backward()
    return found.detach(), s.grad


def kl(a, b):
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


def huber(gap):
    return np.where(np.abs(gap) < 1, gap**2 / 2, np.abs(gap) - 0.5)


# ---------------------------------------------------------------------------------------------------------------------------- vectors


def test_hidden_mse_by_hand():
    s, t = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[10.0, 0.0], [0.0, 2.0]])
    assert hidden_mse(s, t, False).tolist() == [(81 + 9) / 2, 2.0]
    assert hidden_mse(s[0], t[0], True).item() == pytest.approx(4.0, abs=1e-4)  # (-1, 1) against (1, -1)
    assert hidden_mse(100 * t[0] + 7, t[0], True).item() == pytest.approx(0.0, abs=1e-6)


def test_hidden_mse_is_that_of_z_scores():
    s, t = draw(0, 2, 3, 16)
    a, b = (stats.zscore(x.double().numpy(), axis=-1) for x in (s, 50 * t + 3))
    assert hidden_mse(s, 50 * t + 3, True).numpy() == pytest.approx(((a - b) ** 2).mean(-1), rel=1e-4)


def test_cosine_by_hand():
    s = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    t = torch.tensor([[0.0, 5.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert cosine(s, t).tolist() == pytest.approx([1.0, 0.0, 1 - math.sqrt(0.5), 2.0, 1.0])
    s, t = draw(1, 4, 5)
    assert cosine(s, t).numpy() == pytest.approx([distance.cosine(a, b) for a, b in zip(s.double(), t.double(), strict=True)], abs=1e-6)


def test_pkd_by_hand():
    student, teacher = torch.tensor([[[3.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[0.0, 5.0], [0.0, 1.0]]])
    assert pkd(student, teacher).item() == pytest.approx(2.0)  # orthogonal: 2; parallel: 0


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_vectors_that_match_pull_nowhere_and_zeros_are_no_nan(name):
    t, _ = draw(2, 3, 2, 8)
    value, gradient = with_gradient(VECTORS[name], t, t)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    for a, b in ((torch.zeros_like(t), t), (t, torch.zeros_like(t)), (torch.ones_like(t), t)):
        value, gradient = with_gradient(VECTORS[name], a, b)
        assert torch.isfinite(value).all()
        assert gradient.abs().max() < 1e4  # it is bounded, not only finite


# ------------------------------------------------------------------------------------------------------------- attention and relations


def test_attention_kl_by_hand():
    # One head, three positions, the last is padding. Rows over the two tokens: (3/4, 1/4) against (1/2, 1/2), and a match.
    t = torch.tensor([[[[0.75, 0.25, 0.0], [0.2, 0.8, 0.0], [0.1, 0.1, 0.8]]]])
    s = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.8, 0.0], [0.3, 0.3, 0.4]]]])
    expected = kl((0.75, 0.25), (0.5, 0.5)) / 2
    mask = torch.tensor([[1, 1, 0]])
    assert attention_kl(s, t, mask).item() == pytest.approx(expected, abs=1e-6)
    # mass on padding is left out and the rest renormalised; what padding looks at, NaN even, is nothing
    s[..., :2, :] = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.4, 0.5]])
    s[..., 2, :], t[..., 2, :] = math.nan, math.nan
    value, gradient = with_gradient(attention_kl, s, t, mask)
    assert value.item() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(gradient).all()
    assert gradient[..., 2].abs().max() == 0.0
    # two heads: the mean of this one and of a match
    two = attention_kl(torch.cat([s, t], dim=1), torch.cat([t, t], dim=1), mask)
    assert two.item() == pytest.approx(expected / 2, abs=1e-6)


def attention(scores, mask):
    return torch.softmax(scores.masked_fill(mask[:, None, None, :] == 0, -1e30), dim=-1)


def test_attention_kl_is_that_of_scipy_and_does_not_depend_on_padding():
    s, t = draw(3, 2, 4, 6, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    found = attention_kl(attention(s, mask), attention(t, mask), mask)
    for row, length in ((0, 6), (1, 4)):
        p, q = (special.softmax(x[row, :, :length, :length].double().numpy(), axis=-1) for x in (t, s))
        assert found[row].item() == pytest.approx(stats.entropy(p, q, axis=-1).mean(), rel=1e-5)
    cut = attention_kl(attention(s, mask)[1:, :, :4, :4], attention(t, mask)[1:, :, :4, :4], mask[1:, :4])
    assert found[1].item() == pytest.approx(cut.item(), rel=1e-6)


def test_attention_that_matches_pulls_nowhere_and_zeros_are_no_nan():
    t, _ = draw(4, 2, 2, 5, 5)
    t = t.masked_fill(torch.ones(5, 5).triu(1).bool(), -1e30)  # causal: exact zeros
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])  # and a sequence of padding alone
    value, gradient = with_gradient(lambda s: attention_kl(torch.softmax(s, -1), torch.softmax(t, -1), mask), t)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    sure = 1e4 * torch.eye(5).expand(2, 2, 5, 5)  # the student has 0 where the teacher looks
    value, gradient = with_gradient(lambda s: attention_kl(torch.softmax(s, -1), torch.softmax(t, -1), mask), sure)
    assert torch.isfinite(value).all()
    assert value[0] > 1
    assert torch.isfinite(gradient).all()
    assert value[1] == 0.0


def test_relations_by_hand():
    # Two positions of width 2, one head: scores x x^T / sqrt 2 = ((1, 0), (0, 4)) / sqrt 2
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    mask = torch.ones(1, 2)
    found = relations(x, 1, mask).exp()[0, 0]
    a, b = math.exp(1 / math.sqrt(2)), math.exp(4 / math.sqrt(2))
    assert found.flatten().tolist() == pytest.approx([a / (a + 1), 1 / (a + 1), 1 / (b + 1), b / (b + 1)])
    # two heads of width 1: (1, 0) and (0, 2), scores not divided
    found = relations(x, 2, mask).exp()[0]
    assert found[0, 0].tolist() == pytest.approx([math.e / (math.e + 1), 1 / (math.e + 1)])
    assert found[1, 1].tolist() == pytest.approx([1 / (math.exp(4) + 1), math.exp(4) / (math.exp(4) + 1)])
    assert relations(x, 2, torch.tensor([[1, 0]])).exp()[0, :, :, 0].tolist() == [[1.0, 1.0], [1.0, 1.0]]  # one key left
    with pytest.raises(AssertionError, match="no multiple"):
        relations(x, 3, mask)


def test_relation_kl_of_two_widths_is_that_of_scipy():
    (s, _), (t, _) = draw(5, 2, 5, 12), draw(6, 2, 5, 32)
    mask = torch.tensor([[1] * 5, [1] * 3 + [0] * 2])
    found = relation_kl(relations(s, 4, mask), relations(t, 4, mask), mask)
    for row, length in ((0, 5), (1, 3)):
        rows = []
        for x in (t, s):
            heads = x[row, :length].double().numpy().reshape(length, 4, -1).transpose(1, 0, 2)
            rows.append(special.softmax(heads @ heads.transpose(0, 2, 1) / math.sqrt(heads.shape[-1]), axis=-1))
        assert found[row].item() == pytest.approx(stats.entropy(*rows, axis=-1).mean(), rel=1e-4)


def test_relations_that_match_pull_nowhere_and_padding_is_nothing():
    t, s = draw(7, 2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]])

    def value(s, t):
        return relation_kl(relations(s, 2, mask), relations(t, 2, mask), mask)

    found, gradient = with_gradient(value, t, t)
    assert found.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6
    found, gradient = with_gradient(value, s, t)
    assert found[0] > 0.01
    assert found[1] == 0.0
    assert gradient[0, 3:].abs().max() == 0.0
    assert torch.isfinite(gradient).all()


# ----------------------------------------------------------------------------------------------------------------------------- groups


def test_rkd_distance_by_hand():
    # Distances 3, 4, 5 (mean 4) against 1, 1, 2 (mean 4/3): 3/4, 1, 5/4 against 3/4, 3/4, 3/2. Squares / 2: 0, 1/32, 1/32.
    t = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]])
    s = torch.tensor([[[0.0], [1.0], [-1.0]]])
    assert rkd_distance(s, t).item() == pytest.approx((0 + 1 / 32 + 1 / 32) / 3)
    assert rkd_distance(7 * t + 2, t).item() == pytest.approx(0.0, abs=1e-6)
    # Beyond 1 the Huber distance is linear. On a line: one row at 10, three at 0; distances 10, 10, 10, 0, 0, 0 (mean 5) are 2 or 0.
    far, even = torch.tensor([[[10.0], [0.0], [0.0], [0.0]]]), torch.eye(4)[None]  # all distances the same: 1
    assert rkd_distance(far, even).item() == pytest.approx(0.5)  # six gaps of 1: 1/2 each
    near = torch.tensor([[[0.0], [0.0], [0.0], [0.0]]])
    assert rkd_distance(near, far).item() == pytest.approx((3 * 1.5 + 0) / 6)  # three gaps of 2: 3/2 each


def test_rkd_angle_by_hand():
    # A right angle at row 0 of an isosceles triangle: cosines 0, 1/sqrt 2, 1/sqrt 2. On a line 1, 0, -1: -1 at row 0, 1 at both ends.
    t = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    s = torch.tensor([[[0.0], [1.0], [-1.0]]])
    root = 1 - math.sqrt(0.5)
    assert rkd_angle(s, t).item() == pytest.approx((0.5 + root**2 / 2 + root**2 / 2) / 3)
    assert rkd_angle(7 * t + 2, t).item() == pytest.approx(0.0, abs=1e-6)
    # Two equal rows: no arm between them, 0 at both; 1 at the third. Nothing else counts, as i = k would.
    equal = torch.tensor([[[0.0], [0.0], [1.0]]])
    assert rkd_angle(equal, t).item() == pytest.approx((0 + 0.25 + root**2 / 2) / 3)


def test_relational_distances_are_those_of_scipy():
    (s, _), (t, _) = draw(8, 2, 5, 6), draw(9, 2, 5, 9)
    for group in range(2):
        apart = [distance.pdist(x[group].double().numpy()) for x in (s, t)]
        expected = huber(apart[0] / apart[0].mean() - apart[1] / apart[1].mean()).mean()
        assert rkd_distance(s, t)[group].item() == pytest.approx(expected, rel=1e-4)
        angles = []
        for x in (s[group].double().numpy(), t[group].double().numpy()):
            triples = [(i, j, k) for i in range(5) for j in range(5) for k in range(5) if len({i, j, k}) == 3]
            angles.append(np.array([1 - distance.cosine(x[i] - x[j], x[k] - x[j]) for i, j, k in triples]))
        assert rkd_angle(s, t)[group].item() == pytest.approx(huber(angles[0] - angles[1]).mean(), rel=1e-4)


def test_similarity_preserving_by_hand():
    # Gram ((1, 0), (0, 4)) has rows (1, 0), (0, 1); ((1, 1), (1, 2)) has (1, 1) / sqrt 2, (1, 2) / sqrt 5.
    t, s = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    expected = ((1 - 0.5**0.5) ** 2 + 0.5 + 0.2 + (1 - 2 / 5**0.5) ** 2) / 4
    assert similarity_preserving(s, t).item() == pytest.approx(expected)
    (s, _), (t, _) = draw(10, 2, 5, 6), draw(11, 2, 5, 9)
    grams = [x.double() @ x.double().transpose(1, 2) for x in (s, t)]
    a, b = (gram / torch.linalg.vector_norm(gram, dim=-1, keepdim=True) for gram in grams)
    assert torch.allclose(similarity_preserving(s, t).double(), (a - b).square().sum((1, 2)) / 25, rtol=1e-4)


def test_similarity_kl_by_hand():
    # Cosines of three teacher rows: 0-1: 1, 0-2: 0, 1-2: 0; a student whose rows are all orthogonal gives (1/2, 1/2) everywhere.
    t, s = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]), 3 * torch.eye(3)[None]
    p = math.exp(2) / (math.exp(2) + 1)  # T = 1/2
    assert similarity_kl(s, t, 0.5).item() == pytest.approx((2 * kl((p, 1 - p), (0.5, 0.5)) + 0) / 3, abs=1e-6)
    (s, _), (t, _) = draw(12, 2, 5, 6), draw(13, 2, 5, 9)
    for group in range(2):
        rows = []
        for x in (t[group].double().numpy(), s[group].double().numpy()):
            cosines = 1 - distance.squareform(distance.pdist(x, "cosine"))
            rows.append(special.softmax(cosines[~np.eye(5, dtype=bool)].reshape(5, 4) / 0.1, axis=-1))
        assert similarity_kl(s, t, 0.1)[group].item() == pytest.approx(stats.entropy(*rows, axis=-1).mean(), rel=1e-4)


def test_contrastive_by_hand():
    s = t = torch.tensor([[[2.0, 0.0], [0.0, 3.0]]])
    assert contrastive(s, t, 0.5).item() == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 1)), abs=1e-6)
    assert contrastive(s.flip(1), t, 0.5).item() == pytest.approx(-math.log(1 / (math.exp(2) + 1)), abs=1e-6)
    assert contrastive(torch.ones(1, 4, 2), torch.ones(1, 4, 2), 0.05).item() == pytest.approx(math.log(4))
    s, t = draw(14, 2, 5, 6)
    scores = F.cosine_similarity(s.double()[:, :, None], t.double()[:, None], dim=-1) / 0.1
    expected = F.cross_entropy(scores.flatten(0, 1), torch.arange(5).repeat(2), reduction="none").view(2, 5).mean(-1)
    assert torch.allclose(contrastive(s, t, 0.1).double(), expected, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(GROUPS) - {"contrastive"}))
@pytest.mark.parametrize("g", [2, 3, 30])
def test_groups_that_match_pull_nowhere(name, g):
    t, _ = draw(15, 2, g, 8)
    value, gradient = with_gradient(GROUPS[name], t, t)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_a_group_of_one_row_is_0_with_a_graph(name):
    s, t = draw(16, 3, 1, 8)
    value, gradient = with_gradient(GROUPS[name], s, t)
    assert value.shape == (3,)
    assert value.abs().max() < 1e-6
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_equal_rows_and_zeros_are_no_nan(name):
    s, t = draw(17, 2, 4, 8)
    equal, some = s[:, :1].expand(2, 4, 8), s[:, [0, 0, 1, 2]]
    for a, b in ((equal, t), (t, equal), (equal, equal), (some, t), (some, some), (torch.zeros_like(s), t), (t, torch.zeros_like(t))):
        value, gradient = with_gradient(GROUPS[name], a, b)
        assert torch.isfinite(value).all()
        assert gradient.abs().max() < 1e4


@pytest.mark.parametrize("name", sorted(GROUPS))
def test_groups_are_by_themselves(name):
    s, t = draw(18, 3, 4, 8)
    together = GROUPS[name](s, t)
    assert together.tolist() == pytest.approx([GROUPS[name](s[i : i + 1], t[i : i + 1]).item() for i in range(3)], rel=1e-5)
    assert together.tolist() == pytest.approx(GROUPS[name](s.flip(1), t.flip(1)).tolist(), rel=1e-4)  # nor does the order of rows count


@pytest.mark.parametrize("name", sorted({**VECTORS, **GROUPS}))
def test_halves_are_computed_in_full(name):
    s, t = draw(19, 2, 4, 8)
    value = {**VECTORS, **GROUPS}[name](s.bfloat16(), t.bfloat16())
    assert value.dtype == torch.float32
    assert torch.equal(value, {**VECTORS, **GROUPS}[name](s.bfloat16().float(), t.bfloat16().float()))


@pytest.mark.parametrize("name", sorted({**VECTORS, **GROUPS}))
def test_gradients_are_those_of_small_steps(name):
    s, t = draw(20, 2, 5, 8)
    value = {**VECTORS, **GROUPS}[name]
    _, gradient = with_gradient(value, s, t)
    way, _ = draw(21, 2, 5, 8)
    ahead, behind = (value(s + step * way, t).double().sum() for step in (5e-3, -5e-3))
    assert float((gradient * way).sum()) == pytest.approx(float(ahead - behind) / 1e-2, rel=5e-3, abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------------- layer maps


def test_layer_maps_by_hand():
    assert layer_map("even", 4, 12) == {0: 2, 1: 5, 2: 8, 3: 11}
    assert layer_map("even", 4, 6) == {0: 1, 1: 2, 2: 4, 3: 5}  # 1.5, 3, 4.5, 6 from 1, a half up
    assert layer_map("even", 5, 12) == {0: 1, 1: 4, 2: 6, 3: 9, 4: 11}  # 2.4, 4.8, 7.2, 9.6, 12
    assert layer_map("last", 4, 12) == {0: 8, 1: 9, 2: 10, 3: 11}
    assert layer_map("skip", 6, 12) == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8, 5: 10}
    assert layer_map("skip", 5, 12) == {0: 0, 1: 2, 2: 4, 3: 6, 4: 8}


@given(st.sampled_from(["even", "last", "skip"]), st.integers(1, 40), st.integers(0, 60))
def test_layer_maps_rise(kind, student, more):
    teacher = student + more
    found = layer_map(kind, student, teacher)
    assert list(found) == list(range(student))
    assert min(found.values()) >= 0
    assert max(found.values()) < teacher
    assert all(found[i] < found[i + 1] for i in range(student - 1))
    if more == 0:
        assert found == {i: i for i in range(student)}
    if kind != "skip":
        assert found[student - 1] == teacher - 1
    else:
        assert found[0] == 0


def test_a_student_deeper_than_its_teacher_has_no_layer_map():
    with pytest.raises(ValueError, match=r"student of 8 layers and a teacher of 6.* 1 to 6; make it shallower"):
        layer_map("even", 8, 6)
