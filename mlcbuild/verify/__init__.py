"""A text through a model, one layer after the other: what calibration measures, and verification beyond memory."""
