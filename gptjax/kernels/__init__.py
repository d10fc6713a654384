"""Fast forms of some computations, each beside the plain one that it must equal."""
