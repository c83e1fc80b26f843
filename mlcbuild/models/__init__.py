"""What a model is made of: its structure, its parameters, and the decoder that computes it."""
