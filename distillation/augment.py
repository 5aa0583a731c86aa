"""Inputs that no corpus has: mixed and masked ones. Only a live teacher can say anything about them.

What is done to a row depends on the seed, the step and its id alone, so it is the same however a batch is cut.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from distillation.config import AugmentConfig, DrawMasks, Mixup
from distillation.documents import hide
from distillation.signals import Batch

PARTNER, SHARE = "partner", "share"
"""Of a mixed batch's inputs: number of the row that each is mixed with, and how much of itself stays. `Network` mixes what models embed."""


def augment(batch: Batch, config: AugmentConfig, mask: int, seed: int, step: int, ordinary: np.ndarray | None = None) -> Batch:
    """mask: id of the token that hides another. ordinary: ids of the tokens that `DrawMasks` may hide."""
    if isinstance(config, Mixup):
        return _mixed(batch, config, seed, step)
    if isinstance(config, DrawMasks):
        assert ordinary is not None
        return _drawn(batch, mask, ordinary, seed, step)
    generators = [_generator(seed, step, id_) for id_ in batch.ids]
    hidden = torch.zeros(int(batch.lengths.sum()), dtype=torch.bool)
    ends = torch.cumsum(batch.lengths, 0).tolist()
    for end, length, generator in zip(ends, batch.lengths.tolist(), generators, strict=True):
        # Not the first and the last token: those of a text are its frame.
        hidden[end - length + 1 : end - 1] = torch.from_numpy(generator.random(max(0, length - 2)) < config.share)
    input_ids = batch.inputs["input_ids"].clone()
    input_ids.view(-1)[batch.tokens[hidden.to(batch.tokens.device)]] = mask
    return replace(batch, inputs={**batch.inputs, "input_ids": input_ids})


def _drawn(batch: Batch, mask: int, ordinary: np.ndarray, seed: int, step: int) -> Batch:
    """Each row put together again, and as many of its tokens hidden as were."""
    device, flat = batch.scored.device, batch.inputs["input_ids"].flatten().clone()
    flat[batch.scored] = batch.labels
    tokens, labels, scored = flat[batch.tokens].cpu().numpy(), [], []
    ends = np.cumsum(batch.lengths.cpu().numpy())
    for id_, end, length, count in zip(batch.ids, ends, batch.lengths.tolist(), batch.positions.tolist(), strict=True):
        row, name = tokens[end - length : end].copy(), hashlib.sha256(f"{seed} {step} {id_}".encode()).hexdigest()[:32]
        free = np.flatnonzero(np.isin(row, ordinary))
        tokens[end - length : end], places = hide(row, free, count / len(free), name, mask, ordinary)
        labels.append(row[places])
        scored.append(end - length + places)
    flat[batch.tokens] = torch.from_numpy(tokens).to(device)
    inputs = {**batch.inputs, "input_ids": flat.view_as(batch.inputs["input_ids"])}
    chosen = torch.from_numpy(np.concatenate(scored)).to(device)
    return replace(batch, inputs=inputs, scored=batch.tokens[chosen], labels=torch.from_numpy(np.concatenate(labels)).to(device))


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
