"""The functions of a library that are not the model: logit processing, sampling helpers, allocation, metadata."""
