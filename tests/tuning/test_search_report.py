"""The page of a search: what it says, that nothing in it can break out of it, and - in a real browser - that it is drawn and fetches nothing."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from distillation.evaluate import Evaluation
from tests.tuning.searches import NASTY, by_hand, decided, events, in_words, made_up, search_of
from tuning import insight
from tuning.drawing import CURVE_POINTS, bounds, charts, curve, short_paths
from tuning.pareto import decide
from tuning.report import page

CHROMIUM = shutil.which("chromium")
VOID = {"meta", "br", "rect", "circle", "line", "path"}
LINKS = {
    "MLflow runs": "http://127.0.0.1:5000/#/experiments/1?a=1&b=2",
    "bad": "javascript:alert(3)",
    NASTY: 'http://host/"><script>alert(4)</script>',
}


def made(search, links=LINKS):
    return page(search, decide(search), insight.summary(search), links=links, versions={"torch": "2.13.0", NASTY: NASTY})


class Reader(HTMLParser):
    """Tags in balance, every attribute, and the text outside of scripts."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.scripts = [], [], [], "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            self.text += data


def drawn(html):
    return json.loads(Reader(html).scripts[0])


def nasty():
    """A search in which every text that comes from outside tries to get out."""
    search = decided(24)
    search.name = NASTY
    search.job["teacher"]["model"] = NASTY
    for trial in search.trials:
        trial.task = trial.task._replace(name=f"{NASTY}{trial.number}", student=f"{NASTY}{trial.task.student}")
        trial.node = NASTY
    for number, state in ((0, "failed"), (1, "refused")):
        search.trials[number].state, search.trials[number].cause = state, NASTY
    search.choice["name"] = search.choice["reason"] = NASTY
    for finalist in search.choice["finalists"]:
        finalist["name"] = finalist["student"] = NASTY
    return search


# ------------------------------------------------------------------------------------------------------------- the page


def test_every_section_is_there_in_order():
    html = made(decided(64))
    assert re.findall(r"<h2>(.*?)</h2>", html) == [
        "Parameters against accuracy", "Knobs and what they led to", "Learning curves", "What mattered", "Each knob alone",
        "What each loss term had to say", "Finalists, trained in full", "Leaderboard", "Failures", "How to reproduce it",
    ]  # fmt: skip


def test_the_verdict_is_the_choice_with_what_the_refits_said():
    search = decided(64)
    html = made(search)
    verdict = unescape(re.search(r'<div class="verdict"><strong>(.*?)</div>', html, re.S)[1])
    chosen = search.trials[search.choice["trial"]]
    assert verdict.startswith(f"{chosen.task.student} keeps ")
    assert "of the teacher's accuracy on the test split at 0.69x the parameters, 3.2x faster." in verdict
    assert search.choice["reason"] in verdict
    assert "points (" in verdict


def test_an_evaluation_is_one_the_app_makes():
    for one in decided(16).evaluations:
        Evaluation.model_validate(one)


def test_when_nothing_keeps_what_was_asked_the_page_says_what_came_nearest():
    search = decided(64, keep={"validation/retention": 1.2})
    html = made(search)
    verdict = unescape(re.search(r'<div class="verdict open">(.*?)</ol>', html, re.S)[1])
    assert verdict.startswith("<strong>No student keeps retention ≥ 120.0 %. Nearest: ")
    nearest = [search.trials[n].task.name for n in decide(search).nearest[:3]]
    assert re.findall(r"<li>(\S+): retention", verdict) == nearest


def test_nothing_breaks_out_of_the_page():
    search = nasty()
    reader = Reader(made(search))
    assert reader.tags.count("script") == 3
    assert "img" not in reader.tags
    assert not any(name.startswith("on") for _, name, _ in reader.attributes)
    assert NASTY in reader.text
    found = json.loads(reader.scripts[0])
    assert found["trials"][0]["name"].startswith(NASTY)
    assert "</" not in reader.scripts[0]
    addresses = [value for tag, name, value in reader.attributes if name == "href"]
    assert addresses == [LINKS["MLflow runs"], LINKS[NASTY]]
    assert "javascript:alert(3)" in reader.text


def test_nothing_is_fetched():
    html = made(decided(24))
    reader = Reader(html)
    assert not [one for one in reader.attributes if one[1] in ("src", "srcset", "poster", "background", "xlink:href", "action")]
    assert {tag for tag, name, _ in reader.attributes if name == "href"} == {"a"}
    assert not {"link", "iframe", "object", "embed", "img", "base", "form"} & set(reader.tags)
    assert not re.search(r"url\((?!#)|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", html)
    policies = [value for tag, name, value in reader.attributes if tag == "meta" and name == "content"]
    assert policies[1].startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'")


