"""What the user sees while a build runs."""
