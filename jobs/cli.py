"""The command line. Heavy things are imported inside the commands: `distill --help` answers at once."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from distillation.errors import ConfigError, DistilleryError, StorageError
from jobs import remote

if TYPE_CHECKING:
    from tuning.ledger import Search

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, rich_markup_mode=None)
recipes_app = typer.Typer(no_args_is_help=True, help="Job files that ship with Distillery.")
app.add_typer(recipes_app, name="recipes")

INTERRUPTED = 130
"""What typer makes of a KeyboardInterrupt."""

Job = Annotated[str, typer.Argument(help="A job file, or the name of a recipe.")]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="Settings to change: path.to.setting=value")]  # noqa: UP045
Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False) -> None:
    """Distil a big teacher into the smallest student that is good enough, on a Ray cluster, and prove it."""
    if debug:
        os.environ["DISTILL_DEBUG"] = "1"


def _run(job: str, overrides: list[str] | None, until: str) -> None:
    from jobs.config import load

    config = load(job, overrides or [])
    from jobs.pipeline import run
    from jobs.terminal import console

    run(config, console(), until)


@app.command()
def run(job: Job, overrides: Overrides = None) -> None:
    """The whole job: corpus, teacher, targets, students, evaluation, export, report. Again: goes on where it stopped."""
    _run(job, overrides, "export")


@app.command()
def prepare(job: Job, overrides: Overrides = None) -> None:
    """Only the corpus."""
    _run(job, overrides, "prepare")


@app.command()
def teach(job: Job, overrides: Overrides = None) -> None:
    """Up to the target store: corpus, teacher, what it says."""
    _run(job, overrides, "teach")


@app.command()
def distill(job: Job, overrides: Overrides = None) -> None:
    """Up to the trained students."""
    _run(job, overrides, "distill")


@app.command()
def evaluate(job: Job, overrides: Overrides = None) -> None:
    """Up to the table of teacher, baseline and student."""
    _run(job, overrides, "evaluate")


@app.command()
def export(
    job: Job,
    overrides: Overrides = None,
    to: Annotated[Optional[Path], typer.Option(help="Copy the exported students here.")] = None,  # noqa: UP045
) -> None:
    """The whole job, and a copy of the student folders where you want them."""
    import shutil

    from distillation.storage import Storage

    if to is not None:
        Storage(str(to)).require_writable()
    _run(job, overrides, "export")
    if to is not None:
        from jobs.config import load
        from jobs.plan import make_plan

        done = make_plan(load(job, overrides or []))
        for name in [run.name for run in done.runs if run.role == "student"]:
            shutil.copytree(done.results / "students" / name, to / name, dirs_exist_ok=True)
            typer.echo(str(to / name))


@app.command()
def ladder(
    jobs: Annotated[
        list[str], typer.Argument(help="Job files or recipes in the order of the ladder; settings such as a.b=c hold for all.")
    ],
) -> None:
    """Several jobs, one after the other: a later one may have a student of an earlier one as its teacher, student:JOB/STUDENT."""
    from jobs.config import load

    files, overrides = [one for one in jobs if "=" not in one], [one for one in jobs if "=" in one]
    if not files:
        raise ConfigError("DST-2001", "no such job", where="ladder", expected="job files or recipes", found="none")
    loaded = [load(file, overrides) for file in files]
    from jobs.checks import require_rungs

    require_rungs(loaded)
    from jobs.pipeline import run as run_job
    from jobs.terminal import console

    for config in loaded:
        run_job(config, console())


@app.command()
def verify(
    job: Job,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of each split that the teacher answers again.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Which rows.")] = 0,
) -> None:
    """Check the target stores of a job: every file against its checksum, a sample of rows against the teacher."""
    from jobs.config import load

    config = load(job, overrides or [])
    from jobs.terminal import console
    from jobs.verify import verify as check

    check(config, rows, seed, console())


@app.command()
def search(job: Job, overrides: Overrides = None) -> None:
    """Search over students and coefficients; ends with the smallest student that keeps what was asked for. Again: goes on."""
    from jobs.config import load

    config = load(job, overrides or [])
    from jobs.search import search as run_search
    from jobs.terminal import console

    run_search(config, console())


@app.command()
def leaderboard(job: Job, overrides: Overrides = None, top: Annotated[int, typer.Option(min=1)] = 20, as_json: Json = False) -> None:
    """Trials of a search, the best first; while it runs, too."""
    import json
    import time

    from jobs.terminal import console
    from tuning import views
    from tuning.pareto import decide

    recorded = _recorded(job, overrides)
    decision = decide(recorded)
    if as_json:
        typer.echo(json.dumps(views.leaderboard_json(recorded, decision), indent=1))
        return
    console().print(views.leaderboard(recorded, decision, top))
    console().print(views.status(recorded, decision, recorded.updated if recorded.ended else int(time.time() * 1000)), markup=False)


@app.command()
def compare(
    job: Job,
    overrides: Overrides = None,
    trial: Annotated[Optional[list[int]], typer.Option(help="Number of a trial; several times. None: the front.")] = None,  # noqa: UP045
    as_json: Json = False,
) -> None:
    """Trials of a search side by side: where they differ, what they reach, what they cost."""
    import json

    from jobs.terminal import console
    from tuning import views
    from tuning.pareto import decide

    recorded = _recorded(job, overrides)
    if absent := [number for number in trial or [] if not 0 <= number < len(recorded.trials)]:
        raise ConfigError("DST-2019", "no such trial", where="--trial", expected=f"0 to {len(recorded.trials) - 1}", found=str(absent))
    numbers = trial or decide(recorded).front[:6]
    if as_json:
        typer.echo(json.dumps(views.compare_json(recorded, numbers), indent=1))
    else:
        console().print(views.compare(recorded, numbers))


@app.command()
def report(job: Job, overrides: Overrides = None, as_json: Json = False) -> None:
    """Write the page of a search from what is recorded, and print where it is; while it runs, too."""
    import json

    from jobs.config import load

    recorded = _recorded(job, overrides)
    from jobs.search import recorded_report

    places = recorded_report(load(job, overrides or []), recorded)
    if as_json:
        typer.echo(json.dumps(places, indent=1))
    else:
        for title, place in places.items():
            typer.echo(f"{title:<16}{place}")


def _recorded(job: str, overrides: list[str] | None) -> Search:
    """What the ledger of a job's search says now; loads nothing heavy."""
    from jobs.config import load
    from tuning.ledger import read_search

    return read_search(load(job, overrides or []).workspace / "search" / "ledger.jsonl")


