"""Verbs for a cluster seen from outside: submit, status, logs, stop, resume. They work on a machine that has only the client."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from distillation.errors import ClusterError, ConfigError, ConflictError

if TYPE_CHECKING:
    from cluster.doctor import Check
    from cluster.submit import Attempt, Cluster, Request

Job = Annotated[str, typer.Argument(help="A job file, or the name of a recipe.")]
Name = Annotated[str, typer.Argument(help="Name of a job, or an id that `distill status` shows.")]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Settings to change: path.to.setting=value")]  # noqa: UP045
Address = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(help="Job server of the cluster's head, http://HEAD:8265. Else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, cluster.address."),
]
Insecure = Annotated[bool, typer.Option("--insecure-cluster", help="Use a cluster without a token although others may reach it.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Show the log until the job ends, and end with its exit code.")]
Json = Annotated[bool, typer.Option("--json", help="For machines.")]
Python = Annotated[str, typer.Option(help="Interpreter on the head.")]
Installed = Annotated[bool, typer.Option("--installed", help="The nodes have Distillery: only the job file travels.")]

SECONDS = 180
"""A question to the head may take: it starts a Python there, and one on every node."""


def register(app: typer.Typer) -> None:
    for verb in (submit, status, logs, stop, resume):
        app.command()(verb)


def submit(
    job: Job,
    overrides: Overrides = None,
    address: Address = None,
    search: Annotated[bool, typer.Option("--search", help="`distill search` there instead of `distill run`.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    follow: Follow = False,
    python: Python = "python",
    entrypoint_label: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="key=value of the nodes the driver may run on; several times. None: the head, which is the safest."),
    ] = None,
    installed: Installed = False,
    insecure_cluster: Insecure = False,
) -> None:
    """Hand a job to a cluster and return. Again: shows the one that runs, says so if it is done, goes on if it was stopped or failed."""
    from cluster.reach import address_of
    from cluster.submit import Cluster
    from jobs import shipping

    made, config = shipping.request(job, overrides or [], "search" if search else "run", python, _labels(entrypoint_label or []), installed)
    cluster = Cluster(address_of(address, config.cluster.address), insecure=insecure_cluster)
    _hand_in(cluster, made, dry_run, follow)


def _hand_in(cluster: Cluster, made: Request, dry_run: bool, follow: bool) -> None:
    from cluster.submit import command, next_id
    from jobs.shipping import differences

    attempts = [one for one in cluster.attempts(made.name) if one.request.verb == made.verb]
    last = max(attempts, key=lambda one: one.number, default=None)
    if last is not None and (last.running or last.state == "SUCCEEDED"):
        changed = differences(last.request, made)
        if changed and last.running:
            raise ConflictError(
                "DST-8110", "job of this name runs with other settings", where=last.id, found="; ".join(changed),
                expected="the same settings", do=f"Wait, `distill stop {made.name}`, or name this one differently: name=another-name",
            )  # fmt: skip
        if not changed:
            print(
                f"{'runs already' if last.running else 'succeeded':<14}{last.id}, since {_when(last.started if last.running else last.ended)}"
            )
            print(f"{'next':<14}distill logs {made.name}{' -f' if last.running else ''}")
            _follow(cluster, last, follow)
            return
    id_ = next_id(attempts, made)
    built = made.build(id_)
    print(f"{'would submit' if dry_run else 'submits':<14}{id_}" + (f", goes on from where {last.id} ended" if last else ""))
    print(f"{'package':<14}{built.files} files, {built.bytes / 1e6:.1f} MB: the job file{'' if made.installed else ' and code'}, no data")
    print(f"{'stands for':<14}{command(cluster, id_, made, built)}", flush=True)
    if dry_run:
        return
    if not cluster.submit(id_, made, built):
        print(f"{'':<14}another machine was first")
    print(f"{'next':<14}distill logs {made.name} -f | distill status {made.name} | distill stop {made.name}", flush=True)
    _follow(cluster, cluster.info(id_), follow)


def status(
    name: Annotated[Optional[str], typer.Argument(help="Name of a job, or its id. None: all.")] = None,  # noqa: UP045
    address: Address = None,
    as_json: Json = False,
    insecure_cluster: Insecure = False,
) -> None:
    """Jobs of a cluster: state, since when, and how they ended."""
    cluster = _cluster(address, insecure_cluster)
    if name is not None:
        cluster.newest(name)  # says what there is instead
    attempts = cluster.attempts(name)
    if as_json:
        shown = ("id", "state", "started", "ended", "exit_code", "error")
        rows: list[dict[str, Any]] = [{key: getattr(one, key) for key in shown} for one in attempts]
        found = [{"name": one.request.name, "verb": one.request.verb, **row} for one, row in zip(attempts, rows, strict=True)]
        typer.echo(json.dumps(found, indent=1))
        return
    if not attempts:
        typer.echo(f"no jobs at {cluster.address} yet: distill submit my_job.yaml")
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("job", "id", "state", "started", "took", "exit", ""):
        table.add_column(title, overflow="fold", no_wrap=title != "")
    for one in attempts:
        code = "" if one.exit_code is None else str(one.exit_code)
        took = _span((one.ended or time.time()) - one.started) if one.started else ""
        note = one.error if one.state == "FAILED" else f"distill resume {one.request.name}" if one.state == "STOPPED" else ""
        table.add_row(one.request.name, one.id, one.state.lower(), _when(one.started), took, code, escape(note))
    Console(width=None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", 120)), highlight=False).print(table)


def logs(name: Name, address: Address = None, follow: Follow = False, insecure_cluster: Insecure = False) -> None:
    """What a job printed. With -f as it grows; then the command ends with the exit code of the job."""
    cluster = _cluster(address, insecure_cluster)
    attempt = cluster.newest(name)
    if follow:
        _follow(cluster, attempt, follow)
    else:
        _show(cluster.log(attempt.id))


def stop(name: Name, address: Address = None, insecure_cluster: Insecure = False) -> None:
    """End a job so that it can go on: its driver is told to, and keeps the last checkpoint."""
    cluster = _cluster(address, insecure_cluster)
    attempt = cluster.newest(name)
    if not attempt.running:
        print(f"{'ended':<14}{attempt.id}, {attempt.state.lower()} since {_when(attempt.ended)}")
        return
    ended = cluster.stop(attempt)
    cleanly = "interrupted; run the same command again" in cluster.log(attempt.id)
    how = (
        "its driver ended cleanly" if cleanly else "its driver was ended before it had begun or took too long; the last checkpoint is kept"
    )
    print(f"{ended.state.lower():<14}{attempt.id}; {how}")
    print(f"{'next':<14}distill resume {attempt.request.name}")


def resume(
    name: Name, address: Address = None, dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be done.")] = False,
    follow: Follow = False, insecure_cluster: Insecure = False,
) -> None:  # fmt: skip
    """Hand in again, with the settings it had, a job that was stopped or failed: it goes on from its last checkpoint."""
    from cluster.submit import again

    cluster = _cluster(address, insecure_cluster)
    attempt = cluster.newest(name)
    made = again(attempt)
    if made.code != attempt.request.code and not attempt.running:
        print(f"{'note':<14}code here differs from that of {attempt.id}; what it would make differently is made anew")
    _hand_in(cluster, made, dry_run, follow)


# ------------------------------------------------------------------------------------------- questions to the head


def head_of(option: str | None, configured: str | None) -> str | None:
    """Address of the job server, where a command is about a cluster seen from outside; None inside of it or without one."""
    return next((one for one in (option, configured) if one and one.startswith(("http://", "https://"))), None)


def plan(job: str, overrides: list[str], address: str, as_json: bool, installed: bool, insecure: bool) -> int:
    """`distill plan` on the head, where sources and storage are those of the job. Returns its exit code."""
    from cluster.submit import Cluster
    from jobs import shipping

    made, _ = shipping.request(job, overrides, "plan", installed=installed)
    made = replace(made, options=("--json",) if as_json else ())
    code, said = Cluster(address, insecure=insecure).ask(made, SECONDS)
    (sys.stdout if code == 0 else sys.stderr).write(said)
    return code


def doctor(job: str | None, overrides: list[str], address: str, installed: bool, insecure: bool) -> list[Check]:
    """`distill doctor` on the head and on every node, and how this machine gets there. Raises ClusterError if the head cannot say."""
    from cluster.doctor import Check
    from cluster.package import code_fingerprint
    from cluster.submit import Cluster, Request
    from jobs import shipping

    cluster = Cluster(address, insecure=insecure)
    if job is None:
        made = Request("distillery", "doctor", "", options=("--address", "auto", "--json"), bare=True, installed=installed)
    else:
        made = replace(shipping.request(job, overrides, "doctor", installed=installed)[0], options=("--json",))
    code, said = cluster.ask(made, SECONDS)
    start, end = f"\n{said}".rfind("\n[\n"), said.rfind("]")
    if start < 0 or end < start:
        raise ClusterError(
            "DST-6025", "the head cannot run Distillery", where=f"{made.python} there, exit code {code}", found=said.strip().rpartition("\n")[2],
            do="Install what pyproject.toml asks for on all nodes, or name the right interpreter: distill submit --python",
        )  # fmt: skip
    checks = [Check(**one) for one in json.loads(said[start : end + 1])]
    kind = "ok" if cluster.mode == "token" else "warn"
    here = Check("job server", kind, f"{address}: {cluster.mode}", "" if kind == "ok" else "Start every node with RAY_AUTH_MODE=token")
    same = any(one.name == "distillery" and code_fingerprint() in one.found for one in checks)
    ours = Check(
        "this machine", "ok" if same else "warn", f"code {code_fingerprint()}", "" if same else "The nodes run other code than this"
    )
    return [here, ours, *checks]


# --------------------------------------------------------------------------------------------------------------- small


def _cluster(address: str | None, insecure: bool) -> Cluster:
    from cluster.reach import address_of
    from cluster.submit import Cluster

    return Cluster(address_of(address), insecure=insecure)


def _follow(cluster: Cluster, attempt: Attempt, follow: bool) -> None:
    """Until the job has ended; ends this command with its exit code."""
    if follow:
        raise typer.Exit(cluster.follow(attempt.id, _show).code)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _labels(given: list[str]) -> dict[str, str]:
    wrong = [one for one in given if not all(one.partition("=")[::2])]
    if wrong:
        raise ConfigError(
            "DST-2064", "label cannot be understood", where="--entrypoint-label", expected="key=value", found=shlex.join(wrong)
        )
    return dict(one.split("=", 1) for one in given)


def _when(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"


def _span(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
