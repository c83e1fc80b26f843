"""The pieces behind `scripts/train_stories.py`: a grammar that writes stories, and a model trained on them."""
