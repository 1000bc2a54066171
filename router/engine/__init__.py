"""Continuous batching: which tokens are computed in which step, and what comes of them."""
