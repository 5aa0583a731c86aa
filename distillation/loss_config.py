"""Settings of the terms of a loss, and what each asks of a teacher's signal. Imports nothing but pydantic."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from distillation.base_config import Config


class Ramp(Config):
    """A number that changes as the training goes on."""

    start: float
    end: float
    shape: Literal["linear", "cosine"] = "linear"
    until: float = Field(1.0, gt=0, le=1)
    """Share of the steps after which it has arrived at `end`."""

    def at(self, progress: float) -> float:
        """progress: share of the steps that are done, from 0 to 1."""
        done = min(1.0, progress / self.until)
        return self.start + (self.end - self.start) * (done if self.shape == "linear" else (1 - math.cos(math.pi * done)) / 2)


Unit = Literal["labels", "positions", "tokens", "rows"]
"""What a term is averaged over: labelled positions, scored positions, tokens, rows."""

Weight = Annotated[float, Field(ge=0)] | Ramp
Temperature = Annotated[float, Field(gt=0, le=100)] | Ramp
LayerMap = Annotated[dict[int, int], Field(min_length=1)] | Literal["even", "last", "skip"]
"""Student layer -> teacher layer, both counted from 0. even: spread over the teacher's depth, last onto last; last: the teacher's last
ones; skip: every n-th from the first on (as DistilBERT starts)."""


class Balance(Config):
    """Multiply a term so that its gradient with respect to what the student says (logits, inner states) is `weight` times as large as that of
    another term. What that comes to is reported as train/weight/NAME."""

    to: str
    """Name of the other term."""
    every: int = Field(20, ge=1)
    """Steps between two measurements, each a forward pass more; the first is before the first step."""


class _Loss(Config):
    weight: Weight = 1.0
    """Of the term in the sum; of a balanced one, see `balance`."""
    balance: Balance | None = None
    teacher: str | dict[str, float] | None = None
    """Which of several teachers; or a mean of their probabilities with these shares. None: the only one."""
    unit: ClassVar[Unit] = "positions"
    needs: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        for name, least in (("weight", 0.0), ("temperature", 1e-3)):
            value = getattr(self, name, None)
            if isinstance(value, Ramp) and min(value.start, value.end) < least:
                raise ValueError(f"{name} must not go below {least:g}, got {value.start:g} to {value.end:g}")
        if isinstance(self.teacher, dict) and (min(self.teacher.values(), default=0.0) <= 0 or abs(sum(self.teacher.values()) - 1) > 1e-6):
            raise ValueError(f"shares of teachers must be above 0 and add up to 1, got {self.teacher}")
        return self


class CrossEntropy(_Loss):
    """-log q(label), over labelled positions only, in nats."""

    type: Literal["cross_entropy"]
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    unit: ClassVar[Unit] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})


class BinaryCrossEntropy(_Loss):
    """Sum over labels of -log of the probability of their being there or not, over labelled rows only: the hard term of multi_label."""

    type: Literal["binary_cross_entropy"]
    unit: ClassVar[Unit] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})


class LabelMSE(_Loss):
    """Squared difference to the label, over labelled rows only: the hard term of regression."""

    type: Literal["label_mse"]
    unit: ClassVar[Unit] = "labels"
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})


class _Soft(_Loss):
    temperature: Temperature = 2.0
    route: Literal["surest"] | None = None
    """With several teachers: at each position only the one whose softened distribution has the least entropy, in place of their mean."""
    needs: ClassVar[frozenset[str]] = frozenset({"distribution"})

    @model_validator(mode="after")
    def _routes_among_several(self) -> Self:
        if self.route is not None and not isinstance(self.teacher, dict):
            raise ValueError(f"route chooses among several teachers: name them in teacher with shares, got {self.teacher}")
        return self


class ForwardKL(_Soft):
    """KL(teacher || student) of the softened distributions, times temperature squared (Hinton et al. 2015). Of sampled targets the cross
    entropy, which is larger by the teacher's entropy and has the same gradient."""

    type: Literal["forward_kl"]
    needs: ClassVar[frozenset[str]] = frozenset({"distribution or draws"})


