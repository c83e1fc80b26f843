"""A stand-in for lower."""

from __future__ import annotations

from mlcbuild.steps.job import Job
from tests.execution.toysteps import common

VERSION = 1
CODE = ("tests.execution.toysteps.common",)
TOOLS = ("numpy",)


def run(job: Job) -> None:
    # What the step is for.
    common.run(job, "lower")
