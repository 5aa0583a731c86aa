"""MLflow without a network: a database whose tables are there, on SQLite or PostgreSQL, and a server that a test starts on it."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import Postgres, Server, without_postgres

NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Creating the tables takes seconds, copying the file does not."""
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server with a database `empty` that has MLflow's tables."""
    if why := without_postgres():
        pytest.skip(why)
    import mlflow

    postgres = Postgres()
    try:
        postgres.start()
        mlflow.MlflowClient(postgres.create("empty")).search_experiments()
        postgres.query(
            "postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'empty'"
        )  # or it cannot be copied
        yield postgres
    finally:
        postgres.close()


@pytest.fixture
def database(empty_database: Path, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """SQLite, or what a test asks for by `@databases`."""
    if getattr(request, "param", "sqlite") == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        return postgres.create(f"test_{next(NUMBERS)}", template="empty")
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def server(database: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(database, tmp_path)
    yield server
    server.kill()
