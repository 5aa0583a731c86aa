"""Where a job runs, what it reads and where runs are recorded. Settings only; imports nothing but pydantic."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from distillation.config import NAME, Config

# -------------------------------------------------------------------------------------------------------------- cluster

Role = Literal["teacher", "student"]
ROLES: tuple[Role, ...] = ("teacher", "student")


class Elastic(Config):
    """A number of workers that follows the nodes there are."""

    min: int = Field(ge=1)
    """Fewer do not start; the job waits for nodes."""
    max: int = Field(ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> Elastic:
        if self.min > self.max:
            raise ValueError(f"min must not be above max, got {self.min} and {self.max}")
        return self


def _kind_of_workers(value: Any) -> str | None:
    """Of a union, so that what is refused is refused once."""
    if isinstance(value, dict | Elastic):
        return "Elastic"
    return "int" if isinstance(value, int | float) or (isinstance(value, str) and value.isdecimal()) else None


Workers = Annotated[
    Annotated[Annotated[int, Field(ge=1)], Tag("int")] | Annotated[Elastic, Tag("Elastic")],
    Discriminator(_kind_of_workers, "workers", "must be a number of workers or {min: ..., max: ...}"),
]

_WORD = r"[a-zA-Z0-9]([\w.-]{0,61}[a-zA-Z0-9])?"
LABEL = re.compile(rf"([a-zA-Z0-9.-]{{1,253}}/)?{_WORD}", re.ASCII)
SELECTOR = re.compile(rf"!?({_WORD}|in\({_WORD}(, ?{_WORD})*\))", re.ASCII)


def _selectors(labels: dict[str, str]) -> dict[str, str]:
    for label, wanted in labels.items():
        if not LABEL.fullmatch(label):
            raise ValueError(f"{label!r} is no name of a label")
        if not SELECTOR.fullmatch(wanted):
            raise ValueError(f"{label} must be a value, !value, in(a, b) or !in(a, b), got {wanted!r}")
    return {label: wanted.replace(" ", "") for label, wanted in labels.items()}  # Ray takes a space for a part of the value after it


Labels = Annotated[dict[str, str], AfterValidator(_selectors)]
"""Labels that a node must have: a value, !value, in(a, b) or !in(a, b). Syntax: label selectors of Ray."""


class WorkersConfig(Config):
    """The group of workers that does one kind of work. What is left out is as in the section around it."""

    workers: Workers | None = None
    cpus_per_worker: int | None = Field(None, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0)
    labels: Labels = Field({})
    """Of the nodes to run on. Empty: any."""
    shards: int | Literal["all"] = 1
    """Workers that hold one model together, each a part of every weight matrix. 1: each has the whole model; all: one model in the group."""

    @field_validator("shards", mode="before")
    @classmethod
    def _number_or_all(cls, value: Any) -> Any:
        if value != "all" and not (isinstance(value, int) and value >= 1):
            raise ValueError(f"must be a number of workers or all, got {value}")
        return value


class DataConfig(Config):
    """Ray Data: reading, tokenising and sorting the corpus."""

    labels: Labels = Field({})
    """Of the nodes to run on. Empty: any."""


@dataclass(frozen=True)
class Group:
    """A group of workers with everything filled in."""

    role: Role
    least: int
    most: int
    """Workers. Other than `least` where the group is elastic."""
    cpus: int | None
    """Of each worker. None: as many as the nodes have to give."""
    gpus: float
    labels: dict[str, str]
    shards: int | None
    """Workers that hold one model together. None: all of the group, however many these are."""

    @property
    def elastic(self) -> bool:
        return self.least != self.most


class ClusterConfig(Config):
    """Workers of Ray Train and where artifacts lie."""

    address: str | None = None
    """Ray cluster to join ("auto" inside a job). None: one on this machine, for the time of the command."""
    workers: Workers = 1
    """Training and inference processes. Results do not depend on it."""
    cpus_per_worker: int | None = Field(None, ge=1)
    """Threads of each worker. None: the CPUs of the smallest node divided among the workers it gets."""
    gpus_per_worker: float = Field(0, ge=0)
    teacher: WorkersConfig = WorkersConfig()
    """Where teachers are trained and answer."""
    student: WorkersConfig = WorkersConfig()
    """Where students are trained, and where everything is evaluated, but for what is cut: see docs/sharding.md."""
    data: DataConfig = DataConfig()
    storage: str = "distillery-storage"
    """Folder or URI that every node can write; holds corpora, target stores, models and runs."""
    max_failures: int = Field(2, ge=0)
    """How often a group of workers is restarted after one of them died, if no checkpoint was made in between."""

    @model_validator(mode="after")
    def _groups(self) -> ClusterConfig:
        for group in map(self.group, ROLES):
            if group.gpus not in (0, 1) and not (group.gpus < 1 and group.most == 1):
                raise ValueError(
                    f"{group.role}: gpus_per_worker must be 0 or 1 (a share of one GPU only with one worker), got {group.gpus:g}"
                )
            if group.elastic and group.shards not in (1, None):
                raise ValueError(f"{group.role}: with workers that come and go shards is 1 or all, got {group.shards}")
            if group.shards and group.most % group.shards:
                raise ValueError(f"{group.role}: shards must divide workers, got {group.shards} and {group.most}")
        return self

    def group(self, role: Role) -> Group:
        """The workers of a role, with what it does not say itself."""
        own: WorkersConfig = getattr(self, role)
        workers = self.workers if own.workers is None else own.workers
        least, most = (workers, workers) if isinstance(workers, int) else (workers.min, workers.max)
        return Group(
            role, least, most, own.cpus_per_worker or self.cpus_per_worker,
            self.gpus_per_worker if own.gpus_per_worker is None else own.gpus_per_worker,
            dict(own.labels), None if own.shards == "all" else own.shards,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- corpus


class _Corpus(Config):
    labelled: float = Field(1.0, ge=0, le=1)
    """Share of the training rows whose label is used; the others are unlabelled. Chosen by content, so it is the same rows every time."""
    part_rows: int = Field(8192, ge=1)
    """Rows of a part: the unit of work, of commit and of integrity."""


class FilesCorpus(_Corpus):
    """Parquet, CSV (with header), JSON lines or Arrow files; the ending says which, .gz may follow csv and jsonl."""

    type: Literal["files"]
    train: str | tuple[str, ...]
    """Paths or globs, local or s3://..."""
    validation: str | tuple[str, ...] | float = 0.1
    """Paths or globs, or the share of the training rows to set aside."""
    test: str | tuple[str, ...] | float = 0.1

    @model_validator(mode="after")
    def _shares(self) -> FilesCorpus:
        _check_shares(self)
        return self


