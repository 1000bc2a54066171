"""Places, heals, launches and observes the processes that serve a checkpoint."""
