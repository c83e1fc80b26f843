"""`mlcbuild chat`: a conversation with a package on the terminal, or through a pipe."""
