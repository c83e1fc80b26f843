"""RWKV: models whose state does not grow with the text."""
