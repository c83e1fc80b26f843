"""runtime: TVM's runtime for browsers as WebAssembly objects, which every library for them is linked to.

Fields: emscripten (its version), sources (a TVM tree of the user's; empty: the installed wheels'). Artifact: *.o.
"""

from __future__ import annotations

from mlcbuild.engine.job import Job

VERSION = 1
TOOLS = ("apache-tvm", "apache-tvm-ffi")


def run(job: Job) -> None:
    """Raises MlcBuildError with emcc's own message when it fails."""
    from mlcbuild.compiler.web import emscripten

    job.note("compiling TVM's runtime for browsers, once: one to five minutes")
    emscripten.compile_runtime(job.output, job.scratch)
