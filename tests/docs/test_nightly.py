"""The workflow and the units of docs/nightly.md: well-formed, and made of commands and variables that there are."""

from __future__ import annotations

import configparser
import re
import shlex
from typing import Any

import yaml

from mlcbuild.doit_face.variables import NAMES
from tests.docs.pages import DOCS, blocks

BLOCKS = list(blocks((DOCS / "nightly.md").read_text()))


def test_the_workflow_is_well_formed_and_runs_at_night() -> None:
    (text,) = [block.text for block in BLOCKS if block.language == "yml"]
    workflow: Any = yaml.safe_load(text)
    (job,) = workflow["jobs"].values()
    assert workflow[True]["schedule"] == [{"cron": "30 2 * * *"}]  # YAML 1.1 reads `on` as true
    assert all(("uses" in step) != ("run" in step) for step in job["steps"])
    used = [step["with"]["path"] for step in job["steps"] if "actions/cache" in step.get("uses", "")]
    assert "cache" in used[0].split() and "nights.jsonl" in used[0].split()


def test_the_timer_starts_the_service() -> None:
    units = [block.text for block in BLOCKS if block.language == "ini"]
    service, timer = (configparser.ConfigParser(interpolation=None) for _ in units)
    service.read_string(units[0])
    timer.read_string(units[1])
    assert service["Service"]["Type"] == "oneshot"
    assert timer["Install"]["WantedBy"] == "timers.target"
    assert "mlcbuild.service" in units[0] and "mlcbuild.timer" in units[1]


def test_every_build_continues_and_every_variable_exists() -> None:
    text = (DOCS / "nightly.md").read_text()
    commands = [shlex.split(found) for found in re.findall(r"\bdoit (.*build.*)$", text.replace("`", ""), re.MULTILINE)]
    assert len(commands) >= 4
    for words in commands:
        assert words.index("--continue") < words.index("build"), "doit's option stands before the task"
        assert {word.partition("=")[0] for word in words if "=" in word} <= set(NAMES)


def test_the_cluster_page_is_made_of_what_there_is() -> None:
    page = list(blocks((DOCS / "cluster.md").read_text()))
    operator, ci = (yaml.safe_load(block.text) for block in page if block.language == "yml")
    assert {"worker", "scheduler"} == set(operator["spec"])
    stages = [
        stage for stage in ("weights", "libraries", "packages") if f").{stage} }}" in yaml.dump(ci["jobs"][stage])
    ]
    assert stages == [name for name in ci["jobs"] if name != "plan"]
    (script,) = [block.text for block in page if block.language == "python"]
    compile(script, "cluster.md", "exec")
    commands = re.findall(r"\bdoit [a-z$].*", "".join(block.text for block in page) + script)
    for words in map(str.split, commands):
        assert {word.partition("=")[0] for word in words if "=" in word} <= set(NAMES)