def test_failures_say_cause_and_node_and_refusals_are_counted_by_reason():
    search = by_hand(*[(f"t{i}", "refused", None, 1e6, 0) for i in range(5)], ("lost", "failed", None, 1e6, 30))
    causes = ["the same job as trial 3", "the same job as trial 12", "weights are 0", "the same job as trial 7", "weights are 0"]
    for trial, cause in zip(search.trials, causes, strict=False):
        trial.cause = cause
    search.trials[5].cause, search.trials[5].node = "out of memory", "node-7"
    html = made(search)
    refused = re.findall(r'<tr><td>(\d+)</td><td class="wide">(.*?)</td></tr>', html)
    assert refused == [("3", "the same job as trial 3"), ("2", "weights are 0")]
    assert '<td class="wide">out of memory</td><td class="text">node-7</td>' in html


def test_the_leaderboard_folds_what_is_below_the_fiftieth():
    html = made(made_up(64))
    board = html[html.index("<h2>Leaderboard") : html.index("<h2>Failures")]
    shown, folded = board.split("<details>")
    assert shown.count("<tr") == 1 + 50
    assert folded.count("<tr") == 1 + 14
    assert "<summary>14 more</summary>" in folded


def test_the_job_is_shown_as_resolved():
    search = decided(16)
    html = unescape(made(search))
    assert "distill run best.yaml" in html
    assert "distill search job.yaml" in html
    assert search.fingerprint in html
    assert "2026-09-21 14:13 UTC" in html
    for line in ("learning_rate: 0.0004", "trials: 16", "temperature: 2.0"):
        assert line in html


@pytest.mark.parametrize(
    "search",
    [
        search_of(iter([next(events(8))])),
        by_hand(("a", "failed", None, 1e6, 0), ("b", "refused", None, 1e6, 0)),
        by_hand(("a", "running", 0.5, 1e6, 10)),
        by_hand(("a", "finished", 0.7, 1e6, 100), keep={}),
        by_hand(("a", "finished", 0.7, 1e6, 100), ("b", "stopped", 0.7, 1e6, 50), keep={"cost/latency_ms_p95": 5}),
        made_up(64, ended=False),
        made_up(64),
    ],
    ids=["begun", "all failed", "one runs", "one finished", "latency unknown", "in the middle", "before the refits"],
)
def test_a_search_that_is_not_over_has_an_honest_page(search):
    html = made(search)
    verdict = unescape(re.search(r'<div class="verdict open"><strong>(.*?)</strong>', html)[1])
    finished = any(trial.state == "finished" for trial in search.trials)
    assert verdict == ("Not decided yet." if finished else "Nothing has finished yet.")
    assert "distill run best.yaml" not in html
    Reader(html)
    charted = [trial for trial in search.of_role("trial") if "validation/accuracy" in trial.metrics]
    assert len(drawn(html)["trials"]) == len(charted)
    assert ('data-chart="front"' in html) == bool(charted)


@pytest.mark.parametrize("lost", [("refit-baseline",), ("baseline",), ("baseline", "refit-baseline")])
def test_a_page_without_baselines(lost):
    html = made(decided(24, lost=lost))
    Reader(html)
    assert ('class="baseline"' in html) == ("baseline" not in lost)


def test_a_choice_before_its_evaluation():
    search = decided(24)
    search.evaluations = None
    html = made(search)
    assert "test, " not in html
    assert "with 15.6 M parameters." in unescape(html)


def test_a_thousand_trials_stay_small():
    html = made(decided(1000))
    assert len(html.encode()) < 3e6
    assert len(drawn(html)["trials"]) > 950


# ------------------------------------------------------------------------------------------------------- what is drawn


def test_a_curve_is_thinned_evenly_and_keeps_its_ends():
    search = by_hand(("a", "running", None, 1e6, 0))
    trial = search.trials[0]
    assert curve(trial, "validation/accuracy") is None
    for step in range(1, 101):
        trial.add(step, {"train/rows": step * 10, "validation/accuracy": step / 100, "train/loss": 1.0})
        trial.add(step, {"train/loss": 1.0})
    rows, values = curve(trial, "validation/accuracy")
    assert len(rows) == len(values) == CURVE_POINTS
    assert (rows[0], rows[-1], values[0], values[-1]) == (10, 1000, 0.01, 1.0)
    gaps = {after - before for before, after in pairwise(rows)}
    assert gaps <= {40, 50}


