"""The real one."""

from __future__ import annotations

from mlcbuild.engine.job import Job

VERSION = 1
TOOLS = ()
CODE_COUNTS = False  # what fetches the files cannot change what they are: their digests are in the key


def run(job: Job) -> None:
    from mlcbuild.steps import download

    download.run(job)
