"""Breaks a running cluster on purpose, under load, and judges what its users saw of it."""