def test_knobs_have_places_also_where_a_trial_has_none():
    search = made_up(24)
    found = charts(search, decide(search), {})
    knobs = {knob["path"]: (i, knob) for i, knob in enumerate(found["knobs"])}
    assert [knob["scale"] for _, knob in knobs.values()] == ["category", "linear", "category", "log", "log"]
    assert knobs["student"][1]["values"] == ("L4H192", "L1", "L2", "L3")  # the cheapest first
    assert [knob["label"] for _, knob in knobs.values()] == ["student", "soft.weight", "soft.type", "soft.temperature", "learning_rate"]
    for drawn_trial in found["trials"]:
        trial = search.trials[drawn_trial["n"]]
        assert knobs["student"][1]["values"][drawn_trial["x"][knobs["student"][0]]] == trial.task.student
        heat = drawn_trial["x"][knobs["losses.soft.temperature"][0]]
        assert heat == trial.task.point.get("losses.soft.temperature")
        assert found["students"][drawn_trial["l"]]["label"] == trial.task.student


def test_a_bound_on_retention_is_one_on_accuracy():
    search = by_hand(keep={"validation/retention": 0.9, "cost/parameters": "<= 2e7", "cost/latency_ms_p95": 5})
    found = bounds(search)
    assert found[0] == {"axis": "quality", "above": True, "at": pytest.approx(0.9 * 0.738), "label": "retention ≥ 90.0 %"}
    assert found[1] == {"axis": "size", "above": False, "at": 2e7, "label": "parameters ≤ 20 M"}
    assert len(found) == 2  # latency is on neither axis


def test_paths_are_as_short_as_they_can_be_told_apart():
    assert short_paths(["training.learning_rate", "losses.soft.weight", "student"]) == ["learning_rate", "soft.weight", "student"]
    assert short_paths(["training.weight_decay", "losses.hard.weight", "losses.soft.weight"]) == [
        "weight_decay",
        "hard.weight",
        "soft.weight",
    ]
    assert short_paths(["student.layers", "training.layers"]) == ["student.layers", "training.layers"]


# --------------------------------------------------------------------------------------------------------- in a browser

PROBE = """
<script>
const errors = [];
window.addEventListener("securitypolicyviolation", (event) => errors.push("policy " + event.violatedDirective));
window.addEventListener("load", () => setTimeout(() => {
  const root = document.documentElement, all = (selector) => [...document.querySelectorAll(selector)];
  const front = document.querySelector(".plot[data-chart=front]"), said = { trials: all(".plot[data-chart=front] .trial").length };
  said.charts = all(".plot").map((plot) => [plot.dataset.chart, plot.querySelectorAll("svg[role=img] > title").length]);
  said.lines = all(".plot[data-chart=parallel] .lines path").length;
  said.curves = all(".plot[data-chart=curves] .lines path:not(.without)").length;
  said.broken = all("svg *").filter((one) => [...one.attributes].some((a) => /NaN|undefined|Infinity/.test(a.value))).length;
  said.texts = all(".plot text").filter((one) => /NaN|undefined|Infinity/.test(one.textContent)).length;
  said.outside = all(".plot").flatMap((plot) => [...plot.querySelectorAll("text")].filter((text) => {
    const [a, b] = [plot.getBoundingClientRect(), text.getBoundingClientRect()];
    return b.left < a.left - 1 || b.right > a.right + 1 || b.top < a.top - 1 || b.bottom > a.bottom + 1;
  }).map((text) => text.textContent));
  const overlapping = (one, other) => {
    const [a, b] = [one.getBoundingClientRect(), other.getBoundingClientRect()];
    return a.left < b.right - 1 && b.left < a.right - 1 && a.top + 3 < b.bottom - 3 && b.top + 3 < a.bottom - 3;
  };
  said.overlaps = all(".plot").flatMap((plot) => {
    const texts = [...plot.querySelectorAll("text")], both = (one, other) => `${one.textContent}|${other.textContent}`;
    return texts.flatMap((one, i) => texts.slice(i + 1).filter((other) => overlapping(one, other)).map((other) => both(one, other)));
  });
  if (front) {
    const mark = (front.querySelector(".trial.front") ?? front.querySelector(".trial")).getBoundingClientRect();
    const at = { clientX: mark.left + mark.width / 2, clientY: mark.top + mark.height / 2, bubbles: true };
    front.dispatchEvent(new PointerEvent("pointermove", at));
    said.hovered = document.getElementById("tip").textContent;
    said.visible = document.getElementById("tip").checkVisibility();
    said.shown = all(".shown").filter((one) => one.childElementCount).length;
    front.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
    said.hidden = document.getElementById("tip").hidden;
    front.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
    said.first = document.getElementById("tip").textContent;
    front.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
  }
  said.requests = performance.getEntriesByType("resource").map((one) => one.name);
  said.error = root.dataset.error ?? null;
  said.errors = errors;
  said.width = [root.clientWidth, root.scrollWidth];
  parent.postMessage(JSON.stringify(said), "*");
}, 50));
</script>
"""


