"""Logs read back as runs, and the pages that are made of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from mlcbuild.cli.main import main
from mlcbuild.errors import MlcBuildError
from mlcbuild.reporting.changes import changes
from mlcbuild.reporting.events import Event, StepFinished, from_json
from mlcbuild.reporting.history import Cell, Run, read_logs, runs_of
from mlcbuild.reporting.html import html
from mlcbuild.reporting.plots import clouds
from mlcbuild.reporting.summary import markdown
from tests.support.chromium import browser
from tests.support.tools import missing

TARGETS = ("cpu", "cuda")
NASTY = '<script>alert("x")</script> & `code` | bar'


def step(name: str, outcome: str, **more: object) -> dict[str, Any]:
    kind = name.partition(":")[0]
    return {"event": "step_finished", "step": name, "kind": kind, "outcome": outcome, "seconds": 1.5, "size": 10,
            "text": "", "why": "", "log": "", **more}  # fmt: skip


def package(recipe: str, outcome: str, kl: float | None = 0.0123) -> dict[str, Any]:
    return {"event": "package_installed", "recipe": recipe, "folder": f"dist/{recipe}", "outcome": outcome,
            "size": 2_500_000, "kl": kl, "status": "passed",
            "executed": "its kernels, on an emulated device"}  # fmt: skip


def night(hour: int, kl: float = 0.0123) -> Iterator[dict[str, Any]]:
    """Four recipes: built, up to date, failed, unavailable; and one that the failure left untried."""
    events: list[dict[str, Any]] = []
    for model in ("tiny", "large"):
        for target in TARGETS:
            name = f"{model}-q4-{target}"
            steps = [f"quantize:{model}", f"library:{name}", f"verify:{name}"]
            events.append({"event": "recipe_planned", "recipe": name, "model": model, "quantization": "q4",
                           "target": target, "steps": steps})  # fmt: skip
    events += [
        {"event": "recipe_unavailable", "recipe": "phone", "text": "no toolchain"},
        step("quantize:tiny", "built", why="quantization.weights.group_size 32 → 40"),
        step("quantize:tiny", "hit"),
        step("library:tiny-q4-cpu", "hit"),
        package("tiny-q4-cpu", "installed", kl),
        step("verify:tiny-q4-cuda", "failed", text=f"KL too large: {NASTY}", log="line 1\nline 2"),
        step("quantize:large", "hit"),
        package("large-q4-cpu", "hit", None),
        {"event": "run_finished", "seconds": 12.5 + hour, "built": 2, "hit": 4, "failed": 1, "skipped": 3},
    ]
    for number, event in enumerate(events):
        yield {"time": 1_800_000_000 + 86_400 * hour + number, **event}


def events(records: Iterable[dict[str, Any]]) -> list[tuple[float, Event]]:
    return [(record["time"], event) for record in records if (event := from_json(record))]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "nights.jsonl"
    path.write_text("".join(json.dumps(event) + "\n" for hour in range(3) for event in night(hour, 0.01 * (hour + 1))))
    return path


def statuses(run: Run) -> dict[str, str]:
    return {cell.recipe: cell.status for cell in run.cells}


def test_what_became_of_each_recipe() -> None:
    (run,) = runs_of(events(night(0)))
    assert statuses(run) == {
        "large-q4-cpu": "hit",
        "large-q4-cuda": "not tried",
        "phone": "unavailable",
        "tiny-q4-cpu": "built",
        "tiny-q4-cuda": "failed",
    }
    cells = {cell.recipe: cell for cell in run.cells}
    assert cells["tiny-q4-cpu"].why == ("quantization.weights.group_size 32 → 40",)
    assert (cells["tiny-q4-cpu"].seconds, cells["tiny-q4-cpu"].kl) == (1.5, 0.0123)
    assert cells["tiny-q4-cuda"].seconds == 3.0, "a shared step counts for each recipe"
    assert cells["tiny-q4-cuda"].log == "line 1\nline 2"
    assert (run.seconds, run.failed, run.ended) == (12.5, 1, True)


def test_a_recipe_that_could_not_be_published_has_failed_and_one_that_was_is_what_it_was() -> None:
    *records, end = night(0)
    refused = step("publish:tiny-q4-cpu", "failed", text="the token may not write there")
    records += [{"time": 0, **refused}, {"time": 0, **step("publish:large-q4-cpu", "built")}, end]
    (run,) = runs_of(events(records))
    assert (statuses(run)["tiny-q4-cpu"], statuses(run)["large-q4-cpu"]) == ("failed", "hit")
    assert "the token may not write there" in markdown([run])


def test_a_log_of_several_nights_and_one_that_was_cut_off(log: Path) -> None:
    assert [run.seconds for run in read_logs([log])] == [12.5, 13.5, 14.5]
    log.write_text(log.read_text() + json.dumps({"time": 9e9, **step("quantize:x", "built")}) + '\n{"time": 1, "ev')
    *_, last = read_logs([log])
    assert not last.ended
    assert "the build did not end" in html([last]) and "the build did not end" in markdown([last])


def test_a_divergence_that_is_no_number_is_none(log: Path) -> None:
    log.write_text(log.read_text().replace('"kl": 0.0123', '"kl": NaN').replace('"kl": 0.03', '"kl": Infinity'))
    runs = read_logs([log])
    assert {cell.kl for run in runs for cell in run.cells} <= {None, 0.01, 0.02}
    Page(html(runs))


def test_files_that_are_no_logs(tmp_path: Path) -> None:
    with pytest.raises(MlcBuildError, match=r"none.jsonl: cannot be read: No such file"):
        read_logs([tmp_path / "none.jsonl"])
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("hello\nworld\n")
    with pytest.raises(MlcBuildError, match=r"wrong.jsonl:1: not a line of a build's JSON log"):
        read_logs([wrong])
    wrong.write_text("")
    with pytest.raises(MlcBuildError, match="there is no build in these logs"):
        read_logs([wrong])


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        '"x"',
        '{"event": 1}',
        '{"event": "step_finished"}',
        '{"event": "step_finished", "step": 1, "kind": "x", "outcome": "hit", "seconds": 1, "size": 1}',
        '{"event": "recipe_unavailable", "recipe": "x", "text": null}',
        '{"event": "recipe_planned", "recipe": "x", "model": "", "quantization": "", "target": "", "steps": 7}',
        '{"event": "run_finished", "seconds": "1", "built": 1, "hit": 1, "failed": 1, "skipped": 1}',
        '{"event": "run_finished", "time": 1e40, "seconds": 1, "built": 1, "hit": 1, "failed": 1, "skipped": 1}',
        '{"event": "run_finished", "time": [], "seconds": 1, "built": 1, "hit": 1, "failed": 1, "skipped": 1}',
        "[" * 100_000,
    ],
)
def test_a_log_with_odd_values(log: Path, line: str) -> None:
    """FAULTS C: such a line was a traceback."""
    log.write_text(f"{line}\n{log.read_text()}")
    with pytest.raises(MlcBuildError, match=r"nights.jsonl:1: not a line of a build's JSON log"):
        read_logs([log])


def test_events_of_a_later_version_are_passed_over(log: Path) -> None:
    log.write_text('{"event": "moon_rose", "time": 1}\n' + log.read_text())
    assert len(read_logs([log])) == 3


class Page(HTMLParser):
    """Checks that elements nest, and keeps what there is."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "polyline", "line", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def classes(self, tag: str) -> list[str]:
        return [attributes.get("class") or "" for name, attributes in self.tags if name == tag]


