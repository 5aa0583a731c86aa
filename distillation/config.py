"""What a student learns and how: task, teacher, student, losses, training. Settings only; imports nothing but pydantic.

Settings are refused, never repaired: a value that cannot take effect is an error when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""The one rule for names of jobs, students, losses and experiments: they become folder names, run names and job ids."""


class Config(BaseModel):
    """Base of all settings: unknown keys are refused, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, values: Any) -> Any:
        for name, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and name in cls.model_fields and cls.model_fields[name].annotation is not bool:
                raise ValueError(f"{name} is no yes-or-no setting, got {value}")
        return values


# ---------------------------------------------------------------------------------------------------------------- task


class TextClassification(Config):
    """One label out of several for each text. A scored position is a row."""

    type: Literal["text_classification"] = "text_classification"
    text: str = "text"
    """Column that holds the text."""
    label: str = "label"
    """Column that holds the label, by name or by index; a row without one is unlabelled."""
    labels: tuple[str, ...] | None = None
    """Names of the labels in order. None: those found in the corpus, sorted."""
    max_length: int = Field(128, ge=4, le=8192)
    """Tokens of a row, special tokens included."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a row with more tokens than `max_length`."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> TextClassification:
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)}")
        return self


TaskConfig = TextClassification


# ------------------------------------------------------------------------------------------------------------- training


class TrainingConfig(Config):
    """One loop for teacher, student and baseline. All counts are of global batches: the number of workers changes none of them."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the rows; one of `epochs` and `steps` is set."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(4096, ge=16)
    """Padded tokens of a global batch: one optimizer step over all workers."""
    microbatch_tokens: int = Field(16384, ge=16)
    """Padded tokens of one forward pass on one worker; a larger share of a global batch is accumulated."""
    learning_rate: float = Field(2e-4, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled (AdamW): this is the L2 norm term of the loss; biases and norms are left out."""
    warmup: float = Field(0.06, ge=0, lt=1)
    """Share of all steps over which the learning rate rises from 0."""
    decay: Literal["linear", "cosine", "constant"] = "linear"
    """From the end of the warm-up to the last step, down to 0 (constant: stays)."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of matrix products; weights stay fp32. auto: bf16 where the hardware has it."""
    dropout: float | None = Field(0.0, ge=0, lt=1)
    """0 makes a run independent of the number of workers; null leaves what the model's own configuration says."""
    seed: int = Field(0, ge=0, lt=2**31)
    log_every: int = Field(10, ge=1)
    """Steps between two points of a learning curve."""
    evaluate_every: int = Field(0, ge=0)
    """Steps between evaluations on the validation split (0: only at the end)."""
    checkpoint_every: int = Field(200, ge=0)
    """Steps between checkpoints (0: none; a killed run starts over)."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"set one of epochs and steps, got epochs={self.epochs} and steps={self.steps}")
        return self


# -------------------------------------------------------------------------------------------------------------- teacher


class DenseLogits(Config):
    """Every logit of every scored position."""

    type: Literal["dense"] = "dense"
    dtype: Literal["float16", "float32"] = "float16"


class Features(Config):
    """Inner states of the teacher at the scored positions (for classification: the first token)."""

    layers: tuple[int, ...] = ()
    """Outputs of these layers, counted from 0."""
    pooled: bool = False
    """Input of the classification head."""
    dtype: Literal["float16", "float32"] = "float16"


class TargetsConfig(Config):
    """What the teacher writes into the target store."""

    logits: DenseLogits = DenseLogits()
    features: Features | None = None


class TeacherConfig(Config):
    model: str = Field(min_length=1)
    """Hub id, folder, s3://... or package:NAME/folder (weights shipped inside a Python package)."""
    revision: str | None = None
    """Commit of a hub model."""
    training: TrainingConfig | None = None
    """How to fine-tune it on the labelled rows; leave out if it is already trained for the task."""
    targets: TargetsConfig = TargetsConfig()
    batch_tokens: int = Field(8192, ge=16)
    """Padded tokens of one forward pass of teacher inference."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    pickled_weights: bool = False
    """Read .bin weights, whose unpickling can run code."""


# -------------------------------------------------------------------------------------------------------------- student


class LayersStudent(Config):
    """The teacher with some of its layers: same widths, embeddings and head."""

    type: Literal["layers"]
    layers: tuple[int, ...] | None = None
    """Which layers of the teacher, counted from 0, in order."""
    count: int | None = Field(None, ge=1)
    """How many layers, chosen by `choose`; instead of `layers`."""
    choose: Literal["first", "last", "even"] | None = None
    """With `count`. even (also None): spread over the depth, first and last layer included."""

    @model_validator(mode="after")
    def _one_choice(self) -> LayersStudent:
        if (self.layers is None) == (self.count is None):
            raise ValueError("set one of layers and count")
        if self.layers is not None and (self.choose or not self.layers):
            raise ValueError("layers names the layers itself: give at least one, and leave choose out")
        if self.layers is not None and (list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0):
            raise ValueError(f"layers must rise without repeats from 0 on, got {list(self.layers)}")
        return self


class ScratchStudent(Config):
    """A new model of the teacher's architecture and vocabulary with sizes of its own."""

    type: Literal["scratch"]
    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=4)
    heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=4)

    @model_validator(mode="after")
    def _heads_divide(self) -> ScratchStudent:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self


