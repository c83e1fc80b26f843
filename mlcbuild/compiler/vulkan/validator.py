"""Kernels given to spirv-val, where there is one: it knows the rules of SPIR-V and of Vulkan."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mlcbuild.compiler.vulkan import packing
from mlcbuild.compiler.vulkan.kernel import Kernel
from mlcbuild.errors import MlcBuildError

_ENVIRONMENT = "vulkan1.0"


def validate(kernels: Sequence[Kernel], scratch: Path) -> None:
    """Raise MlcBuildError, with what spirv-val says, for the first kernel that it does not accept.

    Without spirv-val on the search path nothing is done: bytes do not depend on it.
    """
    program = shutil.which("spirv-val")
    if program is None:
        return
    path = scratch / "kernel.spv"
    for each in kernels:
        path.write_bytes(packing.binary(each))
        command = [program, "--target-env", _ENVIRONMENT, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).replace(str(path), path.name)
            raise MlcBuildError(
                f"kernel {each.name}: spirv-val does not accept it ({done.returncode}):\n{said[-4000:]}"
            )