def test_the_page_is_a_grid_with_reasons_failures_and_plots(log: Path) -> None:
    page = Page(html(read_logs([log])))
    text = " ".join(page.texts)
    assert sorted(filter(None, page.classes("td"))) == ["built", "failed", "hit", "not-tried", "unavailable"]
    assert [data for data in page.texts if data in TARGETS] == list(TARGETS), "a column per target"
    assert "1.5 s · 2.5 MB · KL 0.0300 · executed: its kernels, on an emulated device" in page.texts
    assert "quantization.weights.group_size 32 → 40" in page.texts
    assert "line 1\nline 2" in page.texts
    assert f"KL too large: {NASTY}" in page.texts, "escaped, and whole"
    assert "no toolchain" in text
    plots = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert plots == [
        "seconds: 14.5 s (largest 14.5 s)",
        "recipes built: 1 (largest 1)",
        "recipes failed: 1 (largest 1)",
        "bytes of all packages: 5.0 MB (largest 5.0 MB)",
        "largest KL: 0.0300 (largest 0.0300)",
    ]
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {f"#{anchor}" for anchor in anchors} == {attributes["href"] for tag, attributes in page.tags if tag == "a"}


def test_a_recipe_shows_its_steps_and_the_page_where_time_went(log: Path) -> None:
    texts = Page(html(read_logs([log]))).texts
    assert texts[texts.index("2 steps") :][1:3] == [
        "quantize:tiny: built, 1.5 s, 10 B",
        "library:tiny-q4-cpu: up to date, 10 B",
    ]
    start = texts.index("Time by step")
    assert [text for text in texts[start : start + 14] if text.strip()][1:5] == ["quantize", "1.5 s", "verify", "1.5 s"]