def browsed(tmp_path, html, width):
    """What the page says about itself in a frame of this width, without a network."""
    (tmp_path / "page.html").write_text(html.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    listen = 'addEventListener("message", (event) => { document.body.dataset.said = event.data })'
    frame = f'<script>{listen}</script><iframe src="page.html" width="{width}" height="900" style="border: 0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html><body>{frame}</body>", encoding="utf-8")
    command = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1500,1000",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9", "--virtual-time-budget=5000"]
    done = subprocess.run([*command, "--dump-dom", (tmp_path / "frame.html").as_uri()], capture_output=True, text=True, timeout=120)
    found = re.search(r'data-said="(.*?)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("trials", [64, 1000])
def test_a_browser_draws_every_trial_and_fetches_nothing(tmp_path, trials, width):
    search = decided(trials)
    html = made(search)
    said, content = browsed(tmp_path, html, width), drawn(html)
    known = {trial["n"]: trial for trial in content["trials"]}
    assert (said["error"], said["errors"], said["requests"]) == (None, [], [])
    assert said["trials"] == len(known)
    assert said["lines"] == len(known)
    assert said["curves"] == sum(trial["c"] is not None for trial in known.values())
    panels = len(content["students"]), sum(bool(bins) for bins in content["marginals"])
    assert said["charts"] == [["front", 1], ["parallel", 1], *[["curves", 1]] * panels[0], *[["marginal", 1]] * panels[1]]
    assert (said["broken"], said["texts"], said["outside"], said["overlaps"]) == (0, 0, [], [])
    front = [search.trials[n] for n in decide(search).front]
    assert any(trial.task.name in said["hovered"] for trial in front)
    assert said["shown"] == len(said["charts"]) - panels[0] + 1  # of the curves only its own panel
    assert (said["visible"], said["hidden"]) == (True, True)
    assert max(known.values(), key=lambda trial: trial["q"])["name"] in said["first"]
    assert said["width"][0] == said["width"][1] <= width  # nothing to scroll sideways


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_a_browser_runs_nothing_that_stands_in_the_data(tmp_path):
    said = browsed(tmp_path, made(nasty()), 1280)
    assert (said["error"], said["errors"], said["requests"]) == (None, [], [])
    assert NASTY in said["hovered"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize(
    "search",
    [
        search_of(iter([next(events(8))])),
        by_hand(("a", "running", 0.5, 1e6, 10)),
        by_hand(("a", "finished", 0.7, 1e6, 100), keep={"cost/latency_ms_p95": 5}),
        made_up(64, ended=False),
        decided(
            64,
            keep={"cost/parameters": "<= 15000000"},
            objectives={"validation/nll": "min", "validation/agreement": "max", "cost/flops": "min"},
        ),
        decided(64, keep={"validation/retention": 1.2}, scheduler={"type": "none"}),
        decided(
            64, then=in_words, objectives={"validation/perplexity": "min", "cost/parameters": "min"}, keep={"validation/retention": 0.95}
        ),
    ],
    ids=["begun", "one runs", "one finished", "in the middle", "three objectives", "out of reach", "perplexity"],
)
def test_a_browser_draws_what_there_is(tmp_path, search):
    html = made(search)
    for width in (1280, 400):
        said = browsed(tmp_path, html, width)
        assert (said["error"], said["errors"], said["requests"], said["broken"], said["texts"]) == (None, [], [], 0, 0)
        assert said["trials"] == len(drawn(html)["trials"])
        assert (said["outside"], said["overlaps"]) == ([], [])
        assert said["width"][0] == said["width"][1] <= width  # nothing to scroll sideways
