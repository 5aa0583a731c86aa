"""A job and a search of 50 trials, submitted to three nodes of this machine with MLflow on PostgreSQL, against the same on one node.

python -m benchmarks.three_nodes [TRIALS]          about 5 minutes on two cores; needs PostgreSQL and the test tools
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.jobs import three
from tests.jobs.place import furnished
from tests.servers import Postgres, Server, without_postgres


def main() -> None:
    if why := without_postgres():
        sys.exit(why)
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    with tempfile.TemporaryDirectory(prefix="distillery-") as name:
        place, postgres = furnished(Path(name)), Postgres()
        try:
            postgres.start()
            server = Server(postgres.create("mlflow"), Path(name))
            server.start()
            with three.three_nodes() as nodes:
                many = three.on_three_nodes(place, nodes, trials, server.uri)
            server.kill()
        finally:
            postgres.close()
        one = three.on_one_node(place, trials)
        found = three.differences(many, one)
    for line in found:
        print(line, file=sys.stderr)
    print("| what | three nodes | one node | ratio | bar |\n|---|---|---|---|---|")
    ratio = f"{many.seconds / one.seconds:.2f}"
    print(
        f"| job and search of {trials} trials, MLflow on PostgreSQL / SQLite | {many.seconds:.0f} s | {one.seconds:.0f} s | {ratio} | < 600 s |"
    )
    print(f"| same stores (SHA-256), same numbers (1e-6), same champion | {'no' if found else 'yes'} | | | yes |")


if __name__ == "__main__":
    main()
