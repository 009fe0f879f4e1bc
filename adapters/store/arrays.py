"""Named arrays to bytes and back, in the safetensors format."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from adapters.errors import CandidateRejected
from adapters.gate import Gate
from engine import HeadTable

# safetensors' NumPy reader knows no bfloat16, and its writer ignores strides.
_CODES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
}


def pack(arrays: Mapping[str, np.ndarray]) -> bytes:
    """Bytes of the arrays, whatever their strides. Raises CandidateRejected for a type unknown to
    the format.
    """
    for name, array in arrays.items():
        if array.dtype not in _CODES.values():
            known = ", ".join(str(dtype) for dtype in _CODES.values())
            raise CandidateRejected(f"{name} is {array.dtype}; use one of {known}")
    return save({name: np.asarray(array, order="C") for name, array in arrays.items()})


def unpack(data: bytes) -> dict[str, np.ndarray]:
    """The inverse, read-only. Raises ValueError when the bytes are not of this format."""
    try:
        tensors: list[tuple[str, dict[str, Any]]] = deserialize(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    arrays: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        array = np.frombuffer(bytes(tensor["data"]), _CODES[tensor["dtype"]])
        arrays[name] = array.reshape(tensor["shape"])
    return arrays


def pack_table(table: HeadTable) -> bytes:
    return pack({field.name: getattr(table, field.name) for field in fields(table)})


def unpack_table(data: bytes) -> HeadTable:
    return HeadTable(**unpack(data))


def pack_gate(gate: Gate) -> bytes:
    """Numbers travel as arrays without axes, in double precision."""
    return pack({field.name: np.asarray(getattr(gate, field.name)) for field in fields(gate)})


def unpack_gate(data: bytes) -> Gate:
    values: dict[str, Any] = {
        name: array if array.ndim else array.item() for name, array in unpack(data).items()
    }
    return Gate(**values)
