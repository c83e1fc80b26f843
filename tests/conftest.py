"""What all tests of a run share, and in which order their files are handed to the workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mlcbuild import zig

# Files that take minutes begin first: one that begins last would keep one worker busy while the others have ended.
FIRST = (
    *("architectures/test_agreement.py", "emulation/test_cuda.py", "targets/test_browser.py"),
    *("end_to_end/test_gpu_targets.py", "end_to_end/test_verify_methods.py", "compiler/test_gpu_attention.py"),
    *("targets/test_cross_built.py", "end_to_end/test_packages.py", "end_to_end/test_kills.py"),
    *("doit_face/test_doit.py", "compiler/test_decoder.py", "workspace/test_fastpath.py", "engine/test_shared.py"),
)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        # A core for each worker: torch's threads, and those of numpy's products, wait for one another by spinning.
        # How many threads TVM has is for each test to say, and for each build that it starts.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # xdist would begin with the files of most tests; ours of few are those that take long.
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    places = {folder / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def of_the_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the workers of a run have in common."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def compiled_once(of_the_run: Path) -> None:
    """Every C kernel once in a run, whichever worker or process of a test needs it first."""
    os.environ[zig.SHARED] = str(of_the_run / "zig")


@pytest.fixture(scope="session")
def shared_cache(of_the_run: Path) -> Path:
    """One cache for all tests that do not need their own: what several build, the first of them builds."""
    return of_the_run / "shared-cache"
