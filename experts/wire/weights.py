"""An expert's weights as frames, from one host to another. Knows no network.

What comes is checked before memory is taken: the size is that which the receiver's own config gives an expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from google.protobuf.message import DecodeError

from experts.errors import BadFrame
from experts.ffn import ExpertWeights
from experts.link_terms import LinkTerms
from experts.memory import view_of
from experts.placement import ExpertKey
from experts.slot import Checksum, Slot, checksum_of
from experts.wire.codec import decode_error, decode_mismatch, hello_of, mismatch
from experts.wire.expert_pb2 import ExpertKey as ExpertKeyMessage
from experts.wire.expert_pb2 import Piece, Want
from experts.wire.frames import Frame, Header, Kind, join, split

PIECE_BYTES = 1 << 20


def encode_want(terms: LinkTerms, name: str, key: ExpertKey) -> bytes:
    """What host `name` says to be given expert `key`."""
    want = Want(hello=hello_of(terms, name), key=ExpertKeyMessage(layer=key[0], expert=key[1]))
    return join(Header(Kind.WANT), want.SerializeToString())


def decode_want(message: bytes, terms: LinkTerms, peer: str) -> tuple[ExpertKey, str]:
    """The expert that is wanted, and what of the other end differs from `terms`; empty: nothing. Raises BadFrame."""
    frame = split(message, peer)
    if frame.header.kind != Kind.WANT or len(frame.rows):
        raise BadFrame(peer, "an expert must be asked for")
    try:
        want = Want.FromString(bytes(frame.part))
    except DecodeError as error:
        raise BadFrame(peer, "an unreadable Want") from error
    return (want.key.layer, want.key.expert), mismatch(want.hello, terms)


def encode_pieces(slot: Slot, incarnation: int) -> Iterator[bytes]:
    """All of a slot's weights, piece by piece."""
    gate_up, down = view_of(slot.weights.gate_up_FH.cpu()), view_of(slot.weights.down_HF.cpu())
    offset, total = 0, len(gate_up) + len(down)
    for part in (gate_up, down):
        for begin in range(0, len(part), PIECE_BYTES):
            rows = part[begin : begin + PIECE_BYTES]
            piece = Piece(
                offset=offset,
                total_bytes=total,
                gate_up_checksum=slot.checksum[0],
                down_checksum=slot.checksum[1],
            )
            yield join(Header(Kind.PIECE, incarnation), piece.SerializeToString(), rows)
            offset += len(rows)


def decode_pieces(messages: Iterable[bytes], terms: LinkTerms, expert_size: int, peer: str) -> ExpertWeights:
    """The expert that `messages` carry. Raises BadFrame, and whatever the other end answers instead."""
    weights = ExpertWeights(
        gate_up_FH=torch.empty(2 * expert_size, terms.hidden_size, dtype=terms.dtype),
        down_HF=torch.empty(terms.hidden_size, expert_size, dtype=terms.dtype),
    )
    parts = (view_of(weights.gate_up_FH), view_of(weights.down_HF))
    offset, told = 0, None
    for message in messages:
        frame = split(message, peer)
        piece = _decode_piece(frame, offset, weights.num_bytes, peer)
        _copy(frame.rows, offset, parts, peer)
        offset += len(frame.rows)
        told = (piece.gate_up_checksum, piece.down_checksum)
    _check_whole(weights, offset, told, peer)
    return weights


def _decode_piece(frame: Frame, offset: int, total: int, peer: str) -> Piece:
    if frame.header.kind == Kind.ERROR:
        # The answer to a want that does not fit has no number, and neither has any other.
        raise decode_error(frame, peer) if frame.header.incarnation else BadFrame(peer, decode_mismatch(frame, peer))
    if frame.header.kind != Kind.PIECE:
        raise BadFrame(peer, "a piece of an expert is expected")
    try:
        piece = Piece.FromString(bytes(frame.part))
    except DecodeError as error:
        raise BadFrame(peer, "an unreadable Piece") from error
    if piece.total_bytes != total:
        raise BadFrame(peer, f"an expert of {piece.total_bytes} bytes where one has {total}")
    if piece.offset != offset or not 0 < len(frame.rows) <= total - offset:
        raise BadFrame(peer, f"{len(frame.rows)} bytes from {piece.offset} on where {offset} have come of {total}")
    if not frame.rows_are_sound():
        raise BadFrame(peer, "weights that were damaged on their way")
    return piece


def _copy(rows: memoryview, offset: int, parts: tuple[memoryview, memoryview], peer: str) -> None:
    place, part = (offset, parts[0]) if offset < len(parts[0]) else (offset - len(parts[0]), parts[1])
    if place + len(rows) > len(part):
        raise BadFrame(peer, "a piece that is of two matrices")
    part[place : place + len(rows)] = rows


def _check_whole(weights: ExpertWeights, num_bytes: int, told: Checksum | None, peer: str) -> None:
    if num_bytes != weights.num_bytes:
        raise BadFrame(peer, f"an expert that ends after {num_bytes} of {weights.num_bytes} bytes")
    if checksum_of(weights) != told:
        raise BadFrame(peer, "weights that are not those that the sender loaded")
