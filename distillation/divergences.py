"""Distances between what a teacher and a student say. Pure functions, one value per scored position, computed in fp32.

Shapes: N scored positions, C classes (a vocabulary of V tokens, or the k + 1 buckets of `bucketed`). s and t are logits of student and
teacher at temperature 1, T is the temperature, q = softmax(s / T), p = softmax(t / T). Most functions take log q and log p, so that the same
distance works on all classes (`soften`) and on the k most probable ones and the rest (`bucketed`); only log q has a gradient. These carry no
power of T: `POWER` says which one the loss multiplies with. No reduction over N here: the loop divides by the scored positions of the whole
step. Values are in nats where nothing else is said. A class of log-probability -inf counts as one of -100: of no weight in any mean over it,
and a finite price where the other side is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from distillation.picked import picked

POWER: Mapping[str, int] = {
    "forward_kl": 2,
    "reverse_kl": 2,
    "jsd": 2,
    "skewed_kl": 2,
    "skewed_reverse_kl": 2,
    "adaptive_kl": 2,
    "sampled_cross_entropy": 2,
    "total_variation": 1,
    "universal_logit": 1,
}
"""The power of T that keeps the size of the gradient with respect to s as T changes (Hinton, Vinyals, Dean 2015, section 2).

s / T brings a 1 / T. Of what is smooth at a match the slope is proportional to q - p, which at a high T falls as 1 / T too: 2. The slope of an
absolute difference is a sign and does not fall: 1.
"""


def soften(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / T) over the last dimension, in fp32. [N, C]"""
    return F.log_softmax(logits.float() / temperature, dim=-1)


def _finite(log_probability: Tensor) -> Tensor:
    """-inf as -100: exp(-100) is as good as 0, and 0 * -100 is 0 where 0 * -inf is NaN, in the value and in the gradient."""
    log_probability = log_probability.float()
    return log_probability.masked_fill(log_probability == -math.inf, -100.0)


# ------------------------------------------------------------------------------------------------------ pairs of log-probabilities


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p || q) = sum_c p (log p - log q), at least 0. [N]

    Hinton, Vinyals, Dean 2015. It is the KL itself, 0 at a perfect match, not only the cross entropy to the teacher.
    """
    return F.kl_div(_finite(log_q), _finite(log_p), reduction="none", log_target=True).sum(-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) = sum_c q (log q - log p), at least 0. [N]

    Seeks a mode of the teacher where forward KL covers all of them (Gu et al. 2024, MiniLLM). Classes that the teacher rules out (-inf) are
    paid for at 100 nats: left out of the sum, the student would gain by putting mass there.
    """
    return F.kl_div(_finite(log_p), _finite(log_q), reduction="none", log_target=True).sum(-1)


def jsd(log_q: Tensor, log_p: Tensor, beta: float) -> Tensor:
    """JSD_beta / (beta (1 - beta)), at least 0, with JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. [N]

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD) goes to 0 with beta and 1 - beta. Divided by both it is
    KL(p || m) / (1 - beta) + KL(q || m) / beta: forward KL at beta 0, reverse KL at beta 1 without a jump, and four times the usual
    symmetric one at 1/2. It has a first derivative only.
    """
    log_q, log_p = _finite(log_q), _finite(log_p)
    with torch.no_grad():
        told = _mixed(log_q, log_p, beta, 1.0 - beta)
        value = -(told + _mixed(log_p, log_q, 1.0 - beta, beta)).sum(-1)
    # d value / d log q = -told. By hand, as a derivative through both forms of a log is NaN in places.
    return value - (told * (log_q - log_q.detach())).sum(-1)