def run_of(*cells: tuple[str, str, int, float | None, str]) -> Run:
    """A run of recipes of one model: their names, quantizations, bytes, KL and statuses."""
    return Run(0.0, [Cell(n, "m", q, "cpu", status, size=size, kl=kl) for n, q, size, kl, status in cells])


def test_what_is_otherwise_than_before() -> None:
    before = run_of(
        ("a", "q4", 2_000_000, 0.01, "built"),
        ("b", "q4", 2_000_000, 0.01, "failed"),
        ("c", "q4", 2_000_000, 0.01, "hit"),
        ("d", "q4", 2_000_000, 0.01, "built"),
        ("e", "q4", 2_000_000, None, "hit"),
    )
    after = run_of(
        ("a", "q4", 2_000_001, 0.01, "hit"),
        ("b", "q4", 2_000_000, 0.01, "built"),
        ("c", "q4", 3_000_000, 0.03, "built"),
        ("e", "q4", 2_000_000, None, "unavailable"),
        ("f", "q4", 2_000_000, 0.01, "built"),
    )
    expected = [
        ("b", "failed → built"),
        ("c", "KL 0.0100 → 0.0300, 2.0 MB → 3.0 MB"),
        ("e", "hit → unavailable"),
        ("f", "is new"),
    ]
    assert changes([before, after]) == expected
    texts = "".join(Page(html([before, after])).texts)
    assert all(f"{recipe}: {change}" in texts for recipe, change in expected)
    assert changes([after, after]) == changes([after]) == [] and "Since the runs before" not in html([after, after])
    some = run_of(("a", "q4", 2_000_000, 0.01, "hit"))
    assert changes([before, some]) == []
    assert changes([before, some, after]) == expected, "what the run between did not have is no news"


def test_quality_over_size_for_each_model_that_has_several() -> None:
    run = run_of(
        ("x-cpu", "q4", 2_000_000, 0.05, "hit"),
        ("x-gpu", "q4", 2_100_000, 0.05, "hit"),
        ("y", "q8", 4_000_000, 0.0005, "hit"),
        ("z", "q0", 8_000_000, 0.0, "hit"),
        ("w", "q3", 1_000_000, None, "failed"),
    )
    (cloud,) = clouds(run.cells)
    assert [(dot.name, dot.size, dot.anchor) for dot in cloud.dots] == [
        ("q4", 2_000_000, "start"),
        ("q8", 4_000_000, "start"),
        ("q0", 8_000_000, "end"),
    ]
    assert cloud.dots[0].y < cloud.dots[1].y < cloud.dots[2].y == cloud.ticks[0][0], "down to the floor"
    assert [text for _, text in cloud.ticks] == ["0.0001", "0.001", "0.01", "0.1"]
    page = Page(html([run]))
    assert "q8: 4.0 MB, KL 0.0005" in page.texts and {"0.01", "2.0 MB", "8.0 MB"} <= set(page.texts)
    assert clouds([run.cells[0]]) == []


def test_names_on_a_plot_do_not_lie_on_each_other() -> None:
    names = [f"q4f16_{i}" for i in range(6)]
    far = ("q0", "q0", 9_000_000, 0.02, "hit")
    (cloud,) = clouds(run_of(*((n, n, 2_000_000, 0.02, "hit") for n in names), far).cells)
    lines = sorted(dot.name_y for dot in cloud.dots if dot.name != "q0")
    assert all(after - before > 11.9 for before, after in itertools.pairwise(lines))
    assert cloud.dots[-1].name_y == cloud.dots[-1].y - 7, "where there is room, a name is above its dot"


