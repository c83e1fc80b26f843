"""The `mlcbuild` command."""
