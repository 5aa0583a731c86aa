"""Balanced terms of a loss: their weight says how hard they pull beside another one, and what that comes to is measured now and then.

Measured on the batch of a step, over all its pieces and ranks, before it is learned from: so it does not depend on how a step is cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

MOST = 1e4
"""Times that a term is multiplied at most: one that has next to no gradient left is not made to shout."""


def due(losses: Mapping[str, Any], step: int) -> list[str]:
    """Terms that are measured at a step, counted from 0."""
    return [name for name, loss in losses.items() if loss.balance is not None and step % loss.balance.every == 0]


def to_measure(losses: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """The terms whose gradients are needed for that: these, at weight 1, and those that they are balanced to, as they are."""
    others = {losses[name].balance.to for name in names}
    return {
        name: loss.model_copy(update={"weight": 1.0}) if name in names else loss
        for name, loss in losses.items()
        if name in {*names, *others}
    }


def measured(
    losses: Mapping[str, Any], names: list[str], squares: Mapping[str, float], counts: Mapping[str, int], before: Mapping[str, float]
) -> dict[str, float]:
    """Factor of each of these terms at which it pulls as hard as the one that it is balanced to; one that cannot be told stays as it was, or 1.

    squares: of the norms of the gradients of `to_measure`, of the whole step. counts: what each term scores in it.
    """
    found = {}
    for name in names:
        other = losses[name].balance.to
        tells = counts[other] and counts[name] and squares[name] > 0
        found[name] = min(MOST, math.sqrt(squares[other] / squares[name])) if tells else before.get(name, 1.0)
    return found


def balanced(losses: Mapping[str, Any], factors: Mapping[str, float]) -> dict[str, Any]:
    """The terms with the weights that they have by these factors."""
    return {
        name: loss if loss.balance is None else loss.model_copy(update={"weight": loss.weight * factors[name]})
        for name, loss in losses.items()
    }
