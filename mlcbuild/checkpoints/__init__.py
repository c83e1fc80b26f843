"""Reading Hugging Face checkpoints: their files, the tensors in them, and where they come from."""
