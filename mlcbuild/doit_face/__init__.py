"""Steps and goals as doit's tasks, for when there is something to do or to ask."""
