"""Moving a branch from one cell to another while it sells: the protocol, what is copied, and the file of cells."""
