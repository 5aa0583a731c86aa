"""What a student learns and how: task, teacher, student, losses, training. Settings only; imports nothing but pydantic.

Settings are refused, never repaired: a value that cannot take effect is an error when the file is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from distillation.base_config import Config
from distillation.loss_config import (  # noqa: F401 - whoever needs settings imports them from here
    AdaptiveKL,
    AttentionKL,
    Balance,
    BinaryCrossEntropy,
    BinaryKL,
    Contrastive,
    Cosine,
    CrossEntropy,
    DecoupledKD,
    Dist,
    ForwardKL,
    HardLoss,
    HiddenMSE,
    JensenShannon,
    L2Distil,
    LabelMSE,
    LayerMap,
    LogitMSE,
    LossConfig,
    PatientKD,
    Ramp,
    RelationalAngle,
    RelationalDistance,
    RelationKL,
    ReverseKL,
    SimilarityKL,
    SimilarityPreserving,
    SkewedKL,
    SkewedReverseKL,
    StandardisedKL,
    TeacherMSE,
    Temperature,
    TotalVariation,
    Unit,
    UniversalLogit,
    Weight,
    needs_of,
    only_labels,
    weighs,
)

NAME = r"^[a-z0-9][a-z0-9._-]{0,62}$"
"""The one rule for names of jobs, students, losses and experiments: they become folder names, run names and job ids."""


ONLY = "teacher"
"""Name of the only teacher."""


# ---------------------------------------------------------------------------------------------------------------- task


class _Text(Config):
    text: str = "text"
    """Column that holds the text."""
    max_length: int = Field(128, ge=4, le=8192)
    """Tokens of a row, special tokens included."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a row with more tokens than `max_length`."""


class _Named(Config):
    label: str = "label"
    """Column that holds the label, by name or by index; a row without one is unlabelled."""
    labels: tuple[str, ...] | None = None
    """Names of the labels in order. None: those found in the corpus, sorted."""

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if self.labels is not None and (len(self.labels) < 2 or len(set(self.labels)) != len(self.labels)):
            raise ValueError(f"labels must be two or more different names, got {list(self.labels)}")
        return self


class TextClassification(_Text, _Named):
    """One label out of several for each text or pair of texts. A scored position is a row."""

    type: Literal["text_classification"] = "text_classification"
    pair: str | None = None
    """Column that holds a second text: the model reads both, separated."""


class MultiLabel(_Text, _Named):
    """Any number of labels for each text: the column holds a list of them. A scored position is a row."""

    type: Literal["multi_label"]
    pair: str | None = None
    """Column that holds a second text."""


class Regression(_Text):
    """A number for each text or pair of texts. A scored position is a row."""

    type: Literal["regression"]
    pair: str | None = None
    """Column that holds a second text."""
    label: str = "label"
    """Column that holds the number; a row without one is unlabelled."""


class TokenClassification(_Text, _Named):
    """A label for each word: columns hold lists of words and of labels. A scored position is a word's first piece."""

    type: Literal["token_classification"]
    text: str = "tokens"
    """Column that holds the words."""
    label: str = "tags"
    """Column that holds their labels."""


class CausalLM(_Text):
    """The next token. A text longer than `max_length` becomes several rows; a scored position is a token but the first of its row."""

    type: Literal["causal_lm"]
    too_long: Literal["split", "drop"] = "split"  # type: ignore[assignment]
    """What becomes of a text with more tokens than `max_length`."""
    pack: bool = True
    """Short rows share a sequence of `max_length`; attention and positions of each are as if it stood alone."""


class MaskedLM(_Text):
    """Hidden tokens. Which ones is decided by the row's content, so that teacher and students see the same; they are the scored positions."""

    type: Literal["masked_lm"]
    too_long: Literal["split", "drop"] = "split"  # type: ignore[assignment]
    mask: float = Field(0.15, gt=0, le=0.5)
    """Share of the tokens that are hidden: 8 in 10 by the mask token, 1 by a random one, 1 left as it is (Devlin et al. 2019)."""


