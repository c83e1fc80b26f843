"""llama.cpp's files as checkpoints: their header, the config.json and tokenizer that follow from it, their tensors."""
