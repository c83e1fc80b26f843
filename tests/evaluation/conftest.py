"""The tiny model of the runtime's tests."""

from tests.runtime.conftest import reference, tiny, tiny_library, tiny_package, tokenizer

__all__ = ["reference", "tiny", "tiny_library", "tiny_package", "tokenizer"]