def test_what_failed_for_one_reason_is_said_once_and_keys_and_quality_are_shown() -> None:
    kinds = [("a", 0.01, "hit"), ("b", None, "failed"), ("c", None, "failed"), ("d", None, "failed")]
    cells = [
        dataclasses.replace(run_of((n, n, 2_000_000, kl, status)).cells[0], failure="" if n == "a" else why)
        for (n, kl, status), why in zip(kinds, ("", "no weights", "no weights", "too far"), strict=True)
    ]
    ran = StepFinished("quantize:a", "quantize", "built", 1.0, 5, key="0123456789abcdef")
    page = Page(html([Run(0.0, [dataclasses.replace(cells[0], steps=(ran,)), *cells[1:]])]))
    assert [text for text in page.texts if text in ("no weights", "too far")] == ["no weights", "too far"]
    assert ("code", {"title": "0123456789abcdef"}) in page.tags and "0123456789ab" in page.texts
    (meter,) = [attributes for tag, attributes in page.tags if tag == "meter"]
    assert (meter["value"], meter["title"]) == ("-2.00", "KL 0.0100")


def test_the_page_loads_nothing_and_only_filters(log: Path) -> None:
    page = Page(html(read_logs([log])))
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base", "form"}
    (script,) = html(read_logs([log])).split("<script>")[1:]
    assert not any(word in script for word in ("fetch", "XMLHttpRequest", "import", "http", "innerHTML", "eval"))
    assert not [name for _, attributes in page.tags for name in attributes if name == "src" or name.startswith("on")]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    style = html(read_logs([log])).split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_the_markdown_summary(log: Path) -> None:
    text = markdown(read_logs([log]))
    assert text.startswith("## mlcbuild: 1 failed, 1 not tried, 1 unavailable, 1 built, 1 hit\n")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == [
        "| `tiny-q4-cuda`",
        "| `large-q4-cuda`",
        "| `phone`",
        "| `tiny-q4-cpu`",
        "| `large-q4-cpu`",
    ]
    assert rows[3] == [
        "| `tiny-q4-cpu`",
        "✅ built",
        "1.5 s",
        "2.5 MB",
        "0.0300",
        "quantization.weights.group_size 32 → 40 |",
    ]
    assert f"### tiny-q4-cuda\n\n```text\nKL too large: {NASTY}\nline 1\nline 2\n```" in text


def test_the_command(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(log)]) == 0
    assert capsys.readouterr().out.startswith("## mlcbuild: 1 failed")
    assert main(["report", str(log), "-o", str(tmp_path / "r.html")]) == 0
    Page((tmp_path / "r.html").read_text())
    assert main(["report", str(log), "-o", str(tmp_path / "r.pdf")]) == 1
    assert "r.pdf: expected a name that ends in .html or .md" in capsys.readouterr().err


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
    return next((found for name in names if (found := shutil.which(name))), None) or missing("a Chromium browser")


def test_the_grid_is_filtered_by_words_and_status(log: Path, tmp_path: Path) -> None:
    chromium()
    (tmp_path / "r.html").write_text(html(read_logs([log])))
    with browser(tmp_path / "profile") as page:
        page.open((tmp_path / "r.html").as_uri())
        assert page.texts(".filter output") == ["3 of 3 rows"]

        def shown(words: str, status: str) -> list[str]:
            values = f"[words.value, status.value] = {json.dumps([words, status])}"
            page.evaluate(f"{values}; words.dispatchEvent(new Event('input')); 0")
            return page.texts(".recipes tbody tr:not([hidden]) th")

        assert shown("", "") == ["large q4", "phone", "tiny q4"]
        assert shown("TINY-q4-cuda", "") == ["tiny q4"], "a recipe's name"
        assert shown("q4 lar", "") == ["large q4"]
        assert shown("", "failed") == ["tiny q4"]
        assert shown("", "built") == ["tiny q4"], "one of the recipes in the row"
        assert shown("quantize", "") == [], "no step's name"
        assert shown("", "not-tried") == ["large q4"]
        assert shown("phone", "failed") == []
        assert page.texts(".filter output") == ["0 of 3 rows"]


def test_the_page_in_a_browser_on_a_phone(log: Path, tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    # The browser itself says how wide the page is: nothing but the grid may be wider than the screen.
    probe = "<script>document.title = 'WIDTH ' + document.documentElement.scrollWidth</script>"
    page.write_text(html(read_logs([log])).replace("</body>", f"{probe}</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--window-size=500,900", "--dump-dom", page.as_uri()]
    done = subprocess.run([chromium(), *options], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    width = int(done.stdout.split("<title>WIDTH ")[1].split("<")[0])
    assert width <= 500
    assert done.stdout.count("<svg") == 5