class HubCorpus(_Corpus):
    """A data set of the Hugging Face hub, or a folder that `datasets` saved."""

    type: Literal["hub"]
    dataset: str = Field(min_length=1)
    subset: str | None = None
    revision: str | None = None
    train: str = "train"
    """Names of splits."""
    validation: str | float = 0.1
    test: str | float = 0.1

    @model_validator(mode="after")
    def _shares(self) -> HubCorpus:
        _check_shares(self)
        return self


class DocstringsCorpus(_Corpus):
    """First paragraphs of the docstrings of installed Python code, read with `ast`, never imported; the label is the library's name."""

    type: Literal["docstrings"]
    packages: tuple[str, ...] = Field(min_length=2)
    """Top-level import names; "stdlib" is the standard library."""
    per_package: int = Field(2000, ge=1)
    """Most paragraphs of one library."""
    validation: float = 0.1
    test: float = 0.1

    @model_validator(mode="after")
    def _shares(self) -> DocstringsCorpus:
        _check_shares(self)
        return self


class TextCorpus(_Corpus):
    """Plain text in UTF-8, without labels: documents for a language model or for embeddings."""

    type: Literal["text"]
    train: str | tuple[str, ...]
    """Paths or globs, local or s3://..."""
    validation: str | tuple[str, ...] | float = 0.1
    """Paths or globs, or the share of the training documents to set aside."""
    test: str | tuple[str, ...] | float = 0.1
    documents: Literal["file", "blank_line", "heading"] = "file"
    """Where a document ends: with its file, at a blank line, or before a heading of the first level as WikiText writes it (= Title =)."""

    @model_validator(mode="after")
    def _shares(self) -> TextCorpus:
        _check_shares(self)
        return self


class SourceCorpus(_Corpus):
    """Source code of installed Python, read and never imported."""

    type: Literal["source"]
    packages: tuple[str, ...] = Field(min_length=1)
    """Top-level import names; "stdlib" is the standard library."""
    per_package: int = Field(200, ge=1)
    """Most files of one library."""
    kind: Literal["documents", "tokens"] = "documents"
    """documents: the text of each file. tokens: top-level functions, classes and other statements as words, each with what it is there."""
    validation: float = 0.1
    test: float = 0.1

    @model_validator(mode="after")
    def _shares(self) -> SourceCorpus:
        _check_shares(self)
        return self


class DigitsCorpus(_Corpus):
    """The 1,797 handwritten digits that come with scikit-learn: images of 8x8 grey pixels."""

    type: Literal["digits"]
    validation: float = 0.1
    test: float = 0.1

    @model_validator(mode="after")
    def _shares(self) -> DigitsCorpus:
        _check_shares(self)
        return self


def _check_shares(corpus: FilesCorpus | HubCorpus | DocstringsCorpus | TextCorpus | SourceCorpus | DigitsCorpus) -> None:
    shares = [s for s in (corpus.validation, corpus.test) if isinstance(s, float)]
    if any(s <= 0 for s in shares) or sum(shares) >= 1:
        raise ValueError(f"shares of validation and test must be above 0 and leave rows to train on, got {shares}")


CorpusConfig = Annotated[FilesCorpus | HubCorpus | DocstringsCorpus | TextCorpus | SourceCorpus | DigitsCorpus, Field(discriminator="type")]


# ------------------------------------------------------------------------------------------------------------- tracking


class TrackingConfig(Config):
    """MLflow. Training never waits for it: events go to a journal first and are delivered beside the training."""

    uri: str | None = None
    """Server or database. None: SQLite in the storage, where that is local."""
    experiment: str | None = Field(None, pattern=NAME)
    """None: the name of the job."""
    strict: bool = False
    """End with exit code 7 if the server cannot be reached, instead of delivering later."""
    log_model: bool = True
    """Record every student as a logged model."""

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri and ("@" in urlsplit(uri).netloc or re.search(r"(?i)[?&][^=]*(password|passwd|token|secret|key)[^=]*=", uri)):
            raise ValueError("a tracking uri must not carry a password: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD")
        if uri and not re.match(r"^(https?|sqlite|postgresql)(\+\w+)?:", uri):
            raise ValueError(f"tracking uri must start with http:, https:, sqlite: or postgresql:, got {uri!r}")
        return uri
