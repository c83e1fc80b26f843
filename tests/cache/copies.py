"""A step that writes its input several times."""

from __future__ import annotations

from mlcbuild.engine.job import Job

VERSION = 1
TOOLS = ()


def run(job: Job) -> None:
    content = job.inputs["file"].path("file").read_bytes()
    for number in range(job.fields["times"]):
        (job.output / f"{number}.txt").write_bytes(content + str(number).encode())
