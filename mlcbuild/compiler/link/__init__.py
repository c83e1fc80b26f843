"""Object files to libraries: code generated and linked, static archives, and what the result says of itself."""
