"""Tensors as the bytes that they are."""

from __future__ import annotations

import ctypes

import torch


def memory_of(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """Where a contiguous tensor of the CPU lies, without a copy: use it no longer than `tensor`."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


def view_of(tensor: torch.Tensor) -> memoryview:
    """The same as a view that can be cut, written to, and keeps `tensor`. numpy knows no bfloat16, so it sees bytes."""
    view: memoryview = tensor.contiguous().view(-1).view(torch.uint8).numpy().data
    return view
