"""Jobs on a cluster from outside, through the job server of Ray's head: hand in, look at, follow, stop.

Loads ray and nothing else that is heavy, so a machine that has only the client can do it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from cluster import package, reach
from cluster.package import Package
from distillation.errors import ClusterError, ConfigError, ConflictError, SecurityError

STOP_SECONDS = 60
"""How long a driver that was told to stop may take to end by itself. Ray's own 3 seconds are too few to leave MLflow in order."""

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")

INTERRUPTED = 75
"""Exit code of a job that can go on."""


@dataclass(frozen=True)
class Request:
    """What a job is made of. Kept with the job on the cluster, so that it can be handed in again from any machine."""

    name: str
    verb: str
    file: str
    """Text of the job file."""
    overrides: tuple[str, ...] = ()
    python: str = "python"
    labels: Mapping[str, str] | None = None
    """Of the node the driver runs on. None: the head."""
    installed: bool = False
    """The nodes have Distillery: only the job file travels."""
    code: str = ""
    """Fingerprint of the code that travels, or of that of the machine it was handed in from."""

    options: tuple[str, ...] = ()
    bare: bool = False
    """The verb needs no job file."""

    @property
    def entrypoint(self) -> str:
        about = [] if self.bare else [f"{self.name}.yaml", *self.overrides, "cluster.address=auto"]
        return shlex.join([self.python, "-m", "jobs", self.verb, *about, *self.options])

    @property
    def metadata(self) -> dict[str, str]:
        """As Ray keeps it: strings, and readable for all who may see the cluster."""
        return {"job": self.name, "verb": self.verb, "distillery": json.dumps(asdict(self))}

    def build(self, id_: str) -> Package:
        return package.build(id_, {} if self.bare else {f"{self.name}.yaml": self.file}, with_code=not self.installed)


@dataclass(frozen=True)
class Attempt:
    """A job as the cluster knows it."""

    id: str
    number: int
    state: str
    request: Request
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def running(self) -> bool:
        return self.state not in ENDED

    @property
    def code(self) -> int:
        """Exit code of a command that waited for it. Raises ClusterError if the driver never ended by itself."""
        if self.state == "STOPPED":
            return INTERRUPTED
        if self.exit_code is None:
            raise ClusterError(
                "DST-6023", "job ended without its driver", where=self.id, found=self.error,
                do=f"Look at `distill logs {self.request.name}` and at the head, then: distill resume {self.request.name}",
            )  # fmt: skip
        return self.exit_code

    @property
    def error(self) -> str:
        """The last line of error in what is known of its end."""
        lines = self.message.strip().splitlines()
        ours = [line for line in lines if line.startswith("error[DST-")]
        return (ours or lines or [""])[-1]


def id_of(request: Request, number: int) -> str:
    return f"{request.name}-{request.verb}" + (f"-r{number}" if number > 1 else "")


