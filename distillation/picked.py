"""Log-probabilities of a few classes out of a whole vocabulary, at the memory of a few rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_CELLS = 1 << 22
"""Logits that are worked on at once: 16 MiB in fp32."""


def picked(s: Tensor, ids: Tensor, inside: Tensor, temperature: float, rest: bool) -> Tensor:
    """log q of `ids` (-inf where not `inside`) and, with `rest`, of all classes that are not among them. [N, k] or [N, k + 1]

    q = softmax(s / T). s: [N, V] logits of any float type. ids: int64 [N, k]. inside: bool [N, k]; where it is False, any id. In nats, fp32,
    with a first derivative with respect to s.
    """
    found: Tensor = _Picked.apply(s, ids.clamp(0, s.shape[-1] - 1), inside, temperature, rest)  # type: ignore[no-untyped-call]
    return found


class _Picked(torch.autograd.Function):
    """Keeps s as it came for the backward pass, neither cast nor divided, and works on blocks of `_CELLS`.

    log_softmax of [N, V] would hold a second [N, V] in fp32 until the backward pass (2.5 GB for 4,096 positions of 152k tokens), s / T a
    third. The rest is summed by itself: as 1 - sum_K q it would be rounding alone, without a gradient, where a student is surest.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, ids: Tensor, inside: Tensor, temperature: float, rest: bool) -> Tensor:
        n, k = ids.shape
        log_q = torch.empty(n, k + rest, dtype=torch.float32, device=s.device)
        whole, others = log_q.new_empty(n), log_q.new_empty(n)
        for rows in _blocks(s):
            x = _scaled(s[rows], temperature)
            whole[rows] = x.logsumexp(-1)
            log_q[rows, :k] = x.gather(-1, ids[rows]) - whole[rows, None]
            if rest:
                others[rows] = _without(x, ids[rows], inside[rows]).logsumexp(-1)
                log_q[rows, k] = others[rows] - whole[rows]
        log_q[:, :k].masked_fill_(~inside, -math.inf)
        ctx.save_for_backward(s, ids, inside, whole, others)
        ctx.temperature, ctx.rest = temperature, rest
        return log_q

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        s, ids, inside, whole, others = ctx.saved_tensors
        k = ids.shape[1]
        each = slope[:, :k].masked_fill(~inside, 0.0)
        last = slope[:, k].masked_fill(others == -math.inf, 0.0) if ctx.rest else each.new_zeros(len(ids))
        total = each.sum(-1) + last
        others = others.masked_fill(others == -math.inf, 0.0)  # nothing there: exp(-inf - 0) is the share of each, 0
        gradient = torch.empty_like(s)
        for rows in _blocks(s):
            x = _scaled(s[rows], ctx.temperature)
            pulled = torch.exp(x - whole[rows, None]).mul_(-total[rows, None])
            pulled.scatter_add_(-1, ids[rows], each[rows])
            if ctx.rest:
                x = _without(x, ids[rows], inside[rows])
                pulled.addcmul_(x.sub_(others[rows, None]).exp_(), last[rows, None])
            gradient[rows] = pulled.div_(ctx.temperature)
        return gradient, None, None, None, None


def _scaled(s: Tensor, temperature: float) -> Tensor:
    """s / T less the largest of each row, which changes no probability: the difference of two big numbers would be one of roundings. [n, V]"""
    x = s.float() / temperature
    return x.sub_(x.amax(-1, keepdim=True))


def _without(x: Tensor, ids: Tensor, inside: Tensor) -> Tensor:
    """x, in place, with -inf at those `ids` that are `inside`. Added, so that padding of the same id changes nothing. [n, V]"""
    return x.scatter_add_(-1, ids, torch.zeros_like(ids, dtype=x.dtype).masked_fill_(inside, -math.inf))


def _blocks(s: Tensor) -> Iterator[slice]:
    step = max(1, _CELLS // s.shape[1])
    return (slice(start, start + step) for start in range(0, len(s), step))
