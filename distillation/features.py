"""Distances between what a teacher and a student hold inside: vectors, attention, relations. Pure functions, computed in fp32.

Shapes: B sequences of S positions, A attention heads, H numbers in a vector, L layers; a group is g rows that were computed together, G of
them. One value per vector, sequence or group, never a reduction over those: the loop divides by their number in the whole step. s is the
student's and has a gradient, t the teacher's. Values have no unit where nothing else is said. A vector of zeros has no direction: its cosine
with anything is 0, without a gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension. Zeros stay zeros, with a gradient of 0 where the derivative of |x| is NaN or, kept finite, huge."""
    x = x.float()
    square = x.square().sum(-1, keepdim=True)
    return x * torch.where(square > 0, square, math.inf).rsqrt()


# ---------------------------------------------------------------------------------------------------------------------------- vectors


def hidden_mse(s: Tensor, t: Tensor, normalise: bool) -> Tensor:
    """mean_h (s - t)^2 in squared units of the hidden states; normalised between 0 and 4. [..] of [.., H]

    FitNets (Romero et al. 2015), TinyBERT (Jiao et al. 2020). `normalise`: each vector first to mean 0 and variance 1 (a layer norm without
    parameters), so that the teacher's scale does not set the weight.
    """
    s, t = s.float(), t.float()
    if normalise:
        s, t = (F.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (s, t))
    return (s - t).square().mean(-1)


