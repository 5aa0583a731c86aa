"""The one loop: teacher training, distillation and baseline are this with other losses. Plain torch behind a small `Session`.

Everything that happens at a step is a function of (seed, step): rows, learning rate, dropout. So a run that was stopped goes on as if it
had not been, and the position is the whole state besides weights and optimizer.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distillation import windows
from distillation.augment import augment
from distillation.balance import balanced, due, measured, to_measure
from distillation.batches import cut, share, sorted_batches
from distillation.checkpoints import Checkpoints, Position
from distillation.config import ONLY, LossConfig, TrainingConfig, only_labels
from distillation.curves import Curve
from distillation.errors import DivergedError
from distillation.losses import at, gradient_squares, unit_of, weigh
from distillation.models import use_bf16
from distillation.network import mixed
from distillation.rows import Rows, Split
from distillation.schedule import GlobalBatch, schedule, together_of
from distillation.sharding import gathered, release
from distillation.signals import Batch, Outputs, TeacherSignal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Session(Protocol):
    """Where a process stands among those that train together, and how it speaks to the outside."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None
    """Replicas x shards of workers that hold one model together, see `sharding`; None: each holds the whole."""

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module with gradients averaged over all ranks."""

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all ranks."""

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        """Hand over points of learning curves; called on every rank, those of rank 0 count."""

    def leave(self, step: int) -> bool:
        """Whether all ranks are to save after the next step and leave, so that another group goes on. Called in step, with the steps done."""


class Left(Exception):
    """A group was asked to leave: what it did is saved, and its work is not done."""


