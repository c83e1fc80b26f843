"""Steps brought up to date: looked up in the cache, run in a process of their own, committed, installed, explained."""
