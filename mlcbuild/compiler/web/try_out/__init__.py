"""What a package for browsers brings to be tried with."""
