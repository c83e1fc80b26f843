"""package, for browsers: the same step as steps/package.py, and chat.html beside the library."""

from __future__ import annotations

from mlcbuild.compiler.web.try_out.page import chat_page
from mlcbuild.engine.job import Job
from mlcbuild.steps import package

VERSION = 1
CODE = ("mlcbuild.chat", "mlcbuild.compiler.web.try_out", "mlcbuild.steps.package")
TOOLS = ("jinja2", "sentencepiece")


def run(job: Job) -> None:
    """Fields, inputs and errors are package's."""
    package.run(job)
    stem = f"{job.fields['model']}-{job.fields['quantization']}"
    page = chat_page(stem, f"{stem}-MLC", f"{stem}-{job.fields['target']}.wasm")
    (job.output / "chat.html").write_text(page, encoding="utf-8")
