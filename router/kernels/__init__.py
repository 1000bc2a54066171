"""Attention in C for CPUs: compiled where it runs, and replaceable by torch at any time."""
