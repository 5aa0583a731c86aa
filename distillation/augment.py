"""Inputs that no corpus has: mixed and masked ones. Only a live teacher can say anything about them.

What is done to a row depends on the seed, the step and its id alone, so it is the same however a batch is cut.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from distillation.config import AugmentConfig, Mixup
from distillation.signals import Batch

PARTNER, SHARE = "partner", "share"
"""Of a mixed batch's inputs: number of the row that each is mixed with, and how much of itself stays. `Network` mixes what models embed."""


def augment(batch: Batch, config: AugmentConfig, mask: int, seed: int, step: int) -> Batch:
    """mask: id of the token that hides another."""
    if isinstance(config, Mixup):
        return _mixed(batch, config, seed, step)
    generators = [_generator(seed, step, id_) for id_ in batch.ids]
    hidden = torch.zeros(int(batch.lengths.sum()), dtype=torch.bool)
    ends = torch.cumsum(batch.lengths, 0).tolist()
    for end, length, generator in zip(ends, batch.lengths.tolist(), generators, strict=True):
        # Not the first and the last token: those of a text are its frame.
        hidden[end - length + 1 : end - 1] = torch.from_numpy(generator.random(max(0, length - 2)) < config.share)
    input_ids = batch.inputs["input_ids"].clone()
    input_ids.view(-1)[batch.tokens[hidden.to(batch.tokens.device)]] = mask
    return replace(batch, inputs={**batch.inputs, "input_ids": input_ids})


def _generator(seed: int, step: int, id_: str) -> np.random.Generator:
    return np.random.default_rng([seed, step, *id_.encode()[:32]])


def _mixed(batch: Batch, config: Mixup, seed: int, step: int) -> Batch:
    """Each row with its neighbour: 0 with 1, 2 with 3; one that is left over stays alone. Both of a pair draw the same share."""
    count = len(batch.ids)
    partner = np.arange(count) ^ 1
    partner[partner >= count] = count - 1
    first = [batch.ids[min(i, other)] for i, other in enumerate(partner)]
    drawn = np.array([_generator(seed, step, id_).beta(config.alpha, config.alpha) for id_ in first])
    share = np.maximum(drawn, 1 - drawn)  # more of the row itself than of the other
    share[partner == np.arange(count)] = 1.0
    device = batch.scored.device
    extra = {PARTNER: torch.from_numpy(partner).to(device), SHARE: torch.from_numpy(share).float().to(device)}
    return replace(batch, inputs={**batch.inputs, **extra}, partner_labels=batch.labels[extra[PARTNER]], share=extra[SHARE])
