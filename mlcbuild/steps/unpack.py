"""unpack: a checkpoint of llama.cpp's files: config.json and the tokenizer are made of them, the weights stay in them.

Inputs: files (*.gguf); tokenizer, where another checkpoint's is wanted. Artifact: the files; config.json,
tokenizer.json, tokenizer_config.json, generation_config.json, or those that `tokenizer` has in place of all but the
first.
"""

from __future__ import annotations

import json

from mlcbuild.engine.job import Job
from mlcbuild.gguf import checkpoint

VERSION = 1
TOOLS = ()


def run(job: Job) -> None:
    """Raises CheckpointError for damaged files, for an architecture and for a tokenizer that are not known."""
    files = job.inputs["files"].files
    paths = {name: entry.path for name, entry in files.items()}
    other = job.inputs["tokenizer"].files if "tokenizer" in job.inputs else {}
    header = checkpoint.read(paths)
    for name, content in checkpoint.small_files(header, paths, with_tokenizer=not other).items():
        (job.output / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name, entry in {**other, **files}.items():
        job.reuse(entry, name)