class ImageClassification(_Named):
    """One label for each image. A scored position is an image; for batches it counts as one token."""

    type: Literal["image_classification"]
    image: str = "image"
    """Column that holds the image: PNG, JPEG or an array."""
    size: int = Field(224, ge=4, le=1024)
    """Height and width in pixels. Images of another size are refused unless `resize` is set."""
    channels: Literal[1, 3] = 3
    resize: bool = False
    """Scale every image to `size` (bilinear)."""
    mean: tuple[float, ...] = (0.5,)
    """Of pixels between 0 and 1, for each channel or for all; taken away before division by `std`."""
    std: tuple[float, ...] = (0.5,)
    max_length: ClassVar[int] = 1

    @model_validator(mode="after")
    def _one_for_each_channel(self) -> ImageClassification:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} must have 1 or {self.channels} values, got {len(values)}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {min(self.std)}")
        return self


class Embedding(_Text):
    """A vector for each text: the student imitates the teacher's. A scored position is a row; labels, if any, only judge the result."""

    type: Literal["embedding"]
    pooling: Literal["mean", "first"] = "mean"
    """How the last hidden states of a text become its vector: their mean, or the first token's."""
    label: str = "label"
    """Column of a label for retrieval and linear probes; rows without one are left out there."""
    labels: tuple[str, ...] | None = None


TaskConfig = Annotated[
    TextClassification | MultiLabel | Regression | TokenClassification | CausalLM | MaskedLM | ImageClassification | Embedding,
    Field(discriminator="type"),
]


# ------------------------------------------------------------------------------------------------------------- training


class Mixup(Config):
    """Each row and its neighbour in the batch are mixed: pixels, or the embeddings of texts; labels in the same shares (Zhang et al. 2018)."""

    type: Literal["mixup"]
    alpha: float = Field(0.4, gt=0, le=10)
    """Of the Beta distribution that the share is drawn from."""


class MaskTokens(Config):
    """Some tokens of a text are hidden from teacher and student."""

    type: Literal["mask_tokens"]
    share: float = Field(0.1, gt=0, lt=1)


class DrawMasks(Config):
    """Of masked_lm: other tokens are hidden at every step, as many of each row as in the corpus (Liu et al. 2019, dynamic masking)."""

    type: Literal["draw_masks"]


AugmentConfig = Annotated[Mixup | MaskTokens | DrawMasks, Field(discriminator="type")]


class TrainingConfig(Config):
    """One loop for teacher, student and baseline. All counts are of global batches: the number of workers changes none of them."""

    epochs: int | None = Field(None, ge=1)
    """Passes over the rows; one of `epochs` and `steps` is set."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps."""
    batch_tokens: int = Field(4096, ge=16)
    """Padded tokens of a global batch: one optimizer step over all workers. Of a split of more than 512 parts its tokens without padding."""
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
    augment: AugmentConfig | None = None
    """Inputs that are not in the corpus: a teacher whose answers are stored said nothing about them, so with a live one or none."""
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


class TopKLogits(Config):
    """The k largest log-probabilities of every scored position; all others together are one more class, so that nothing is left out.

    Beside them the log-sum-exp of the whole vocabulary at `temperatures`, which makes these temperatures exact, and the log-probability
    of the label itself.
    """

    type: Literal["topk"]
    k: int = Field(24, ge=1, le=4096)
    dtype: Literal["float16", "float32", "uint8"] = "float16"
    """uint8: in steps of 1/8 nat down to -31.875."""
    temperatures: tuple[Annotated[float, Field(gt=0, le=100)], ...] = Field((1.0,), min_length=1)
    """Those of the losses that read them: 4 bytes a position for each but 1."""

    @property
    def stored_temperatures(self) -> tuple[float, ...]:
        """Those that need a number of their own: at 1 it is 0."""
        return tuple(temperature for temperature in self.temperatures if temperature != 1)


class SampledLogits(Config):
    """Classes drawn at random from the teacher's distribution, with how often each was drawn: an unbiased sample of it (arXiv 2503.16870).

    Beside them the log-probability of the label itself.
    """

    type: Literal["sampled"]
    draws: int = Field(32, ge=1, le=1000)
    temperature: float = Field(1.0, gt=0, le=100)
    """Of the distribution drawn from: the one that losses can have."""