class PretrainedStudent(Config):
    """A model of its own that reads the teacher's token ids."""

    type: Literal["pretrained"]
    model: str = Field(min_length=1)
    """Hub id, folder, s3://... or package:NAME/folder."""
    revision: str | None = None
    pickled_weights: bool = False


class ProbeStudent(Config):
    """A linear layer on the teacher's stored pooled output; the teacher's body stays as it is."""

    type: Literal["probe"]
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})


StudentConfig = Annotated[LayersStudent | ScratchStudent | PretrainedStudent | ProbeStudent, Field(discriminator="type")]


# --------------------------------------------------------------------------------------------------------------- losses


class CrossEntropy(Config):
    """-log q(label), over labelled positions only."""

    type: Literal["cross_entropy"]
    weight: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    needs: ClassVar[frozenset[str]] = frozenset({"labels"})


class ForwardKL(Config):
    """KL(teacher || student) of the softened distributions, times temperature squared (Hinton et al. 2015)."""

    type: Literal["forward_kl"]
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0, le=100)
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class ReverseKL(Config):
    """KL(student || teacher) of the softened distributions, times temperature squared."""

    type: Literal["reverse_kl"]
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0, le=100)
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class JensenShannon(Config):
    """Generalised Jensen-Shannon divergence over beta (1 - beta), of the softened distributions, times temperature squared."""

    type: Literal["jsd"]
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(2.0, gt=0, le=100)
    beta: float = Field(0.5, ge=0, le=1)
    """The teacher's share of the mixture: 0 is forward KL, 1 reverse KL, between them it changes smoothly."""
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class L2Distil(Config):
    """Squared L2 distance between student and teacher probabilities, summed over classes."""

    type: Literal["l2_distil"]
    weight: float = Field(1.0, ge=0)
    temperature: float = Field(1.0, gt=0, le=100)
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class LogitMSE(Config):
    """Mean over classes of the squared difference of centred logits (Ba and Caruana 2014)."""

    type: Literal["logit_mse"]
    weight: float = Field(1.0, ge=0)
    needs: ClassVar[frozenset[str]] = frozenset({"logits"})


class PatientKD(Config):
    """Squared distance of L2-normalised hidden states at the scored position, summed over layer pairs (PKD, Sun et al. 2019)."""

    type: Literal["pkd"]
    weight: float = Field(1.0, ge=0)
    layers: dict[int, int] = Field(min_length=1)
    """Student layer -> teacher layer, both counted from 0. Widths must agree."""
    needs: ClassVar[frozenset[str]] = frozenset({"hidden"})


LossConfig = Annotated[CrossEntropy | ForwardKL | ReverseKL | JensenShannon | L2Distil | LogitMSE | PatientKD, Field(discriminator="type")]


def only_labels(losses: Mapping[str, Any]) -> bool:
    """Whether all of these terms need labels, so that only labelled rows are trained on."""
    return all("labels" in loss.needs for loss in losses.values())


class FitConfig(Config):
    """All that one training run is made of: whatever trains (Ray Train worker, Tune trial, plain process) gets this and nothing else."""

    name: str
    """Of the run, for people."""
    task: TaskConfig
    labels: tuple[str, ...]
    student: StudentConfig
    losses: dict[str, LossConfig]
    training: TrainingConfig
    storage: str
    """Root of all paths below."""
    corpus: str
    """Folder of the corpus in the storage."""
    targets: str | None
    """Folder of the target store; None where no loss asks a teacher."""
    teacher: str | None
    """Folder of the teacher's weights in the storage, or a model as in `TeacherConfig.model`, that a student is cut from."""
    output: str
    """Folder of the finished model in the storage; checkpoints lie beside it."""
    fingerprint: str
    """Of everything that made this run."""
    rungs: tuple[int, ...] = ()
    """Rows seen after which the validation split is scored, besides training.evaluate_every."""
    save_rungs: bool = False
    """Also checkpoint there, before the score is reported: whoever hears of it can go on from there."""
    keep_model: bool = True
    """False: a trial of a search, whose product is its numbers: no model is committed."""
