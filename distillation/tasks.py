"""What a task is: how text becomes tokens, rows become a batch, and answers become a score. One class a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillation.config import TaskConfig, TextClassification
from distillation.signals import UNLABELLED, Batch, Outputs, TeacherSignal


class TextClassificationTask:
    """A label for each text; a scored position is a row."""

    def __init__(self, config: TextClassification, pad_id: int) -> None:
        self.config, self.pad_id = config, pad_id

    def collate(self, ids: list[str], tokens: Sequence[np.ndarray], labels: np.ndarray, signal: TeacherSignal) -> Batch:
        """tokens: one array of ids per row. labels: [B], negative where there is none."""
        lengths = np.fromiter((len(row) for row in tokens), np.int64, len(tokens))
        input_ids = np.full((len(tokens), int(lengths.max())), self.pad_id, np.int64)
        mask = np.arange(input_ids.shape[1]) < lengths[:, None]
        input_ids[mask] = np.concatenate(tokens)
        known = np.where(labels < 0, UNLABELLED, labels).astype(np.int64)
        return Batch(ids, torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64)), torch.from_numpy(known), signal)

    def score(self, outputs: Outputs, batch: Batch) -> dict[str, tuple[Tensor, int]]:
        """Sums over scored positions and their number, for means over a split however it is cut.

        accuracy and nll (nats) over labelled rows; agreement and kl (nats, temperature 1) over rows the teacher answered.
        """
        logits = outputs.logits.float()
        log_q, answers, labelled = logits.log_softmax(-1), logits.argmax(-1), batch.labels != UNLABELLED
        count = int(labelled.sum())
        picked = log_q[labelled].gather(1, batch.labels[labelled, None]).sum()
        sums = {"accuracy": ((answers == batch.labels)[labelled].sum(), count), "nll": (-picked, count)}
        if batch.signal.logits is not None:
            log_p = batch.signal.logits.float().log_softmax(-1)
            sums["agreement"] = ((answers == log_p.argmax(-1)).sum(), len(answers))
            sums["kl_to_teacher"] = ((log_p.exp() * (log_p - log_q)).sum(), len(answers))
        return sums


TASKS: Mapping[str, Any] = {"text_classification": TextClassificationTask}


def build_task(config: TaskConfig, pad_id: int) -> TextClassificationTask:
    task: TextClassificationTask = TASKS[config.type](config, pad_id)
    return task