@app.command()
def plan(
    job: Job,
    overrides: Overrides = None,
    address: remote.Address = None,
    as_json: Json = False,
    installed: remote.Installed = False,
    insecure_cluster: remote.Insecure = False,
) -> None:
    """Print the stages, what is already there, and what they cost; on a cluster also whether it fits. Launches nothing."""
    import json

    from jobs.config import load

    config = load(job, overrides or [])
    if head := remote.head_of(address, config.cluster.address):
        raise typer.Exit(remote.plan(job, overrides or [], head, as_json, installed, insecure_cluster))
    from jobs import estimate, fit
    from jobs.plan import make_plan, require_possible
    from jobs.terminal import console

    made = make_plan(config)
    require_possible(made)
    lines = estimate.lines(made)
    fits = fit.look(made, lines) if config.cluster.address else []
    if as_json:
        stages = [line._asdict() for line in lines]
        typer.echo(json.dumps({"stages": stages, "fits": [one.as_dict() for one in fits]} if fits else stages, indent=1))
    else:
        console().print(estimate.table(config.name, lines))
        if fits:
            console().print(fit.table(fits))
    estimate.require_budget(made, lines)
    fit.require(fits)


@app.command()
def doctor(
    job: Annotated[str | None, typer.Argument(help="Check what this job needs.")] = None,
    overrides: Overrides = None,
    address: remote.Address = None,
    as_json: Json = False,
    installed: remote.Installed = False,
    insecure_cluster: remote.Insecure = False,
) -> None:
    """Check this machine, the storage, MLflow and the cluster with all its nodes. Every line that is not ok says what to do."""
    import json
    from dataclasses import asdict

    from jobs.config import load

    config = load(job, overrides or []) if job else None
    if head := remote.head_of(address, config.cluster.address if config else None):
        checks = remote.doctor(job, overrides or [], head, installed, insecure_cluster)
    else:
        from jobs.checkup import checkup

        checks = checkup(config, address)
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in checks], indent=1))
    else:
        from jobs.terminal import checks_table, console

        console().print(checks_table(checks))
    if any(one.state == "fail" for one in checks):
        raise typer.Exit(1)