LogitsConfig = Annotated[DenseLogits | TopKLogits | SampledLogits, Field(discriminator="type")]


class Features(Config):
    """Inner states of the teacher."""

    layers: tuple[int, ...] = ()
    """Outputs of these layers, counted from 0."""
    at: Literal["scored", "tokens"] = "scored"
    """Of `layers`: at the scored positions (for a label of a text: the token that the head reads), or at every token."""
    pooled: bool = False
    """Input of the head, at the scored positions; of an embedding task the embedding."""
    relations: int | None = Field(None, ge=0)
    """Layer whose queries, keys and values are kept at every token (MiniLMv2)."""
    dtype: Literal["float16", "float32"] = "float16"


class TargetsConfig(Config):
    """What the teacher writes into the target store."""

    logits: LogitsConfig | None = None
    """None: what `default_logits` says for the task."""
    features: Features | None = None


def default_logits(task: TaskConfig) -> DenseLogits | SampledLogits | None:
    """Dense for a few classes, draws for a vocabulary (docs/breadth.md has the figures), nothing for embeddings."""
    if isinstance(task, CausalLM | MaskedLM):
        return SampledLogits(type="sampled")
    return None if isinstance(task, Embedding) else DenseLogits()


class NewModel(Config):
    """A model that begins with random weights, and for text with a byte-level BPE tokenizer made from the corpus's training texts."""

    architecture: Literal["gpt2", "llama", "bert", "resnet", "vit"]
    layers: int | None = Field(None, ge=1)
    hidden_size: int | None = Field(None, ge=4)
    heads: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=4)
    """None: four times hidden_size."""
    vocabulary: int = Field(8192, ge=300)
    """Most tokens."""
    depths: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Of a resnet, blocks of each stage; with `hidden_sizes` in place of the sizes above."""
    hidden_sizes: tuple[Annotated[int, Field(ge=4)], ...] = ()
    seed: int = Field(0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _has_its_sizes(self) -> NewModel:
        sizes = (self.layers, self.hidden_size, self.heads)
        if self.architecture == "resnet":
            if not self.depths or len(self.depths) != len(self.hidden_sizes) or any(sizes):
                raise ValueError("a resnet has depths and hidden_sizes, one of each a stage, and no other size")
        elif not all(sizes) or self.depths or self.hidden_sizes:
            raise ValueError(f"{self.architecture} has layers, hidden_size and heads, and no depths or hidden_sizes")
        elif self.hidden_size and self.heads and self.hidden_size % self.heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of heads {self.heads}")
        return self

    def __str__(self) -> str:
        sizes = self.hidden_sizes or (self.layers, self.hidden_size)
        return f"new {self.architecture} {'x'.join(map(str, sizes))}"


class TeacherConfig(Config):
    model: Annotated[str, Field(min_length=1)] | NewModel
    """Hub id, folder, s3://..., package:NAME/folder (weights shipped inside a Python package), student:JOB/STUDENT (a finished student of
    another job in the same storage); or the sizes of a new one, which then needs `training`."""
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
    live: bool = False
    """Ask it at every step instead of once: for what cannot be stored, at the price of a forward pass of the teacher a step."""

    @model_validator(mode="after")
    def _a_new_one_is_trained(self) -> TeacherConfig:
        if isinstance(self.model, NewModel) and self.training is None:
            raise ValueError("a new model knows nothing: give it a training section")
        return self


# -------------------------------------------------------------------------------------------------------------- student


class LayersStudent(Config):
    """The teacher, cut: with some of its layers, some of its width, the part of its vocabulary that the corpus uses."""

    type: Literal["layers"]
    layers: tuple[int, ...] | None = None
    """Which layers of the teacher, counted from 0, in order."""
    count: int | None = Field(None, ge=1)
    """How many layers, chosen by `choose`; instead of `layers`. Neither: all of them."""
    choose: Literal["first", "last", "even"] | None = None
    """With `count`. even (also None): spread over the depth, first and last layer included."""
    hidden_size: int | None = Field(None, ge=4)
    """None: the teacher's; so with the next two. What stays is what does most on a sample of the corpus."""
    heads: int | None = Field(None, ge=1)
    intermediate_size: int | None = Field(None, ge=4)
    sample: int = Field(256, ge=1, le=65536)
    """Rows on which it is measured what the units of the teacher do."""
    trim_vocabulary: bool = False
    """Leave out tokens that occur nowhere in the training and validation rows, from the embedding and the tokenizer."""

    @property
    def cuts_width(self) -> bool:
        return any(size is not None for size in (self.hidden_size, self.heads, self.intermediate_size))

    @model_validator(mode="after")
    def _one_choice(self) -> LayersStudent:
        if self.layers is not None and self.count is not None:
            raise ValueError("set one of layers and count")
        if self.layers is None and self.count is None and not self.cuts_width and not self.trim_vocabulary:
            raise ValueError("nothing is cut: set one of layers and count, or a size")
        if self.choose is not None and self.count is None:
            raise ValueError("choose goes with count")
        if self.layers is not None and not self.layers:
            raise ValueError("layers names the layers itself: give at least one")
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


