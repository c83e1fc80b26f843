"""RWKV and Mamba: models whose state does not grow with the text."""
