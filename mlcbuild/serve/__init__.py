"""`mlcbuild serve`: packages behind OpenAI's HTTP interface."""