class ConvolutionalStudent(Config):
    """A new ResNet with sizes of its own."""

    type: Literal["convolutional"]
    depths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Blocks of each stage."""
    hidden_sizes: tuple[Annotated[int, Field(ge=4)], ...] = Field(min_length=1)
    """Channels of each stage."""
    embedding_size: int | None = Field(None, ge=4)
    """Channels before the first stage. None: those of the first stage."""

    @model_validator(mode="after")
    def _one_size_a_stage(self) -> ConvolutionalStudent:
        if len(self.depths) != len(self.hidden_sizes):
            raise ValueError(f"depths and hidden_sizes must name as many stages, got {len(self.depths)} and {len(self.hidden_sizes)}")
        return self


class PretrainedStudent(Config):
    """A model of its own. With another tokenizer than the teacher's it reads the same rows in its own tokens: where a row is one position, or
    for `universal_logit` on a language model."""

    type: Literal["pretrained"]
    model: str = Field(min_length=1)
    """Hub id, folder, s3://..., package:NAME/folder, or student:JOB/STUDENT (a finished student of another job in the same storage)."""
    revision: str | None = None
    pickled_weights: bool = False


class ProbeStudent(Config):
    """A linear layer on the teacher's stored pooled output; the teacher's body stays as it is."""

    type: Literal["probe"]
    needs: ClassVar[frozenset[str]] = frozenset({"pooled"})


StudentConfig = Annotated[
    LayersStudent | ScratchStudent | ConvolutionalStudent | PretrainedStudent | ProbeStudent, Field(discriminator="type")
]


# ------------------------------------------------------------------------------------------------------------ hard terms


HARD: Mapping[str, type[HardLoss]] = {
    "text_classification": CrossEntropy, "multi_label": BinaryCrossEntropy, "regression": LabelMSE, "token_classification": CrossEntropy,
    "causal_lm": CrossEntropy, "masked_lm": CrossEntropy, "image_classification": CrossEntropy,
}  # fmt: skip
"""The hard term of each task. An embedding task has none."""


def hard_loss(task: TaskConfig, weight: float = 1.0) -> HardLoss | None:
    kind = HARD.get(task.type)
    return kind.model_validate({"type": get_args(kind.model_fields["type"].annotation)[0], "weight": weight}) if kind else None


class LiveTeacher(Config):
    """A teacher that a training run asks itself."""

    folder: str
    """Of its weights in the storage."""
    targets: TargetsConfig
    """What it is asked for."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"


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
    targets: dict[str, str] = Field({})
    """Folder of the target store of each teacher that a loss asks."""
    live: dict[str, LiveTeacher] = Field({})
    """Teachers that are asked at every step instead."""
    features_at: Literal["scored", "tokens"] = "scored"
    """Where hidden states are compared, as in `Features.at`."""
    lead: str = ONLY
    """Teacher that scores compare with."""
    widths: dict[str, int] = Field({})
    """Of the hidden states of each teacher, for projections."""
    start: str | None = None
    """Folder in the storage of a finished student that is trained further."""
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
