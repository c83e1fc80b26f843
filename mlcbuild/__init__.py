"""mlcbuild: declarative builds of compiled language models."""

__version__ = "0.1.0"
