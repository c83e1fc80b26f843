"""A workspace and what is done with it: opened, built into dist/, published, looked after."""
