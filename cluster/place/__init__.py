"""Commands about where experts are: plans, moves, drains, rollbacks, and traces of the load."""
