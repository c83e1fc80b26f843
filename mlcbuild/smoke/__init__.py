"""`mlcbuild test-run`: a recipe proven on a small random model of its architecture, before any download."""
