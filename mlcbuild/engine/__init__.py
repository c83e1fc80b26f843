"""One step brought up to date: its key, its lookup, its process, its artifact. Nothing here knows of models."""