def _mixed(log_a: Tensor, log_b: Tensor, share: float, rest: float) -> Tensor:
    """a * log(m / a) / share of the mixture m = share b + rest a, whose shares add up to 1. At share 0 its limit, b - a. [N, C]"""
    log_share, log_rest = _log(share), _log(rest)
    gap = log_b - log_a
    x = torch.exp(gap + log_share) - share  # m / a - 1
    near = (log_b.exp() - log_a.exp()) * torch.where(x == 0, 1.0, torch.log1p(x) / x)
    far = torch.exp(log_a - log_share) * torch.logaddexp(gap + log_share, torch.full_like(gap, log_rest))
    return torch.where(x.abs() > 0.5, far, near)  # where it is taken, the first factor of `far` is at most 2


def _log(share: float) -> float:
    return math.log(share) if share > 0 else -math.inf


def skewed_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q), from 0 to -log alpha. [N]

    Ko et al. 2024 (DistiLLM), who take alpha = 0.1: forward KL with a slope that stays bounded where q is next to 0.
    """
    log_q, log_p = _finite(log_q), _finite(log_p)
    return forward_kl(torch.logaddexp(log_p + _log(alpha), log_q + _log(1.0 - alpha)), log_p)


def skewed_reverse_kl(log_q: Tensor, log_p: Tensor, alpha: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q), from 0 to -log alpha. [N]

    Ko et al. 2024 (DistiLLM), who take alpha = 0.1: reverse KL with a slope that stays bounded where p is next to 0.
    """
    log_q, log_p = _finite(log_q), _finite(log_p)
    return reverse_kl(log_q, torch.logaddexp(log_p + _log(1.0 - alpha), log_q + _log(alpha)))


def adaptive_kl(log_q: Tensor, log_p: Tensor, head: float = 0.5) -> Tensor:
    """w KL(p || q) + (1 - w) KL(q || p), at least 0, where w is the share of the head in sum_c |p - q|. [N]

    Wu et al. 2024 (AKL). The head is the fewest most probable classes of the teacher that hold the mass `head`; forward KL fits it first,
    reverse KL the tail. w has no gradient.
    """
    with torch.no_grad():
        p, order = log_p.float().exp().sort(dim=-1, descending=True, stable=True)
        gap = (p - log_q.float().exp().gather(-1, order)).abs()
        before = p.cumsum(-1) - p
        # At a match both gaps are 0, and so are both divergences: any weight will do, but not 0 / 0.
        share = (gap * (before < head)).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)
    return share * forward_kl(log_q, log_p) + (1 - share) * reverse_kl(log_q, log_p)


def total_variation(log_q: Tensor, log_p: Tensor) -> Tensor:
    """1/2 sum_c |p - q|, between 0 and 1: the mass that would have to move. No unit. [N]"""
    return _absolute(log_q.float().exp() - log_p.float().exp()).sum(-1) / 2


def _absolute(gap: Tensor) -> Tensor:
    """|gap| of two probabilities, without a gradient where it is rounding: the sign of that is no direction, and as strong as any other."""
    return torch.where(gap.abs() > 4 * torch.finfo(gap.dtype).eps, gap, gap.detach()).abs()


def universal_logit(log_q: Tensor, log_p: Tensor) -> Tensor:
    """sum_r |p_(r) - q_(r)| of probabilities in descending order, the shorter list filled up with 0. Between 0 and 2, no unit. [N]

    Universal logit distillation (Boizard et al. 2024), for two vocabularies that have nothing to do with each other. log_q: [N, V1],
    log_p: [N, V2]. It compares how sure the two are, not of what.
    """
    q, p = (log.float().exp().sort(dim=-1, descending=True).values for log in (log_q, log_p))
    width = max(q.shape[-1], p.shape[-1])
    return _absolute(F.pad(q, (0, width - q.shape[-1])) - F.pad(p, (0, width - p.shape[-1]))).sum(-1)


