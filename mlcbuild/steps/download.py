"""The checkpoint's files: those of a local folder as they lie, those of a hub repository fetched at one commit."""

from __future__ import annotations

from mlcbuild.steps.job import Job

VERSION = 1
CODE = ()
TOOLS = ()  # neither code nor tools can change what the files are: their digests are in the key


def run(job: Job) -> None:
    """Artifact: the checkpoint's files under their own names. Local ones are referred to, never copied.

    fields: none for a local folder (input `files`); `repo`, `commit`, `files` (name -> sha256, size) for a hub's.
    Raises CheckpointError when the hub's files are not the locked ones.
    """
    if "repo" in job.fields:
        from mlcbuild.checkpoints import hub

        files = {name: hub.FileInfo(**info) for name, info in job.fields["files"].items()}
        hub.fetch(job.fields["repo"], job.fields["commit"], files, job.output, job.progress)
        return
    for name, entry in job.inputs["files"].files.items():
        job.reuse(entry, name)
