"""What a terminal shows of a search: who comes first, what is counted, how long it takes, and that it answers at once."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.tuning.searches import DAY, TEACHER, by_hand, decided, events, made_up, write
from tuning.pareto import decide
from tuning.views import board, compare, compare_json, counts, leaderboard, leaderboard_json, ranked, status, summary
from tuning.wording import counted, duration, gain_text, misses, on_test_split, p_value, plain, shown, spread

HEAVY = {"numpy", "scipy", "torch", "ray", "mlflow", "transformers", "sklearn", "pandas", "matplotlib", "optuna"}
NOTHING = {"keep": {}, "objectives": {"validation/accuracy": "max", "cost/parameters": "min"}}


def printed(renderable, width=120):
    console = Console(width=width, file=io.StringIO())
    console.print(renderable)
    return console.file.getvalue()


# --------------------------------------------------------------------------------------------------------------- ranking


def test_the_best_are_those_that_keep_then_the_front_then_quality():
    search = by_hand(
        ("stopped", "stopped", 0.99, 1e6, 50),
        ("beaten", "finished", 0.80, 9e6, 100),
        ("failed", "failed", None, 1e6, 0),
        ("small", "finished", 0.60, 1e6, 100),  # on the front, but does not keep 0.7
        ("large", "finished", 0.85, 8e6, 100),
        ("middle", "finished", 0.75, 5e6, 100),
        ("poor", "finished", 0.65, 9e6, 100),
        ("refused", "refused", None, 1e6, 0),
        ("running", "running", 0.90, 1e6, 20),
        keep={"validation/accuracy": 0.7},
    )
    decision = decide(search)
    assert [search.trials[n].task.name for n in decision.front] == ["small", "middle", "large"]
    names = [trial.task.name for trial in ranked(search, decision)]
    assert names == ["large", "middle", "beaten", "small", "poor", "running", "stopped", "failed"]


def test_a_smaller_loss_is_a_better_one():
    trials = [(name, "finished", 0.7, 1e6, 100) for name in "abc"]
    search = by_hand(*trials, objectives={"validation/nll": "min"}, keep={})
    for trial, value in zip(search.trials, (0.9, 0.4, 0.6), strict=True):
        trial.metrics["validation/nll"] = value
    assert [trial.task.name for trial in ranked(search, decide(search))] == ["b", "c", "a"]


def test_a_leaderboard_fits_and_cuts_names_only():
    search = decided(64)
    text = printed(leaderboard(search, decide(search), top=70))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) == 4 + 64
    first = lines[3]
    best = search.trials[search.choice["trial"]]
    assert first.split()[0] == str(best.number)
    assert first.rstrip().endswith("choice")
    assert shown("validation/accuracy", best.metrics["validation/accuracy"]) in first
    long = by_hand(("x" * 200, "finished", 0.71234, 1.5e7, 100))
    narrow = printed(leaderboard(long, decide(long)), width=100).splitlines()
    assert max(map(len, narrow)) <= 100
    assert "xxx…" in narrow[3]
    assert all(part in narrow[3] for part in ("71.2 %", "96.5 %", "15 M", "100 %", "front"))


def test_a_leaderboard_of_nothing():
    search = by_hand()
    assert len(printed(leaderboard(search, decide(search))).splitlines()) == 4
    assert leaderboard_json(search, decide(search))["trials"] == []
    assert summary(search, decide(search))[-1].startswith("Nothing is chosen yet")


def test_markup_in_a_name_is_text():
    search = by_hand(("[red]a[/red] [link=x]", "running", 0.5, 1e6, 10))
    for shown_as in (leaderboard(search, decide(search)), board(search, decide(search), DAY), compare(search, [0])):
        assert "[red]a[/red] [link=x]" in printed(shown_as)


def test_the_json_has_every_training_once():
    search = decided(64)
    found = json.loads(json.dumps(leaderboard_json(search, decide(search))))
    assert sorted(one["number"] for one in found["trials"]) == [trial.number for trial in search.trials]
    ranks = [one["rank"] for one in found["trials"] if one["role"] == "trial" and one["state"] != "refused"]
    assert ranks == list(range(1, 65))
    assert {one["rank"] for one in found["trials"] if one["role"] != "trial" or one["state"] == "refused"} == {None}
    chosen = [one for one in found["trials"] if one["choice"]]
    assert [one["number"] for one in chosen] == [search.choice["trial"]]
    assert (
        chosen[0]["metrics"]["cost/latency_ms_p95"]
        == search.latencies[search.trials[chosen[0]["number"]].task.student_key]["cost/latency_ms_p95"]
    )
    assert found["counts"] == counts(search)
    assert sum(found["counts"].values()) == len(search.of_role("trial"))
    assert set(found) >= {"front", "knee", "feasible", "nearest", "finalists", "hypervolume", "choice", "objectives", "keep", "ended"}


# ---------------------------------------------------------------------------------------------------------------- status


def test_the_line_counts_and_extrapolates():
    search = by_hand(
        ("L1", "finished", 0.70, 1e6, 100),
        ("L2", "finished", 0.72, 2e6, 100),
        ("L1", "stopped", 0.50, 1e6, 40),
        ("L1", "failed", None, 1e6, 0),
        ("L2", "running", 0.40, 2e6, 20),
        ("none", "refused", None, 0, 0),
        trials=10, finalists=1, seeds=2, scheduler={"type": "asha"}, keep={"validation/accuracy": 0.75},
    )  # fmt: skip
    search.updated = DAY + 26_000
    line = status(search, decide(search), DAY + 26_000 + 500)
    # 260 rows in 26.5 s. A trial that is over has seen 60 on average: 40 are left of the one that runs, 5 more will see 60 each,
    # a baseline 100 and 2 x 2 refits 100 each: 840 rows.
    assert line == (
        "4 of 10 trials (2 finished, 1 stopped, 1 failed), 1 running, 1 refused | best accuracy 72.0 % L2 | none keeps what was asked for yet | "
        "front of 2 | 10 rows/s | 26 s | about 86 s left"
    )


def test_the_clock_of_a_search_that_is_silent_or_over_stands_still():
    search = by_hand(("L1", "finished", 0.70, 1e6, 100), ("L1", "running", 0.5, 1e6, 60), trials=4, keep={})
    assert status(search, decide(search), search.updated + 3_600_000).endswith("80 rows/s | 2 s | nothing recorded for 60 min")
    search.ended = True
    assert status(search, decide(search), search.updated + 3_600_000).endswith("front of 1 | 80 rows/s | 2 s")


def test_the_line_of_a_search_that_has_only_begun():
    search = by_hand(trials=4)
    assert status(search, decide(search), DAY + 5000) == "0 of 4 trials | no trial has finished | 5 s"


def test_the_board_shows_what_runs_and_the_ten_best():
    search = made_up(64, ended=False)
    text = printed(board(search, decide(search), search.updated))
    running = [trial for trial in search.trials if trial.state == "running"]
    assert len(running) == 3
    for trial in running:
        assert f"{trial.task.name}" in text
        assert f"{100 * trial.rows / trial.task.rows:.0f} % of its rows" in text
    assert len(text.splitlines()) == 4 + 3 + 4 + 10
    assert max(map(len, text.splitlines())) <= 120


# --------------------------------------------------------------------------------------------------------------- compare


def test_only_knobs_that_differ_are_compared_and_a_lacking_one_is_said():
    search = by_hand(("a", "finished", 0.7, 1e6, 100), ("b", "finished", 0.8, 2e6, 100))
    same = {"training.learning_rate": 4e-4, "student": {"type": "layers", "layers": [0]}}
    points = {"losses.soft.type": "forward_kl", "losses.soft.temperature": 2.0, **same}, {"losses.soft.type": "logit_mse", **same}
    for trial, point in zip(search.trials, points, strict=True):
        trial.task = trial.task._replace(point=point)
    search.trials[0].add(100, {"train/weighted/hard": 0.3, "train/weighted/soft": 0.1, "train/rows": 100})
    rows = compare_json(search, [1, 0])["rows"]
    assert rows["knobs"] == {"losses.soft.type": ["logit_mse", "forward_kl"], "losses.soft.temperature": [None, 2.0]}
    assert rows["quality"]["validation/accuracy"] == [0.8, 0.7]
    assert rows["cost"] == {"cost/parameters": [2e6, 1e6]}
    assert rows["loss"]["weighted share of hard"] == [None, pytest.approx(0.75)]
    assert rows["run"]["rows seen"] == [100, 100]
    lines = {line.split("  ")[0].strip(): line.split() for line in printed(compare(search, [1, 0])).splitlines()}
    assert lines["losses.soft.temperature"][-2:] == ["-", "2"]
    assert lines["weighted share of hard"][-3:] == ["-", "75", "%"]
    assert lines["accuracy"][-4:] == ["80.0", "%", "70.0", "%"]


# --------------------------------------------------------------------------------------------------------------- summary


def test_the_end_says_front_choice_test_split_and_what_to_do():
    search = decided(64)
    lines = summary(search, decide(search))
    assert lines[0].startswith(f"{counts(search)['finished']} trials finished")
    assert search.choice["reason"] in lines[1]
    assert lines[2].startswith("On the test split, mean of 3 seeds: accuracy ")
    assert "over the same student without distillation" in lines[2]
    assert lines[3] == "best.yaml reproduces it: `distill run best.yaml`."


def test_the_end_without_success_says_what_to_change():
    search = decided(64, keep={"validation/retention": 1.2})
    assert search.choice["kept"] is False
    lines = summary(search, decide(search))
    assert lines[-1].startswith("What was asked for was not reached")
    assert not any("best.yaml" in line for line in lines)


def test_the_test_split_over_seeds_by_hand():
    search = decided(64, seeds=2)
    chosen = search.choice["trial"]
    refits = [t for t in search.of_role("refit") if t.task.of == chosen]
    by_name = {one["name"]: one for one in search.evaluations}
    for trial, (ours, theirs) in zip(refits, [(0.72, 0.70), (0.76, 0.72)], strict=True):
        by_name[trial.task.name]["quality"]["accuracy"] = ours
        by_name[trial.task.name.replace("-seed", "-baseline-seed")]["quality"]["accuracy"] = theirs
    one = next(one for one in on_test_split(search) if one.trial == chosen)
    # Half of a 95 % interval of two values is 12.706 times half of their distance.
    assert one.quality["accuracy"]["mean"] == pytest.approx(0.74)
    assert one.quality["accuracy"]["low"] == pytest.approx(0.74 - 12.7062 * 0.02, abs=1e-5)
    assert one.baseline["accuracy"]["mean"] == pytest.approx(0.71)
    assert one.gain["mean"] == pytest.approx(0.03)
    assert one.gain["high"] == pytest.approx(0.03 + 12.7062 * 0.01, abs=1e-5)
    assert one.shipped
    assert one.evaluation["name"] == search.trials[search.choice["refit"]].task.name
    assert [other.shipped for other in on_test_split(search)].count(True) == 1


def test_a_search_without_baselines_or_evaluations_has_less_to_say():
    alone = decided(64, lost=("refit-baseline",))
    assert [one.gain for one in on_test_split(alone)] == [None] * len(on_test_split(alone))
    assert "nothing was trained without distillation" in summary(alone, decide(alone))[2]
    alone.evaluations = None
    assert on_test_split(alone) == []
    assert len(summary(alone, decide(alone))) == 3


def test_what_a_trial_misses():
    search = by_hand(
        ("a", "finished", 0.7, 2e6, 100), keep={"validation/accuracy": 0.75, "cost/latency_ms_p95": "<= 5", "cost/parameters": 3e6}
    )
    assert misses(search, search.trials[0]) == ["accuracy 70.0 % instead of ≥ 75.0 %", "p95 ms not measured instead of ≤ 5.0"]


# --------------------------------------------------------------------------------------------------------------- wording


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0004, "4e-4"), (0.000412345, "4.12e-4"), (0.64321, "0.643"), (2.0, "2"), (0.0, "0"), (123456.0, "1.23e5"), (128, "128"), ("a", "a"),
        (None, "none"), (True, "True"), ([0, 5], "[0, 5]"), ({"type": "layers", "layers": [0, 5], "count": None}, "layers layers=[0, 5]"),
        ({"weight": 0.5}, "weight=0.5"),
    ],
)  # fmt: skip
def test_values_of_knobs(value, text):
    assert plain(value) == text


def test_numbers_for_people():
    assert [counted(n) for n in (0, 950, 15_618_437, 3.2e9)] == ["0", "950", "15.6 M", "3.2 G"]
    assert [duration(s) for s in (0, 89, 600, 3600, 7500, 200_000)] == ["0 s", "89 s", "10 min", "60 min", "2 h 05 min", "2 d 8 h"]
    assert shown("validation/accuracy", 0.73777) == "73.8 %"
    assert shown("validation/nll", 0.9312) == "0.931"
    assert shown("cost/latency_ms_p95", 4.06) == "4.1"
    assert shown("cost/flops", None) == ""
    assert [p_value(p) for p in (None, 0.0001, 0.0123, 1.0)] == ["", "p < 0.001", "p 0.012", "p 1"]
    assert spread("validation/retention", {"mean": 0.98, "low": None, "high": None, "count": 1}) == "98.0 %"
    assert spread("validation/retention", {"mean": 0.98, "low": 0.97, "high": 0.99, "count": 2}) == "98.0 % (97.0 to 99.0)"
    gain = {"mean": 0.0123, "low": -0.002, "high": 0.0266, "count": 3, "p": 0.07}
    assert gain_text(gain) == ("+1.2 points", "-0.2 to +2.7, p 0.07")
    assert gain_text({**gain, "low": None, "high": None, "p": None}, "validation/nll") == ("+0.012", "")


# ----------------------------------------------------------------------------------------------------------------- speed


def test_a_thousand_trials_in_under_two_seconds_and_nothing_heavy(tmp_path):
    write(tmp_path / "ledger.jsonl", events(1000, points=20, scheduler={"type": "none"}))
    program = (
        "import sys; from pathlib import Path; from rich.console import Console; from tuning import views; from tuning.ledger import read_search;"
        f"from tuning.pareto import decide; s = read_search(Path({str(tmp_path / 'ledger.jsonl')!r})); d = decide(s);"
        "Console(width=120).print(views.leaderboard(s, d)); views.leaderboard_json(s, d); print(*{m.split('.')[0] for m in sys.modules})"
    )

    def once():
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        return time.monotonic() - start, done.stdout

    runs = [once() for _ in range(3)]
    assert not HEAVY & set(runs[0][1].splitlines()[-1].split())
    assert min(seconds for seconds, _ in runs) < 2
    assert len(runs[0][1].splitlines()) == 25


def test_teacher_of_the_made_up_searches():
    assert made_up(8).teacher == TEACHER
