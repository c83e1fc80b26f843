"""Numeric formats: which parameters a quantization packs, how, and the files the packed parameters are written to."""
