"""Installed packages, described for people and programs, and uploaded to a hub."""