def universal_topk(student: Tensor, teacher: Tensor) -> Tensor:
    """`universal_logit` where of the teacher only the k most probable classes are known, in descending order, and what all others have. [N]

    sum_{r <= k} |p_(r) - q_(r)| + |sum_{r > k} p_(r) - sum_{r > k} q_(r)|: never more than that of all classes, and 0 at a match.
    Log-probabilities: student [N, V]; teacher [N, k + 1], last the others.
    """
    k = teacher.shape[-1] - 1
    p, q = teacher.float().exp(), student.float().exp().topk(min(k, student.shape[-1]), dim=-1).values
    first = F.pad(q, (0, k - q.shape[-1]))
    return _absolute(first - p[:, :k]).sum(-1) + _absolute((1 - q.sum(-1)) - p[:, k])


# --------------------------------------------------------------------------------------- a few classes of a teacher, all of a student


def bucketed(s: Tensor, ids: Tensor, log_p: Tensor, temperature: float, log_normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """(log q, log p) of the teacher's k most probable classes and, last, of all others as one. Each [N, k + 1], sums to 1.

    s: [N, V] logits, of any float type. ids: int64 [N, k], distinct. log_p: [N, k] log-probabilities of the teacher at temperature 1.
    log_normaliser: [N], log sum_v p_v^(1/T) over the whole vocabulary, which takes those k to temperature T exactly; 0 at T = 1. An entry of
    log_p -inf is padding, whatever its id.

    The rest as one class is what makes a student pay for mass outside of the k: with both renormalised over them, one that keeps 3 % there
    has a loss of 0. A divergence of the two is that of the merged distributions, a lower bound of the one over all V. Where the k are all of
    V, the rest is -inf on both sides.
    """
    inside = log_p > -math.inf
    return picked(s, ids, inside, temperature, True), with_rest(log_p, temperature, log_normaliser, s.shape[-1])


def with_rest(log_p: Tensor, temperature: float, log_normaliser: Tensor, classes: int) -> Tensor:
    """The teacher's side of `bucketed`, of a vocabulary of so many classes: log p of the k and, last, of all others. [N, k + 1]"""
    told = log_p.float() / temperature - log_normaliser.float()[:, None]
    # Rounding may bring the sum to 1 and above it (stored in 16 bits). Kept just below, and made a distribution again.
    mass = told.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-7)
    rest = torch.log1p(-mass).masked_fill((log_p > -math.inf).sum(-1, keepdim=True) == classes, -math.inf)
    return F.log_softmax(torch.cat([told, rest], dim=-1), dim=-1)


def sampled_cross_entropy(s: Tensor, ids: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """-sum_i w_i log q(id_i), at least 0. [N]

    Targets drawn from the teacher at random (Anshumann et al. 2025, arXiv 2503.16870): over the draws the mean of the value, and of its
    gradient, is that of the cross entropy to the whole of p. It is not 0 at a match but an estimate of the teacher's entropy.
    s: [N, V]. ids: int64 [N, k], the same one twice or once with both weights. weights: [N, k] = p / r of proposal r, 1 a row in sum;
    0 is padding, whatever its id.
    """
    inside = weights > 0
    log_q = picked(s, ids, inside, temperature, False).masked_fill(~inside, 0.0)
    return -(weights.float() * log_q).sum(-1)


# ------------------------------------------------------------------------------------------------------------------------ raw logits


def l2_distil(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """sum_c (q - p)^2, between 0 and 2, no unit. [N]

    Not scaled by T: its gradient shrinks with 1/T, and with it wherever both are sure.
    """
    p = F.softmax(t.float() / temperature, dim=-1)
    q = F.softmax(s.float() / temperature, dim=-1)
    return (q - p).square().sum(-1)


def logit_mse(s: Tensor, t: Tensor) -> Tensor:
    """mean_c ((s - mean s) - (t - mean t))^2, in squared logits. [N]

    Logits are centred because adding a constant to all of them changes no probability (Ba and Caruana 2014 match raw logits).
    """
    s, t = s.float(), t.float()
    return ((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))).square().mean(-1)


def squared_error(s: Tensor, t: Tensor) -> Tensor:
    """sum_c (s - t)^2 of a regression of C numbers, in their squared unit. [N]"""
    return (s.float() - t.float()).square().sum(-1)


def standardised_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(z(t) / T) || softmax(z(s) / T)), z(x) = (x - mean x) / sqrt(var x + 1e-7) of each row, population variance. [N]

    Logit standardisation (Sun et al. 2024, CVPR): the student matches the ranking and the relative gaps, not the size of the logits, which a
    small one cannot reach. The epsilon stands in the root, so that a row of equal logits has a gradient.
    """
    s, t = (F.layer_norm(x.float(), x.shape[-1:], eps=1e-7) for x in (s, t))
    return temperature**2 * forward_kl(soften(s, temperature), soften(t, temperature))


def decoupled_kd(s: Tensor, t: Tensor, labels: Tensor, temperature: float, alpha: float, beta: float) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD), at least 0. [N]

    Decoupled knowledge distillation (Zhao et al. 2022). TCKD: KL of (p_y, 1 - p_y), the target class against all others. NCKD: KL among the
    other classes, each side renormalised over them; KL itself would weigh it by 1 - p_y. With alpha 1 and beta 1 - p_y it is forward KL.
    labels: int64 [N]. Where a label is negative (none is known), the teacher's most probable class is the target.
    """
    target = torch.where(labels < 0, t.argmax(-1), labels)[:, None]
    (pair_q, other_q), (pair_p, other_p) = _decoupled(soften(s, temperature), target), _decoupled(soften(t, temperature), target)
    return temperature**2 * (alpha * forward_kl(pair_q, pair_p) + beta * forward_kl(other_q, other_p))


