"""What contributors rely on: the workflow runs .ci/run, hooks are those of CI, the changelog keeps its form."""

from __future__ import annotations

import os
import re
import tomllib
from typing import Any

import yaml

from mlcbuild import __version__
from tests.docs.pages import ROOT

CI = (ROOT / ".ci" / "run").read_text()


def test_the_workflow_runs_what_anybody_can_run() -> None:
    workflow: Any = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = workflow["jobs"]["test"]["steps"]
    assert steps[-1] == {"run": ".ci/run"}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_hooks_are_the_linters_of_ci_and_the_tables() -> None:
    configuration: Any = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    (local,) = configuration["repos"]
    assert local["repo"] == "local", "tools come from the extra `lint`, in one version"
    programs = [hook["entry"].split()[:2] for hook in local["hooks"]]
    assert programs == [["ruff", "check"], ["ruff", "format"], ["mypy"], ["python", "scripts/supported.py"]]
    for linter in ("ruff check", "ruff format --check", "mypy", "python scripts/size.py"):
        assert f"\n.venv/bin/{linter}" in CI


def test_the_changelog_has_the_form_that_it_names_and_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == f"[Unreleased]: {__version__}" or versions[0].startswith(f"[{__version__}] - ")
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_package_says_that_it_has_types() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (ROOT / "mlcbuild" / "py.typed").exists() and "Typing :: Typed" in project["classifiers"]
    assert project["version"] == __version__