class ReverseKL(_Soft):
    """KL(student || teacher) of the softened distributions, times temperature squared."""

    type: Literal["reverse_kl"]


class JensenShannon(_Soft):
    """Generalised Jensen-Shannon divergence over beta (1 - beta), of the softened distributions, times temperature squared."""

    type: Literal["jsd"]
    beta: float = Field(0.5, ge=0, le=1)
    """The teacher's share of the mixture: 0 is forward KL, 1 reverse KL, between them it changes smoothly."""


class SkewedKL(_Soft):
    """KL(teacher || alpha teacher + (1 - alpha) student), times temperature squared (DistiLLM, Ko et al. 2024)."""

    type: Literal["skewed_kl"]
    alpha: float = Field(0.1, ge=0, lt=1)


class SkewedReverseKL(_Soft):
    """KL(student || (1 - alpha) teacher + alpha student), times temperature squared (DistiLLM, Ko et al. 2024)."""

    type: Literal["skewed_reverse_kl"]
    alpha: float = Field(0.1, ge=0, lt=1)


class AdaptiveKL(_Soft):
    """Forward and reverse KL, weighed by where the student is off: at the teacher's likely classes or at the others (Wu et al. 2024)."""

    type: Literal["adaptive_kl"]
    head: float = Field(0.5, gt=0, lt=1)
    """Teacher's mass of the likely classes."""


class TotalVariation(_Soft):
    """Half the L1 distance of the softened distributions, times temperature (its gradient falls with 1/T, not 1/T squared)."""

    type: Literal["total_variation"]


class _OfLogits(_Soft):
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class UniversalLogit(_Soft):
    """L1 distance of the sorted probabilities, 0 to 2, for vocabularies that do not match (ULD, Boizard et al. 2024).

    Of top-k targets the rest counts as one class more, last on both sides. A student with another tokenizer is compared where one of its
    tokens ends at the same character as one of the teacher's, and averaged over these places.
    """

    type: Literal["universal_logit"]
    temperature: Temperature = 1.0


class L2Distil(_OfLogits):
    """Squared L2 distance between student and teacher probabilities, summed over classes."""

    type: Literal["l2_distil"]
    temperature: Temperature = 1.0


class LogitMSE(_Loss):
    """Mean over classes of the squared difference of centred logits (Ba and Caruana 2014)."""

    type: Literal["logit_mse"]
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class TeacherMSE(_Loss):
    """Squared difference to the teacher's number: the soft term of regression."""

    type: Literal["teacher_mse"]
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class StandardisedKL(_OfLogits):
    """Forward KL of logits that were given mean 0 and deviation 1 in each row, times temperature squared (Sun et al. 2024)."""

    type: Literal["standardised_kl"]


class BinaryKL(_OfLogits):
    """Sum over labels of the KL between the teacher's and the student's yes or no, times temperature squared: soft term of multi_label."""

    type: Literal["binary_kl"]


class DecoupledKD(_OfLogits):
    """alpha times the KL about the label, beta times the KL among the other classes, times temperature squared (Zhao et al. 2022)."""

    type: Literal["decoupled_kd"]
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(8.0, ge=0)


class Dist(_OfLogits):
    """1 - correlation between the classes of a row, plus gamma times that between the rows of a group (DIST, Huang et al. 2022)."""

    type: Literal["dist"]
    gamma: float = Field(1.0, ge=0)
    group: int = Field(8, ge=2, le=256)
    """Rows that are compared with each other: neighbours in a global batch."""
    unit: ClassVar[Unit] = "rows"


class _OfLayers(_Loss):
    layers: LayerMap | None = None
    """Pairs of layers, summed over. None: the pooled output."""
    projection: bool = False
    """A linear layer for each pair from the student's width to the teacher's, trained along and left out of the export."""

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"pooled"} if self.layers is None else {"hidden"})


