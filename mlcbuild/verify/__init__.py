"""Judging a package: figures beside the unquantized model's, bounds, a text through a model layer by layer."""
