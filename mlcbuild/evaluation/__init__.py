"""How good a package is, by the measures that people compare models with."""
