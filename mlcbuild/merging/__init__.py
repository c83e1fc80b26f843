"""Two checkpoints made one: a delta and its base, a base and its LoRA adapter."""
