"""A whole cluster in one process, on virtual time and a network whose faults a seed draws: it looks for bugs."""
