"""What the pages show is what the program does: snippets are valid, tables hold what the code has."""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlcbuild.doit_face import variables
from mlcbuild.recipes.load import check, render
from mlcbuild.reporting import events
from mlcbuild.verify import bounds
from tests.docs.pages import DOCS, PAGES, ROOT, Block, blocks, code, table

# What a visitor of the repository reads before the pages of docs/.
DOORS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
SNIPPETS = {
    page.name: [b for b in blocks(page.read_text()) if b.language == "yaml"] for page in (*PAGES, ROOT / "README.md")
}
WITH_SNIPPETS = sorted(name for name, found in SNIPPETS.items() if found)


def page(name: str) -> str:
    return ((ROOT if name == "README.md" else DOCS) / name).read_text()


def write(root: Path, snippet: Block) -> None:
    """The snippet as the file that it names, with the files and folders that it refers to."""
    path = root / snippet.info[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(snippet.text)
    content: Any = yaml.safe_load(snippet.text)
    text = content.get("verify", {}).get("text")
    for key in ("source", "delta_of", "lora"):
        if folder := content.get(key, {}).get("path"):
            place = path.parent / folder
            (place.parent if place.suffix == ".gguf" else place).mkdir(parents=True, exist_ok=True)
            if place.suffix == ".gguf":
                place.touch()
    if text:
        (path.parent / text).parent.mkdir(parents=True, exist_ok=True)
        (path.parent / text).write_text("A text.\n")


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_snippets_name_their_file(name: str) -> None:
    for snippet in SNIPPETS[name]:
        _, path, *more = (*snippet.info, "") if len(snippet.info) == 1 else snippet.info
        named = path.startswith("recipes/") and more in ([], ["wrong"])
        assert named, f"{name}:{snippet.line}: write ```yaml recipes/..., and `wrong` behind it for one with mistakes"


@pytest.mark.parametrize("name", WITH_SNIPPETS)
def test_the_snippets_of_a_page_are_a_workspace_without_problems(name: str, tmp_path: Path) -> None:
    # A stock file that a page shows (tests/architectures/test_worked_example.py) is none of the workspace's own.
    stock = {path.relative_to(ROOT).as_posix() for path in (ROOT / "recipes" / "architectures").iterdir()}
    valid = [each for each in SNIPPETS[name] if "wrong" not in each.info and each.info[1] not in stock]
    names = [snippet.info[1] for snippet in valid]
    assert len(set(names)) == len(names), f"{name}: two snippets are the same file"
    (tmp_path / "recipes").mkdir()
    for snippet in valid:
        write(tmp_path, snippet)
    report = check(tmp_path)
    assert report.ok, render(report)
    assert not report.warnings, render(report)


WRONG = [
    pytest.param(snippet, after, id=f"{name}:{snippet.line}")
    for name in WITH_SNIPPETS
    for found in [list(blocks(page(name)))]
    for snippet, after in zip(found, [*found[1:], None], strict=True)
    if "wrong" in snippet.info
]


@pytest.mark.parametrize(("snippet", "after"), WRONG)
def test_a_wrong_snippet_gives_the_text_that_follows_it(snippet: Block, after: Block | None, tmp_path: Path) -> None:
    assert after is not None and after.language == "text", "the output of `mlcbuild check` follows in a block of text"
    (tmp_path / "recipes").mkdir()
    write(tmp_path, snippet)
    # How many files come with mlcbuild is nobody's business here.
    shown, said = (re.sub(r" of \d+$", "", text.rstrip()) for text in (after.text, render(check(tmp_path))))
    assert said == shown


def test_what_is_said_to_be_an_override_is_one() -> None:
    """FAULTS C: sizes of sliding windows and attention sinks were listed so, and are unknown keys."""
    known = set(json.loads((ROOT / "schema/recipe.schema.json").read_text())["$defs"]["overrides"]["properties"])
    cells = [line.strip("|").split("|") for line in page("coming-from.md").splitlines() if line.startswith("| `--")]
    rows = [(left, right) for left, right in cells if right.strip().startswith("`overrides")]
    assert len(rows) > 1
    for left, right in rows:
        keys = re.findall(r"`overrides: {(\w+)", right) or [
            key or option.replace("-", "_") for option, key in re.findall(r"`--([\w-]+)`(?: \(`(\w+)`\))?", left)
        ]
        assert {*keys} <= {*known, "overrides"}, left


def test_every_variable_of_the_command_line_is_described() -> None:
    described = [code(row[0])[0].removesuffix("=") for row in table(page("building.md"), "variable", "meaning")]
    assert described == list(variables.NAMES)


def test_every_variable_of_the_environment_is_described() -> None:
    sources = [path.read_text() for path in (ROOT / "mlcbuild").rglob("*.py")]
    used = {name for text in sources for name in re.findall(r'"((?:MLCBUILD|TVM)_[A-Z_]+)"', text)}
    described = {name for row in table(page("building.md"), "environment", "meaning") for name in code(row[0])}
    assert used <= described, used - described


def test_what_is_said_when_something_goes_wrong_is_said_so() -> None:
    sources = "\n".join(path.read_text() for path in (ROOT / "mlcbuild").rglob("*.py"))
    texts = [text for row in table(page("troubleshooting.md"), "it says", "that is", "so") for text in code(row[0])]
    assert len(texts) >= 20
    assert [text for text in texts if text not in sources] == []


def test_every_event_is_described_with_its_fields() -> None:
    described = {code(row[0])[0]: code(row[1]) for row in table(page("reports.md"), "event", "fields", "when")}
    real = {}
    for kind in typing.get_args(events.Event):
        example: Any = kind(**{field.name: "" for field in dataclasses.fields(kind)})
        name, *fields = [events.to_json(example)["event"], *(field.name for field in dataclasses.fields(kind))]
        real[name] = fields
    assert described == real


def test_the_bounds_of_verification() -> None:
    rows = table(page("verification.md"), "class", "warn above KL", "fail above KL", "fail above increase")
    described = {code(row[0])[0]: tuple(row[1:]) for row in rows}
    real = {
        name: (f"{b.warn_kl:g}", f"{b.fail_kl:g}", f"{b.fail_perplexity_increase:.1%}")
        for name, b in bounds.BOUNDS.items()
    }
    assert described == real


def test_the_figures_of_the_readme_are_those_that_were_measured() -> None:
    heads = ("", "decode, 1 thread", "2 threads", "prefill, 1 thread", "2 threads")
    shown = {row[0]: [cell.strip("*") for cell in row[1:]] for row in table(page("README.md"), *heads)}
    of_all = ("", "decode, 1 thread", "of read", "prefill, 1", "decode, 2", "prefill, 2", "load", "resident")
    measured = {row[0]: [row[1], row[4], row[3], row[5]] for row in table(page("performance.md"), *of_all)}
    assert shown == {
        "mlcbuild `q4f16_1`": measured["q4f16_1"],
        "llama.cpp `Q4_0`": measured["llama.cpp Q4_0"],
        "torch bfloat16": measured["torch bfloat16"],
    }


def anchors(text: str) -> set[str]:
    """The names that headings can be linked by: lower case, hyphens for spaces, punctuation left out."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, *DOORS], ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        if "://" not in target and not (other.exists() and (not anchor or anchor in anchors(other.read_text()))):
            missing.append(target)
    assert not missing


@pytest.mark.parametrize("path", [*PAGES, *DOORS], ids=lambda path: path.name)
def test_files_of_the_program_that_a_page_names_are_there(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    names = [name for name in code(text) if re.fullmatch(r"[\w./-]+/|[\w./-]+\.(py|c|h)", name)]
    roots = ("mlcbuild/", "tests/", "benchmarks/", "scripts/", "examples/")
    # design.md is about the package, and writes its files without its name.
    inside = ROOT / "mlcbuild" if path.name == "design.md" else None
    packages = {f"{each.name}/" for each in (ROOT / "mlcbuild").iterdir() if each.is_dir()}
    missing = []
    for name in names:
        if name.startswith(roots):
            found = ROOT / name
        elif inside is not None and name.startswith(tuple(packages)):
            found = inside / name
        else:
            continue
        if not found.exists():
            missing.append(name)
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_short_and_has_a_title(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    # Tables that a script makes are as long as the list of what there is.
    written = re.sub("<!-- supported: begin -->.*?<!-- supported: end -->", "", text, flags=re.DOTALL)
    assert len(written.splitlines()) <= 220, "split the page, or say it in fewer words"
