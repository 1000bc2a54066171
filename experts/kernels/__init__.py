"""Products in C for CPUs: compiled where they run, and replaceable by torch at any time."""
