"""Distances between what a teacher and a student say. Pure functions of logits, one value per scored position, computed in fp32.

Shapes: N scored positions, C classes. Arguments are logits at temperature 1: t of the teacher, s of the student. T is the temperature,
p = softmax(t / T), q = softmax(s / T). No reduction over N here: the loop divides by the scored positions of the whole step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def forward_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T^2 * sum_c p (log p - log q), in nats. [N]

    T^2 keeps the size of the gradient as T changes (Hinton, Vinyals, Dean 2015, section 2). It is the KL itself, 0 at a perfect match,
    not only the cross entropy to the teacher.
    """
    log_p = F.log_softmax(t.float() / temperature, dim=-1)
    log_q = F.log_softmax(s.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def reverse_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """T^2 * sum_c q (log q - log p), in nats. [N]

    Seeks a mode of the teacher where forward KL covers all of them (Gu et al. 2024, MiniLLM). Logits must be finite.
    """
    log_p = F.log_softmax(t.float() / temperature, dim=-1)
    log_q = F.log_softmax(s.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)


def jsd(s: Tensor, t: Tensor, temperature: float, beta: float) -> Tensor:
    """T^2 * JSD_beta / (beta (1 - beta)), in nats, with JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q. [N]

    The generalised Jensen-Shannon divergence (Agarwal et al. 2024, GKD) goes to 0 with beta and 1 - beta. Divided by both it is
    KL(p || m) / (1 - beta) + KL(q || m) / beta: forward KL at beta 0, reverse KL at beta 1 without a jump, and four times the usual
    symmetric one at 1/2. Logits must be finite. It has a first derivative only, and with respect to s alone.
    """
    with torch.no_grad():
        log_p = F.log_softmax(t.float() / temperature, dim=-1)
        log_q = F.log_softmax(s.float() / temperature, dim=-1)
        told = _mixed(log_q, log_p, beta, 1.0 - beta)
        value = -(told + _mixed(log_p, log_q, 1.0 - beta, beta)).sum(-1)
        # d value / d q = -told / q, from there through the softmax. By hand, as a derivative through both forms of a log is NaN in places.
        slope = (log_q.exp() * told.sum(-1, keepdim=True) - told) / temperature
    s = s.float()
    return temperature**2 * (value + (slope * (s - s.detach())).sum(-1))


def _mixed(log_a: Tensor, log_b: Tensor, share: float, rest: float) -> Tensor:
    """a * log(m / a) / share of the mixture m = share b + rest a, whose shares add up to 1. At share 0 its limit, b - a. [N, C]"""
    log_share, log_rest = (math.log(part) if part > 0 else -math.inf for part in (share, rest))
    gap = log_b - log_a
    x = torch.exp(gap + log_share) - share  # m / a - 1
    near = (log_b.exp() - log_a.exp()) * torch.where(x == 0, 1.0, torch.log1p(x) / x)
    far = torch.exp(log_a - log_share) * torch.logaddexp(gap + log_share, torch.full_like(gap, log_rest))
    return torch.where(x.abs() > 0.5, far, near)  # where it is taken, the first factor of `far` is at most 2


def l2_distil(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """sum_c (q - p)^2, between 0 and 2. [N]

    Not scaled by T: its gradient shrinks with 1/T, and with it wherever both are sure.
    """
    p = F.softmax(t.float() / temperature, dim=-1)
    q = F.softmax(s.float() / temperature, dim=-1)
    return (q - p).square().sum(-1)


def logit_mse(s: Tensor, t: Tensor) -> Tensor:
    """mean_c ((s - mean s) - (t - mean t))^2. [N]

    Logits are centred because adding a constant to all of them changes no probability (Ba and Caruana 2014 match raw logits).
    """
    s, t = s.float(), t.float()
    return ((s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))).square().mean(-1)


def pkd(student: Tensor, teacher: Tensor) -> Tensor:
    """sum_l || a / |a| - b / |b| ||^2 over layer pairs, each between 0 and 4. student, teacher: [N, L, H]. [N]

    Patient knowledge distillation on the first token (Sun et al. 2019, equation 7).
    """
    return (F.normalize(student.float(), dim=-1) - F.normalize(teacher.float(), dim=-1)).square().sum((-1, -2))
