"""Running packages: logits, text and chat from a library and its weights, with TVM's runtime library only.

from mlcbuild.runtime import load
model = load("dist/stories-cpu")
model.generate("Once upon a time", max_tokens=60)
"""

from mlcbuild.runtime.model import Model, load
from mlcbuild.runtime.session import Session

__all__ = ["Model", "Session", "load"]
