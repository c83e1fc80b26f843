"""A stand-in for measure."""

from __future__ import annotations

from mlcbuild.engine.job import Job
from tests.engine.toysteps import common

VERSION = 1
TOOLS = ("numpy",)


def run(job: Job) -> None:
    # What the step is for.
    common.run(job, "measure")
