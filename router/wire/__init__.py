"""Bytes between ingress and router: generated messages and the codec between them and our dataclasses."""
