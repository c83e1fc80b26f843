"""Recipes -> steps, each once."""
