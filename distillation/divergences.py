"""Distances between what a teacher and a student say. Pure functions of logits, one value per scored position, computed in fp32.

Shapes: N scored positions, C classes. Arguments are logits at temperature 1: t of the teacher, s of the student. T is the temperature,
p = softmax(t / T), q = softmax(s / T). No reduction over N here: the loop divides by the scored positions of the whole step.
"""

from __future__ import annotations

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