class Cluster:
    """The job server of a cluster's head."""

    def __init__(self, address: str, *, insecure: bool = False) -> None:
        """Raises ClusterError if nobody answers there or the token is refused, SecurityError if it takes jobs from anybody."""
        self.address = address.rstrip("/")
        self.mode = reach.authentication_mode(self.address)
        if self.mode != "token" and not reach.is_loopback(self.address) and not insecure:
            raise SecurityError(
                "DST-9020", "cluster takes jobs from anybody who reaches it", where=self.address, expected="token authentication",
                found=self.mode, do="Start every node of it with RAY_AUTH_MODE=token, or pass --insecure-cluster if the network is closed",
            )  # fmt: skip
        headers = {"Authorization": f"Bearer {reach.token()}"} if self.mode == "token" else {}
        from ray.job_submission import JobSubmissionClient

        for name in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with self._answers(), _without(*reach.ADDRESSES):  # Ray would take these before the argument
            self._client = JobSubmissionClient(self.address, headers=headers)

    # ------------------------------------------------------------------------------------------------------------ look

    def attempts(self, name: str | None = None) -> list[Attempt]:
        """Jobs that Distillery handed in, the oldest first; those of a name, or with this very id."""
        with self._answers():
            jobs = self._client.list_jobs()
        found = [attempt for attempt in map(_attempt, jobs) if attempt is not None]
        if name is not None:
            found = [one for one in found if name in (one.request.name, one.id)]
        return sorted(found, key=lambda one: (one.started or 0, one.number))

    def newest(self, name: str) -> Attempt:
        """What is meant by the name: the attempt that runs, else the last one. Raises ConfigError if there is none."""
        found = self.attempts(name)
        if not found:
            known = sorted({one.request.name for one in self.attempts()})
            raise ConfigError(
                "DST-2062", "cluster knows no such job", where=name, expected=", ".join(known) or "none was submitted", found=name,
                do="`distill status` lists them; a cluster forgets its jobs when its head ends: submit again, it goes on from the storage",
            )  # fmt: skip
        return max(found, key=lambda one: (one.running, one.started or 0, one.number))

    def info(self, id_: str) -> Attempt:
        with self._answers():
            found = _attempt(self._client.get_job_info(id_))
        assert found is not None, "only jobs of ours are asked for"
        return found

    def log(self, id_: str) -> str:
        with self._answers():
            text: str = self._client.get_job_logs(id_)
        return text

    def follow(self, id_: str, show: Callable[[str], None]) -> Attempt:
        """Show the log as it grows, until the job has ended. A connection that breaks is made again, and nothing is shown twice."""
        shown = 0
        while True:
            with contextlib.suppress(OSError, RuntimeError):
                shown = asyncio.run(self._tail(id_, shown, show))
            attempt = self.info(id_)
            if not attempt.running:
                show(self.log(id_)[shown:])
                return attempt
            time.sleep(1)

    async def _tail(self, id_: str, shown: int, show: Callable[[str], None]) -> int:
        """The whole log comes each time. Returns how many characters have been shown."""
        import aiohttp

        seen = 0
        try:
            async for text in self._client.tail_job_logs(id_):
                show(text[max(0, shown - seen) :])
                seen += len(text)
                shown = max(shown, seen)
        except (aiohttp.ClientError, OSError, RuntimeError):
            pass  # the caller asks what became of the job
        return shown

    # -------------------------------------------------------------------------------------------------------------- do

    def submit(self, id_: str, request: Request, built: Package) -> bool:
        """Hand a job in. Returns False if another machine handed in this very id in the meantime."""
        try:
            with self._answers():
                self._client.submit_job(
                    entrypoint=request.entrypoint, submission_id=id_, metadata=request.metadata,
                    runtime_env={"working_dir": str(built.folder), **RUNTIME}, entrypoint_label_selector=dict(request.labels or {}) or None,
                )  # fmt: skip
        except ClusterError as error:
            if "already exists" not in error.found:
                raise
            with self._answers():
                there = _attempt(self._client.get_job_info(id_))
            if there is None:
                raise ConflictError(
                    "DST-8111", "another job has this id", where=id_, expected="a job of Distillery", found="one that was submitted by hand",
                    do="Name this one differently: name=another-name",
                ) from error  # fmt: skip
            return False
        return True

    def stop(self, attempt: Attempt) -> Attempt:
        """Ask a driver to end, and wait until it has."""
        with self._answers():
            self._client.stop_job(attempt.id)
        return self.wait(attempt.id, STOP_SECONDS + 30)

    def wait(self, id_: str, seconds: float) -> Attempt:
        """Until the job has ended, or for so long."""
        deadline = time.monotonic() + seconds
        while (attempt := self.info(id_)).running and time.monotonic() < deadline:
            time.sleep(0.5)
        return attempt

    def ask(self, request: Request, seconds: float) -> tuple[int, str]:
        """Run a short command on the head and forget it: (exit code, what it printed). Raises ClusterError if it does not end in time."""
        id_ = f"{request.name}-{request.verb}-{os.urandom(4).hex()}"
        built = request.build(id_)
        try:
            self.submit(id_, request, built)
            attempt = self.wait(id_, seconds)
            if attempt.running:
                self.stop(attempt)
                raise ClusterError(
                    "DST-6024", "the head did not answer a question in time", where=request.entrypoint, expected=f"{seconds:.0f} s",
                    found=self.log(id_).strip().rpartition("\n")[2], do="Look at the dashboard: is the head busy, or a node of it lost?",
                )  # fmt: skip
            said = self.log(id_)
            code = attempt.code
            with self._answers():
                self._client.delete_job(id_)
        finally:
            package.remove(built)
        return code, re.sub(r"\A(.*\n)*?Running entrypoint for job .*\n", "", said)

    # -------------------------------------------------------------------------------------------------------- of errors

    @contextlib.contextmanager
    def _answers(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise ClusterError(
                "DST-6021", "cluster refuses the token", where=self.address, expected="the token that its nodes were started with",
                found=str(error).splitlines()[0], do=f"Copy that of the head to {reach.token_file()}, then chmod 600 it",
            ) from error  # fmt: skip
        except OSError as error:
            raise reach.unreachable(self.address, error) from error
        except RuntimeError as error:
            lines = ["", *(line for line in str(error).replace("\\n", "\n").splitlines() if line.strip())]
            found = next((line for line in lines if "already exists" in line), lines[-1])
            raise ClusterError(
                "DST-6022", "job server refuses", where=self.address, found=found,
                do="Look at the log of the dashboard on the head",
            ) from error  # fmt: skip


RUNTIME = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
"""Of the environment of a job, beside its working directory. Shown to all who see the cluster: no place for a secret."""


def command(cluster: Cluster, id_: str, request: Request, built: Package) -> str:
    """What a person would type to hand in the same job. Writes the metadata beside the package, as they are long."""
    path = built.folder.with_name(f"{id_}.json")
    path.write_text(json.dumps(request.metadata, indent=1), encoding="utf-8")
    login = "RAY_AUTH_MODE=token " if cluster.mode == "token" else ""
    words = ["ray", "job", "submit", "--address", cluster.address, "--submission-id", id_, "--working-dir", str(built.folder),
             "--runtime-env-json", json.dumps(RUNTIME)]  # fmt: skip
    if request.labels:
        words += ["--entrypoint-label-selector", json.dumps(dict(request.labels))]
    return f'{login}{shlex.join(words)} --metadata-json "$(cat {shlex.quote(str(path))})" --no-wait -- {request.entrypoint}'


def next_id(attempts: list[Attempt], request: Request) -> str:
    """attempts: of this name and verb."""
    return id_of(request, max((one.number for one in attempts), default=0) + 1)


def again(attempt: Attempt) -> Request:
    """The request of an attempt with the code of this machine."""
    return replace(attempt.request, code=package.code_fingerprint())


def _attempt(job: Any) -> Attempt | None:
    """From what Ray says; None for a job that is not ours."""
    metadata = job.metadata or {}
    try:
        said = json.loads(metadata.get("distillery", ""))
        # Other versions may write more or less.
        known = {field.name: said[field.name] for field in fields(Request) if field.name in said}
        request = Request(**{key: tuple(value) if isinstance(value, list) else value for key, value in known.items()})
    except (ValueError, TypeError):
        return None
    match = re.fullmatch(rf"{re.escape(request.name)}-{re.escape(request.verb)}(?:-r(\d+))?", job.submission_id or "")
    number = int(match[1] or 1) if match else 0
    started, ended = (time_ / 1000 if time_ else None for time_ in (job.start_time, job.end_time))
    return Attempt(job.submission_id, number, str(job.status), request, started, ended, job.driver_exit_code, job.message or "")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
