"""A checkpoint looked at: what it is, what a package of it takes, and the model file that builds it."""