def _decoupled(log_p: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """log (p_y, 1 - p_y) [N, 2], and log-probabilities among the classes that are not the target, which has -inf [N, C]."""
    others = log_p.scatter(-1, target, -math.inf)
    rest = others.logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(-1, target), rest], dim=-1), others - rest


def binary_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T^2 sum_c KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))), at least 0: C labels that may hold together. [N]

    T^2 as of Hinton, Vinyals, Dean 2015. At a high T the slope is (s - t) / 4 for each label, a quarter from the sigmoid.
    """
    log_q, log_p = (F.logsigmoid(torch.stack([x, -x], dim=-1).float() / temperature) for x in (s, t))
    return temperature**2 * forward_kl(log_q, log_p).sum(-1)


def dist_inter(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """1 - Pearson correlation of q and p over the classes, between 0 and 2, no unit. [N] of [N, C], or [..] of [.., C]

    DIST (Huang et al. 2022), inter-class relation. A correlation does not change with the scale of q - 1/C, so its gradient does not fall
    with T, and no power of T is multiplied with (the authors' code multiplies T^2; their T is 1).
    """
    return _uncorrelated(F.softmax(s.float() / temperature, dim=-1), F.softmax(t.float() / temperature, dim=-1))


def dist_intra(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """mean_c (1 - Pearson correlation of q_c and p_c over the rows of a group), between 0 and 2, no unit. [G] of [G, g, C]

    DIST (Huang et al. 2022), intra-class relation: which of the g rows has more of a class. 0 for a group of one row.
    """
    q, p = (F.softmax(x.float() / temperature, dim=-1).transpose(1, 2) for x in (s, t))
    return _uncorrelated(q, p).mean(-1)


def _uncorrelated(a: Tensor, b: Tensor) -> Tensor:
    """1 - Pearson correlation over the last dimension; 0 where b, the teacher's, is constant and there is nothing to follow."""
    a, b = _standing_out(a), _standing_out(b)
    return torch.where((b != 0).any(-1), 1 - (a * b).sum(-1), 0.0)


def _standing_out(x: Tensor) -> Tensor:
    """x - mean x as a unit vector, 0 with a gradient of 0 where x is constant up to its rounding."""
    centred = x - x.mean(-1, keepdim=True)
    square = centred.square().sum(-1, keepdim=True)
    varies = square > 1e-12 * x.square().sum(-1, keepdim=True)
    return centred * torch.where(varies, square, math.inf).rsqrt()
