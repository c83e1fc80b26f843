"""A structure, a quantization and a target in; a compiled library out."""