@app.command()
def ui(
    storage: Annotated[str, typer.Option(help="The storage whose runs to show.")] = "distillery-storage",
    uri: Annotated[Optional[str], typer.Option(help="An MLflow database instead.")] = None,  # noqa: UP045
    port: int = 5000,
) -> None:
    """Serve the MLflow pages of a storage on this machine."""
    root = Path(storage).expanduser().resolve()
    if uri is None and not (root / "mlflow.db").is_file():
        raise ConfigError(
            "DST-2006", "no runs here yet", where=str(root), expected="mlflow.db", found="none", do="Run a job first, or name its --storage"
        )
    from cluster.links import ui as serve

    raise typer.Exit(serve(uri or f"sqlite:///{root}/mlflow.db", str(root / "mlartifacts"), port))


@app.command()
def sync(job: Job, overrides: Overrides = None) -> None:
    """Deliver what waits in the journal of a job to MLflow."""
    from jobs.config import load

    config = load(job, overrides or [])
    from jobs.pipeline import sync as deliver

    typer.echo(f"{deliver(config)} events delivered")


@app.command()
def schema() -> None:
    """JSON schema of a job file, for completion and checks in editors."""
    import json

    from jobs.config import JobConfig

    typer.echo(json.dumps(JobConfig.model_json_schema(), indent=1))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """Names and first lines."""
    from jobs.config import recipes

    for name, text in sorted(recipes().items()):
        typer.echo(f"{name:<14}{text.splitlines()[0].removeprefix('# ')}")


@recipes_app.command("cp")
def recipes_cp(name: str, to: Annotated[Optional[Path], typer.Argument()] = None) -> None:  # noqa: UP045
    """Copy a recipe to a file of your own."""
    from jobs.config import recipes

    if name not in recipes():
        raise ConfigError("DST-2001", "no such recipe", where=name, expected=", ".join(sorted(recipes())), found=name)
    target = to or Path(f"{name}.yaml")
    if target.is_dir():
        target = target / f"{name}.yaml"
    try:
        with open(target, "x", encoding="utf-8") as file:
            file.write(recipes()[name])
    except FileExistsError as error:
        raise ConfigError("DST-2007", "file is already there", where=str(target), do="Name another one") from error
    except OSError as error:
        raise ConfigError("DST-2009", "file cannot be written", where=str(target), found=str(error), do="Name another one") from error
    typer.echo(str(target))


remote.register(app)


def main() -> None:
    """Entry of `distill`: errors of ours are one line and their exit code; Ctrl-C and SIGTERM end with 75: run again to go on."""
    import signal

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    # Read when Ray is imported: else a thread that asks Ray for something after the end would start another cluster.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    try:
        app()
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        print("interrupted; run the same command again to go on from the last checkpoint", file=sys.stderr)
        sys.exit(75)
    except DistilleryError as error:
        _fail(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        _fail(StorageError("DST-5005", "a file cannot be written", where=str(error.filename or "a temporary folder"), found=str(error)))


def _fail(error: DistilleryError) -> None:
    if os.environ.get("DISTILL_DEBUG"):
        traceback.print_exc()
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
