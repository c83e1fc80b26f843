"""Libraries for machines that are not here: what they are, and what they compute where an emulator runs them."""
