"""Steps of the real kinds that do next to nothing, for tests of everything around them."""
