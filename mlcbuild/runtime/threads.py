"""How many threads a library's kernels run on, and how TVM is told.

Measured with TVM 0.27: its pool belongs to the calling thread, starts at the first parallel kernel with half of the
logical CPUs (one thread on two cores), and binds that pool *and the caller* to the first cores of the machine, even to
cores outside the caller's affinity mask. The pool never grows afterwards.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

from mlcbuild import host
from mlcbuild.errors import MlcBuildError
from mlcbuild.runtime import tvm_runtime

ENVIRONMENT = "TVM_NUM_THREADS"
_SHARE_ALL_CORES = -3  # AffinityMode kSpecifyThreadShareAllCore of TVM's threading_backend.h
_CPUS = host.SYS / "devices/system/cpu"
_CGROUP2, _CGROUP1 = host.SYS / "fs/cgroup/cpu.max", host.SYS / "fs/cgroup/cpu"
_configured = threading.local()


def choose(wanted: int | None = None) -> int:
    """The number of threads: `wanted`, else TVM_NUM_THREADS, else the physical cores that this process may use.

    A container's CPU quota counts as that many cores.

    Raises MlcBuildError for a number below 1.
    """
    text = str(wanted) if wanted is not None else os.environ.get(ENVIRONMENT)
    if text is None:
        return min(physical_cores(host.processors()), _quota())
    if not text.isdecimal() or int(text) < 1:
        source = "threads" if wanted is not None else ENVIRONMENT
        raise MlcBuildError(f"{source} is {text}: expected a whole number of at least 1")
    return int(text)


def physical_cores(cpus: Iterable[int]) -> int:
    """How many cores the logical `cpus` lie on: a second hardware thread adds nothing to a matrix product."""
    cores = {_core(cpu) for cpu in cpus}
    return max(len(cores), 1)


def configure(count: int) -> int:
    """Give the calling thread a pool of `count` threads, bound to no core; the number it really has.

    It is smaller than `count` where this thread has already run kernels on fewer: a pool cannot grow.
    """
    if getattr(_configured, "count", None) != count:
        _configured.count = count
        _configured.actual = _configure(count)
    actual: int = _configured.actual
    return actual


def _configure(count: int) -> int:
    bind = os.environ.get("TVM_BIND_THREADS")
    os.environ["TVM_BIND_THREADS"] = bind or "0"
    try:
        # The list's length is the pool's size; which CPUs it names is not looked at while nothing is bound.
        cpus = _names(host.processors(), count)
        tvm_runtime.function("runtime.config_threadpool")(_SHARE_ALL_CORES, count, cpus)
    finally:
        if bind is None:
            del os.environ["TVM_BIND_THREADS"]
    return int(tvm_runtime.function("runtime.NumThreads")())


def _names(cpus: list[int], count: int) -> list[str]:
    return [str(cpus[i % len(cpus)]) for i in range(count)]


def _quota() -> int:
    """Whole CPUs that the control group grants (v2 `cpu.max`, v1 `cpu.cfs_quota_us`); very many without a limit."""
    try:
        if _CGROUP2.exists():
            quota, period = _CGROUP2.read_text().split()
        else:
            quota, period = ((_CGROUP1 / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return max(int(quota) // int(period), 1) if quota.isdecimal() else 1 << 16
    except (OSError, ValueError):
        return 1 << 16


def _core(cpu: int) -> tuple[str, str]:
    topology = _CPUS / f"cpu{cpu}" / "topology"
    try:
        return (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    except OSError:
        return ("", str(cpu))
