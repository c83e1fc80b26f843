"""The checkpoint's files: those of a local folder as they lie, those of a hub repository fetched at one commit."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from pathlib import Path

from mlcbuild.engine.job import Job
from mlcbuild.errors import CheckpointError

VERSION = 1
TOOLS = ()
CODE_COUNTS = False  # what fetches the files cannot change what they are: their digests are in the key

_KEPT = 30 * 24 * 3600  # seconds: an unfinished download that nobody has gone on with for so long is given up


def run(job: Job) -> None:
    """Artifact: the checkpoint's files under their own names. Local ones are referred to, never copied.

    fields: none for a local folder (input `files`) or GGUF files (an input for each, under its name); `repo`, `commit`,
    `files` (name -> sha256, size) for a hub's.
    Raises CheckpointError when the hub's files are not the locked ones, and for a folder without any.
    """
    if "repo" in job.fields:
        from mlcbuild.checkpoints import hub
        from mlcbuild.recipes.types import LockedFile

        files = {name: LockedFile(**info) for name, info in job.fields["files"].items()}
        # One folder for one set of files, and one lock for this step's key: nobody else writes there.
        name = hashlib.sha256(json.dumps(job.fields, sort_keys=True).encode()).hexdigest()[:32]
        _sweep(job.partial)
        hub.fetch(job.fields["repo"], job.fields["commit"], files, job.output, job.progress, partial=job.partial / name)
        return
    given = {name: entry for tree in job.inputs.values() for name, entry in tree.files.items()}
    if not given:
        raise CheckpointError("the folder has nothing that is read of a checkpoint: no config.json, no *.safetensors")
    for name, entry in given.items():
        job.reuse(entry, name)


def _sweep(folder: Path) -> None:
    for old in folder.glob("*") if folder.is_dir() else ():
        if time.time() - max(path.stat().st_mtime for path in (old, *old.glob("*"))) > _KEPT:
            shutil.rmtree(old, ignore_errors=True)