class LocalSession:
    """A plain process of its own. What is reported is kept in `history`."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank, self.world_size, self.device = 0, 1, torch.device(device)
        self.mesh: DeviceMesh | None = None
        self.history: list[tuple[int, dict[str, float]]] = []

    def wrap(self, module: nn.Module) -> nn.Module:
        return module

    def all_reduce(self, values: Tensor) -> Tensor:
        return values

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        self.history.append((step, dict(metrics)))

    def leave(self, step: int) -> bool:
        return False


def learning_rate(step: int, total: int, training: TrainingConfig) -> float:
    """Of the update that ends step `step` (0-based) out of `total`: linear warm-up, then decay to 0."""
    warmup = math.ceil(training.warmup * total)
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    factor = {"linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2, "constant": 1.0}[training.decay]
    return training.learning_rate * factor


def make_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and other vectors are not decayed."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=training.learning_rate, fused=True)


class Work(NamedTuple):
    """What a rank does of a step."""

    rows: Rows
    pieces: list[np.ndarray]
    """Its microbatches; there is one at least."""
    mine: int
    """How many of them count."""
    counts: dict[str, int]
    """What each term scores in the global batch, over all ranks, as the next two."""
    size: int
    """Rows."""
    tokens: int


@dataclass
class Fit:
    """One training run in one process."""

    module: nn.Module
    split: Split
    validation: Split | None
    losses: Mapping[str, LossConfig]
    training: TrainingConfig
    session: Session
    checkpoints: Checkpoints | None
    rungs: Sequence[int] = ()
    """Rows seen after which the validation split is scored, whatever training.evaluate_every says."""
    save_rungs: bool = False
    """Checkpoint at the rungs, too. A checkpoint is committed before the score at its step is reported."""
    live: Mapping[str, Callable[[Batch], TeacherSignal]] = field(default_factory=dict)
    """Teachers that are asked about every batch, besides those whose answers come with the rows."""
    features_at: str = "scored"
    """Where hidden states are compared."""
    lead: str = ONLY
    """Teacher that scores compare with."""

    def run(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one. Returns the last validation metrics and totals.

        Raises DivergedError at the first loss or gradient that is not finite; weights are those of the step before. Raises Left.
        """
        with contextlib.ExitStack() as self._ending:
            if self.checkpoints is not None:
                self._ending.callback(self.checkpoints.wait)
            return self._train()

    def _train(self) -> dict[str, float]:
        training, session, self._task = self.training, self.session, self.split.task
        self._together = together_of(self.losses, training)
        labelled, ranks = only_labels(self.losses), {"rank": session.rank, "world_size": session.world_size}
        plan = schedule(self.split, training, labelled=labelled, together=self._together, **ranks)
        self._ending.callback(plan.close)
        if self.validation is not None:
            # Of many parts each rank scores its own.
            parts, (rank, size) = self.validation.parts, (session.rank, session.world_size)
            self._scored_alone = len(parts) > windows.PARTS and len(parts) >= size
            self._scored = self.validation.open(range(rank, len(parts), size)) if self._scored_alone else self.validation.whole
        rungs = {plan.step_of(rows) for rows in self.rungs}
        if session.mesh is None:  # a part is there already
            self.module.to(session.device)
        optimizer = make_optimizer(self.module, training)
        position = Position(0, 0, 0)
        if self.checkpoints is not None:
            position = self.checkpoints.restore(self.module, optimizer, session) or position
        self._wrapped = session.wrap(self.module)
        self._norms = [module for module in self.module.modules() if isinstance(module, _BatchNorm)]
        self._bf16 = use_bf16(training.precision, session.device)
        curve = Curve(self.losses, session)
        self.history: list[tuple[int, dict[str, float]]] = self.checkpoints.history if self.checkpoints is not None else []
        self._factors: dict[str, float] = self.checkpoints.factors if self.checkpoints is not None else {}
        for step, metrics in self.history:  # the process that reported them may have died before they arrived
            session.report(metrics, step)
        latest: dict[str, float] = {}
        started, first = time.perf_counter(), position.step
        while position.step < plan.total:
            position = plan.locate(position)
            batch = plan.batch(position)
            rate, step = learning_rate(position.step, plan.total, training), position.step + 1
            last, rung = step == plan.total, step in rungs
            leaving = session.leave(position.step) and not last
            every = training.checkpoint_every if self.checkpoints is not None else 0
            held = rung and self.save_rungs and self.checkpoints is not None
            saving = held or leaving or bool(every and step % every == 0 and not last)
            # A point at every checkpoint too: what is added up between two points is not part of one.
            reporting = step % training.log_every == 0 or last or saving or rung
            now = self._balanced(at(self.losses, position.step / plan.total), batch, position.step)
            sums, squares, work, norm = self._step(optimizer, batch, position.step, now, rate, reporting)
            position = Position(step, position.epoch, position.step_in_epoch + 1)
            curve.add(sums, work.counts, work.size, work.tokens)
            points: list[dict[str, float]] = []
            if reporting:
                point = curve.take(squares, now)
                points.append({**point, **plan.seen(step), "train/learning_rate": rate, "train/gradient_norm": norm})
            if self.validation is not None and (last or rung or (training.evaluate_every and step % training.evaluate_every == 0)):
                paused = time.perf_counter()
                latest = self.evaluate()
                self._require_finite(latest, step)
                points.append({**latest, **plan.seen(step)})
                curve.pause(time.perf_counter() - paused)
            self.history += [(step, point) for point in points]
            if self.checkpoints is not None and saving:
                self.checkpoints.save(self.module, optimizer, position, session)
            if self.checkpoints is not None and held:
                self.checkpoints.close()
            for point in points:
                session.report(point, step)
            if leaving and self.checkpoints is not None:
                self.checkpoints.close()
                raise Left
        if self.checkpoints is not None:
            self.checkpoints.close()
        return {**latest, "steps": plan.total, "resumed_at": first, "seconds": time.perf_counter() - started}

    def _step(
        self, optimizer: torch.optim.Optimizer, rows: GlobalBatch, step: int, losses: Mapping[str, Any], rate: float, reporting: bool
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Work, float]:
        """One optimizer step on a global batch.

        Returns this rank's raw sums and, if it is reported, squared gradients of the terms; what there was to do, and the gradient norm.
        """
        training, session, work = self.training, self.session, self._work(rows, losses)
        torch.manual_seed(hash((training.seed, step, session.rank)) % 2**31)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {name: torch.zeros((), device=session.device) for name in self.losses}
        squares = sums
        # A rank without rows still takes part in the exchange of gradients: it computes one row that counts nothing.
        for number, piece in enumerate(work.pieces):
            counted, batch = number < work.mine, self._batch(work.rows, piece, step)
            for each in self._norms:  # there is no mean and deviation of one
                each.train(len(piece) > 1)
            with self._without_exchange(number < len(work.pieces) - 1):
                with torch.autocast(session.device.type, torch.bfloat16, enabled=self._bf16):
                    outputs = self._forward(self._wrapped, batch)
                loss, raw = weigh(losses, outputs, batch, work.counts)
                # Gradients are averaged over ranks; the loss is a sum over them.
                (loss * (session.world_size if counted else 0)).backward()  # type: ignore[no-untyped-call]
            if counted:
                sums = {name: sums[name] + raw[name] for name in sums}
            if counted and reporting:
                squares = {name: squares[name] + value for name, value in gradient_squares(losses, outputs, batch, work.counts).items()}
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = float(gathered(total))
        if not math.isfinite(norm):
            self._diverged(rows, step, sums)
        if norm > training.clip:  # asked first: scaling by 1 would touch every gradient for nothing
            torch.nn.utils.clip_grads_with_norm_(parameters, training.clip, total)
        if work.size:
            optimizer.step()
        return sums, squares, work, norm

    def _work(self, batch: GlobalBatch, losses: Mapping[str, Any]) -> Work:
        rows, session, lengths = batch.rows, self.session, batch.rows.lengths
        units = [unit_of(loss, self.features_at) for loss in losses.values()]
        told = [len(batch.numbers), int(lengths[batch.numbers].sum()), *(rows.count(batch.numbers, unit) for unit in units)]
        # A shard of a model computes as often as the other shards do.
        ranks = range(session.world_size) if batch.whole and session.mesh is not None else [session.rank]
        found = {rank: self._pieces(batch, rank) for rank in ranks}
        mine, rounds = found[session.rank], [len(pieces) for pieces in found.values()]
        if not batch.whole:
            exact = session.all_reduce(
                torch.cat([torch.tensor(told, dtype=torch.float64), self._slot(len(mine))]).to(session.device)
            ).tolist()
            told = [int(value) for value in exact[: len(told)]]
            rounds = [int(value) for value in exact[len(told) :]] if session.mesh is not None else rounds
        size, tokens, *counts = told
        idle = batch.numbers[:1] if batch.whole else np.zeros(1, np.int64)  # any row: it counts nothing
        pieces = mine + [idle] * (max([1, *rounds]) - len(mine))
        return Work(rows, pieces, len(mine), dict(zip(losses, counts, strict=True)), size, tokens)

    def _slot(self, value: int) -> Tensor:
        """This rank's number among those of all: added up over the ranks it holds every one. [ranks] fp64"""
        slots = torch.zeros(self.session.world_size, dtype=torch.float64)
        slots[self.session.rank] = value
        return slots

    def _pieces(self, batch: GlobalBatch, rank: int) -> list[np.ndarray]:
        """A rank's share of a global batch, in microbatches."""
        its, lengths = batch.numbers, batch.rows.lengths
        if batch.whole:
            its = share(its, lengths[its], rank, self.session.world_size, self._together)
        return cut(its, lengths[its], self.training.microbatch_tokens, self._together)

    def _batch(self, rows: Rows, piece: np.ndarray, step: int) -> Batch:
        batch = rows.batch(piece).to(self.session.device)
        if self.training.augment is not None:
            batch = augment(batch, self.training.augment, self._task.mask, self.training.seed, step, self._task.ordinary)
        return self._told(batch)

    def _balanced(self, losses: Mapping[str, Any], rows: GlobalBatch, step: int) -> Mapping[str, Any]:
        """The terms of a step, with weights that are measured on its batch where that is due."""
        if names := due(losses, step):
            terms = to_measure(losses, names)
            work, found = self._work(rows, terms), torch.zeros(len(terms), dtype=torch.float64, device=self.session.device)
            torch.manual_seed(hash((self.training.seed, step, self.session.rank)) % 2**31)
            for each in self._norms:  # looked at, not learned from
                each.eval()
            for number, piece in enumerate(work.pieces):
                batch = self._batch(work.rows, piece, step)
                with torch.no_grad(), mixed([self.module], self._bf16, self.session.device):
                    outputs = self._forward(self.module, batch)
                if number >= work.mine:
                    continue
                squares = gradient_squares(terms, outputs, batch, work.counts)
                found += torch.stack([squares[name].double() for name in terms])
            release(self.module)
            total = dict(zip(terms, self.session.all_reduce(found).tolist(), strict=True))
            self._factors.update(measured(losses, names, total, work.counts, self._factors))
        return balanced(losses, self._factors)

    def _forward(self, module: nn.Module, batch: Batch) -> Outputs:
        outputs: Outputs = module(batch.inputs, batch.scored, batch.tokens, batch.lengths, batch.signal.pooled)
        return outputs

    def _told(self, batch: Batch) -> Batch:
        """The batch with what the live teachers say about it."""
        if not self.live:
            return batch
        said = {**batch.signals, **{name: ask(batch) for name, ask in self.live.items()}}
        return replace(batch, signals=dict(sorted(said.items(), key=lambda pair: pair[0] != self.lead)))

    def _without_exchange(self, on: bool) -> contextlib.AbstractContextManager[None]:
        return self._wrapped.no_sync() if on and isinstance(self._wrapped, DistributedDataParallel) else contextlib.nullcontext()

    def _diverged(self, batch: GlobalBatch, step: int, sums: Mapping[str, Tensor]) -> None:
        ids, whose = batch.rows.ids(batch.numbers), "" if batch.whole else f" of worker {self.session.rank}"
        rows = f", rows{whose} {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}" if ids else ""
        terms = ", ".join(f"{name}={float(value):g}" for name, value in sums.items())
        raise DivergedError(
            "DST-4001", "loss or gradient is no longer finite", where=f"step {step + 1}{rows}",
            expected="finite numbers", found=f"gradient of loss terms {terms}",
            do="Lower training.learning_rate, raise training.warmup, or look at these rows; the last checkpoint is kept",
        )  # fmt: skip

    def _require_finite(self, scores: Mapping[str, float], step: int) -> None:
        if odd := [name for name, value in scores.items() if not math.isfinite(value)]:
            raise DivergedError(
                "DST-4001", "loss or gradient is no longer finite", where=f"evaluation after step {step}", expected="finite numbers",
                found=", ".join(f"{name}={scores[name]}" for name in odd),
                do="Lower training.learning_rate, raise training.warmup, or look at the rows of the validation split",
            )  # fmt: skip

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Means over the validation split, `validation/NAME`, over all ranks."""
        self.module.eval()
        session, task, rows = self.session, self._task, self._scored
        sums = torch.zeros(len(task.names), dtype=torch.float64)
        batches = sorted_batches(rows.lengths, self.training.microbatch_tokens)
        mine = batches if self._scored_alone else batches[session.rank :: session.world_size]
        rounds = len(mine)
        if session.mesh is not None and self._scored_alone:
            rounds = int(session.all_reduce(self._slot(rounds).to(session.device)).max())
        elif session.mesh is not None:
            rounds = -(-len(batches) // session.world_size)
        for number, piece in enumerate(mine + batches[:1] * (rounds - len(mine))):
            batch = self._told(rows.batch(piece).to(session.device))
            with mixed([self.module], self._bf16, session.device):
                outputs = self._forward(self.module, batch)
            if number >= len(mine):  # computed with the other shards of the model; the rows are another rank's
                continue
            if self.lead not in batch.signals:  # another teacher's answers say nothing about it
                batch = replace(batch, signals={})
            sums += task.statistics(outputs, batch).sum(0)
        release(self.module)
        self.module.train()
        found = session.all_reduce(sums.to(session.device)).cpu().numpy()
        return {f"validation/{name}": value for name, value in task.scores(found).items()}
