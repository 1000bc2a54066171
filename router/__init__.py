"""Turns requests into tokens; uses experts as a service and knows nothing of the cluster around it."""
