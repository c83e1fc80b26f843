"""The real one."""

from __future__ import annotations

from mlcbuild.engine.job import Job

VERSION = 1
CODE = ("mlcbuild.steps.download",)
TOOLS = ()


def run(job: Job) -> None:
    from mlcbuild.steps import download

    download.run(job)
