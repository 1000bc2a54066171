"""How fast the parts are, and how fast this machine would let them be."""