class HiddenMSE(_OfLayers):
    """Mean over the width of the squared difference of states, by default after layer normalisation of both."""

    type: Literal["hidden_mse"]
    normalise: bool = True


class Cosine(_OfLayers):
    """1 - cosine of states, 0 to 2."""

    type: Literal["cosine"]


class PatientKD(_OfLayers):
    """Squared distance of L2-normalised states, 0 to 4 for each pair (PKD, Sun et al. 2019)."""

    type: Literal["pkd"]
    layers: LayerMap


class AttentionKL(_Loss):
    """KL between rows of attention of two layers, mean over heads and queries. Asks a live teacher with as many heads."""

    type: Literal["attention_kl"]
    layers: LayerMap
    unit: ClassVar[Unit] = "rows"
    needs: ClassVar[frozenset[str]] = frozenset({"attentions"})


class RelationKL(_Loss):
    """KL between relations of queries, of keys and of values among the tokens of a row (MiniLMv2, Wang et al. 2021): no equal widths needed."""

    type: Literal["relation_kl"]
    layer: int = Field(-1)
    """Of the student; -1 is the last one. The teacher's is teacher.targets.features.relations."""
    heads: int = Field(12, ge=1)
    """Relation heads into which the widths are divided."""
    unit: ClassVar[Unit] = "rows"
    needs: ClassVar[frozenset[str]] = frozenset({"relations"})


class _OfGroups(_Loss):
    group: int = Field(8, ge=2, le=256)
    """Rows that are compared with each other: neighbours in a global batch."""
    unit: ClassVar[Unit] = "rows"
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})


class RelationalDistance(_OfGroups):
    """Huber loss between distances of pairs of rows, over their mean (RKD, Park et al. 2019)."""

    type: Literal["rkd_distance"]


class RelationalAngle(_OfGroups):
    """Huber loss between angles of triples of rows (RKD, Park et al. 2019)."""

    type: Literal["rkd_angle"]


class SimilarityPreserving(_OfGroups):
    """Mean squared difference of row-normalised Gram matrices (Tung and Mori 2019)."""

    type: Literal["similarity_preserving"]


class SimilarityKL(_OfGroups):
    """KL between softened cosine similarities of a row to the others of its group."""

    type: Literal["similarity_kl"]
    temperature: Temperature = 0.05


class Contrastive(_OfGroups):
    """Finds the teacher's vector of a row among those of its group, -log of its share (InfoNCE, CRD: Tian et al. 2020)."""

    type: Literal["contrastive"]
    temperature: Temperature = 0.05
    projection: bool = False
    """A linear layer from the student's width to the teacher's, trained along and left out of the export."""


HardLoss = CrossEntropy | BinaryCrossEntropy | LabelMSE

LossConfig = Annotated[
    CrossEntropy | BinaryCrossEntropy | LabelMSE | ForwardKL | ReverseKL | JensenShannon | SkewedKL | SkewedReverseKL | AdaptiveKL
    | TotalVariation | UniversalLogit | L2Distil | LogitMSE | TeacherMSE | StandardisedKL | BinaryKL | DecoupledKD | Dist | HiddenMSE
    | Cosine | PatientKD | AttentionKL | RelationKL | RelationalDistance | RelationalAngle | SimilarityPreserving | SimilarityKL
    | Contrastive,
    Field(discriminator="type"),
]  # fmt: skip


def needs_of(loss: Any) -> frozenset[str]:
    """What a term (or a student) asks of the signal, by the names of `held_by`."""
    return frozenset(loss.needs | getattr(loss, "features", frozenset()))


def weighs(loss: Any) -> bool:
    """Whether a term counts at any step."""
    return max(loss.weight.start, loss.weight.end) > 0 if isinstance(loss.weight, Ramp) else loss.weight > 0


def only_labels(losses: Mapping[str, Any]) -> bool:
    """Whether all of these terms need labels, so that only labelled rows are trained on."""
    return all("labels" in loss.needs for loss in losses.values())
