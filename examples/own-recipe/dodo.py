"""The tasks of this workspace: `doit list`, `doit build`, `doit build recipe=NAME`."""

from mlcbuild.tasks import *  # noqa: F403
