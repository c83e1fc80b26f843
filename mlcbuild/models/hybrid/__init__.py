"""Models whose layers are of several kinds: some with attention, some with a state of one size."""
