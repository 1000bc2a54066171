"""Bytes on the wire: generated messages and the codec between them and our dataclasses."""
