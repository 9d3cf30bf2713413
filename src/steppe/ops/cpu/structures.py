"""The structs of steppe_native.h, mirrored field by field."""

from __future__ import annotations

import ctypes

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class WatchStructure(ctypes.Structure):
    """``steppe_watch``: memory that is watched for writes."""

    _fields_ = (("start", _POINTER), ("bytes", _SIZE), ("edges", _POINTER))


class Copied(ctypes.Structure):
    """``steppe_copied``: a watched weight, and the generation of its cached copy."""

    _fields_ = (("watch", _POINTER), ("generation", _POINTER), ("made_in", _SIZE))


class MatrixStructure(ctypes.Structure):
    """``steppe_matrix``: a matrix that rows are gathered from."""

    _fields_ = (
        ("m", _POINTER),
        *((name, _SIZE) for name in ("rows", "columns", "row_stride", "column_stride")),
        ("panels", _POINTER),
    )


class BlockStructure(ctypes.Structure):
    """``steppe_block``: a block as decoding reads it."""

    _fields_ = (
        *((name, _POINTER) for name in ("w", "w_bias", "up", "up_bias", "v", "v_bias")),
        *((name, _SIZE) for name in ("w_stride", "up_stride", "v_stride", "width", "hidden")),
        *((name, _POINTER) for name in ("bytes", "bounds", "copies")),
        ("copy_count", _SIZE),
        ("dtype", ctypes.c_int),
    )


class DecodeCallStructure(ctypes.Structure):
    """``steppe_decode_call``: the settings of a decode call."""

    _fields_ = (
        ("block", _POINTER),
        *((name, _SIZE) for name in ("rows", "most_candidates", "most")),
        *((name, ctypes.c_float) for name in ("alpha", "beta")),
        ("threads", ctypes.c_int),
    )


STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "watch": WatchStructure,
    "copied": Copied,
    "matrix": MatrixStructure,
    "block": BlockStructure,
    "decode_call": DecodeCallStructure,
}