def cosine(s: Tensor, t: Tensor) -> Tensor:
    """1 - cos of the angle between s and t, between 0 and 2. [..] of [.., H]   (Sanh et al. 2019, DistilBERT)"""
    return 1 - (_unit(s) * _unit(t)).sum(-1)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_l || a / |a| - b / |b| ||^2 over layer pairs, each between 0 and 4. student, teacher: [N, L, H]. [N]

    Patient knowledge distillation on the first token (Sun et al. 2019, equation 7).
    """
    return (_unit(student) - _unit(teacher)).square().sum((-1, -2))


# ------------------------------------------------------------------------------------------------------------- attention and relations


def attention_kl(s: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """KL(t || s) of attention rows, mean over heads and over the queries that are tokens, in nats, at least 0. [B]

    MiniLM (Wang et al. 2020). s, t: [B, A, S, S] attention probabilities (after the softmax), the same number of heads. mask: [B, S], 1 on
    tokens, 0 on padding. Each row is renormalised over the keys that are tokens. A probability under 1e-12 counts as 1e-12: an attention in
    16 bits rounds to exact zeros.
    """
    pairs = _pairs(mask)
    s, t = (x.float().masked_fill(~pairs, 0.0) for x in (s, t))
    tiny = torch.finfo(torch.float32).tiny
    s, t = (x / x.sum(-1, keepdim=True).clamp_min(tiny) for x in (s, t))
    return relation_kl(s.clamp_min(1e-12).log(), t.clamp_min(1e-12).log(), mask)


def relations(vectors: Tensor, heads: int, mask: Tensor) -> Tensor:
    """log softmax over keys of x x^T / sqrt(W / heads), of queries, keys or values cut anew into `heads` pieces. [B, heads, S, S]

    MiniLMv2 (Wang et al. 2021). vectors: [B, S, W], all heads of one layer side by side; `heads` divides W. The student's W may be another
    one. mask: [B, S], 1 on tokens; keys that are padding get a probability of 0.
    """
    batch, length, width = vectors.shape
    assert width % heads == 0, f"{width} is no multiple of {heads} relation heads"
    x = vectors.float().view(batch, length, heads, width // heads).transpose(1, 2)
    scores = x @ x.transpose(-1, -2) / math.sqrt(width / heads)
    # Not -inf: a sequence of padding alone would be NaN.
    return F.log_softmax(scores.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(torch.float32).min), dim=-1)


def relation_kl(s_log: Tensor, t_log: Tensor, mask: Tensor) -> Tensor:
    """KL(t || s) of the rows of two `relations`, mean over heads and over the queries that are tokens, in nats, at least 0. [B]

    MiniLMv2 (Wang et al. 2021, equation 4). s_log, t_log: [B, A, S, S], mask: [B, S]. 0 for a sequence without any token.
    """
    pairs = _pairs(mask)
    s_log, t_log = (x.masked_fill(~pairs, 0.0) for x in (s_log, t_log))  # before the product: padding may hold anything
    rows = (t_log.exp() * (t_log - s_log)).sum(-1).mean(1)
    return rows.sum(-1) / mask.sum(-1).clamp_min(1)


def _pairs(mask: Tensor) -> Tensor:
    """True where query and key are both tokens. [B, 1, S, S]"""
    tokens = mask.bool()
    return tokens[:, None, :, None] & tokens[:, None, None, :]


# ----------------------------------------------------------------------------------------------------------------------------- groups


def rkd_distance(s: Tensor, t: Tensor) -> Tensor:
    """Huber distance (delta 1) of the distances between two rows, each side divided by its mean distance; mean over pairs. [G]

    Relational knowledge distillation (Park et al. 2019, equation 6). s, t: [G, g, H], H may differ. 0 for a group of one row.
    """
    return _over_pairs(F.smooth_l1_loss(_relative_distances(s), _relative_distances(t), reduction="none"))


def _relative_distances(x: Tensor) -> Tensor:
    """|x_i - x_j| divided by its mean over i != j. Not from products of rows: equal ones would differ by rounding. [G, g, g]"""
    distances = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances / _over_pairs(distances).clamp_min(torch.finfo(torch.float32).tiny)[:, None, None]


def _over_pairs(values: Tensor) -> Tensor:
    """Mean of [G, g, g] over i != j, of values that are 0 at i = j; 0 where there is no pair. [G]"""
    g = values.shape[-1]
    return values.sum((-1, -2)) / max(g * (g - 1), 1)


def rkd_angle(s: Tensor, t: Tensor) -> Tensor:
    """Huber distance (delta 1) of the cosines of the angles i-j-k at row j, mean over all triples of three different rows. [G]

    Relational knowledge distillation (Park et al. 2019, equation 8). s, t: [G, g, H], H may differ. 0 for a group of fewer than three rows.
    Holds G g^2 H numbers.
    """
    g = s.shape[1]
    gap = F.smooth_l1_loss(_angles(s), _angles(t), reduction="none")
    return gap.sum((-1, -2, -3)) / max(g * (g - 1) * (g - 2), 1)


def _angles(x: Tensor) -> Tensor:
    """cos of the angle at j (first index) between i and k; 0 where two of the three are one row. [G, g, g, g]"""
    x = x.float()
    arms = _unit(x[:, None, :, :] - x[:, :, None, :])  # [G, j, i, H]: from j to i
    same = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return (arms @ arms.transpose(-1, -2)).masked_fill(same, 0.0)  # i = j or k = j: the arm is 0 already


def similarity_preserving(s: Tensor, t: Tensor) -> Tensor:
    """mean_ij (S_ij - T_ij)^2 of the Gram matrices x x^T whose rows are scaled to length 1. Between 0 and 4 / g. [G]

    Tung and Mori 2019. s, t: [G, g, H], H may differ.
    """
    s, t = (_unit(x.float() @ x.float().transpose(-1, -2)) for x in (s, t))
    return (s - t).square().mean((-1, -2))


def similarity_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """KL(t || s) of softmax(cos(x_i, x_j) / T) over j != i, mean over the rows i of a group, in nats, at least 0. [G]

    Score distillation of embeddings: which other row is near, as in the relational term of CompRess (Koohpayegani et al. 2020) and SEED
    (Fang et al. 2021). s, t: [G, g, H], H may differ. T divides cosines, not logits (0.05 is usual), and no power of it is multiplied with.
    0 for a group of fewer than three rows.
    """
    s, t = (_near(x, temperature) for x in (s, t))
    return (t.exp() * (t - s)).sum(-1).mean(-1)


def _near(x: Tensor, temperature: float) -> Tensor:
    """log softmax of the cosines of a row with the others, [G, g, g]; itself at the smallest number, whose exp is 0."""
    x = _unit(x)
    same = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    near = F.log_softmax((x @ x.transpose(-1, -2) / temperature).masked_fill(same, torch.finfo(torch.float32).min), dim=-1)
    return near.masked_fill(same, torch.finfo(torch.float32).min)  # the same on both sides: their difference is 0


def contrastive(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """-log of the share of the own teacher vector in softmax_j(cos(s_i, t_j) / T), mean over the rows i of a group, in nats, at least 0. [G]

    InfoNCE (van den Oord et al. 2018) between student and teacher, as in contrastive representation distillation (Tian et al. 2020) with the
    other rows of the group as negatives. s, t: [G, g, H] of one width. T divides cosines. Unlike with all others here, neither value nor
    gradient is 0 at s = t: it also pushes a row away from its neighbours. log g where nothing can be told apart, 0 for a group of one row.
    """
    scores = _unit(s) @ _unit(t).transpose(-1, -2) / temperature
    return -F.log_softmax(scores, dim=-1).diagonal(dim1=-2, dim2=-1).mean(-1)


# ------------------------------------------------------------------------------------------------------------------------- layer maps


def layer_map(kind: Literal["even", "last", "skip"], student_depth: int, teacher_depth: int) -> dict[int, int]:
    """Which teacher layer each student layer follows, both counted from 0. Strictly increasing.

    even: the (i + 1) Lt / Ls th layer, rounded (a half up): uniform, the last onto the last (Sun et al. 2019, Jiao et al. 2020). last: the
    last Ls layers. skip: every (Lt // Ls)th from the first on, as DistilBERT is initialised (Sanh et al. 2019). Raises ValueError where the
    student is deeper than the teacher.
    """
    if not 1 <= student_depth <= teacher_depth:
        raise ValueError(
            f"No map of layers for a student of {student_depth} layers and a teacher of {teacher_depth}: "
            f"the student may have 1 to {teacher_depth}; make it shallower, or take a deeper teacher."
        )
    if kind == "even":
        return {i: (2 * (i + 1) * teacher_depth + student_depth) // (2 * student_depth) - 1 for i in range(student_depth)}
    if kind == "last":
        return {i: teacher_depth - student_depth + i for i in range(student_depth)}
    return {i: i * (teacher_depth // student_depth) for i in range(student_depth)}
