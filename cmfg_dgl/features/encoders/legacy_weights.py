"""Weights from a legacy `.pth` file, read without executing the pickles inside it."""

from __future__ import annotations

import pickletools
import struct
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmfg_dgl.errors import DataError
from cmfg_dgl.files import sha256_bytes

__all__ = ["load_legacy_weights"]

_DTYPES = {"torch FloatStorage": "<f4", "torch LongStorage": "<i8"}


def load_legacy_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the state dictionary of a file that `torch.save` wrote before it wrote zip archives.

    Such a file is four pickles (magic number, protocol version, system, state dictionary), a pickle with the
    list of storage keys, and for each key an int64 count of elements and the elements, all little-endian.

    Parameters
    ----------
    path
        The file.
    sha256
        The hexadecimal SHA-256 that the file must have.

    Returns
    -------
    dict of str to Tensor
        Parameter name to its own copy of the values, float32 or int64.

    Raises
    ------
    DataError
        If the file cannot be read or is not the pinned one.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; reinstall the package that ships it") from error
    if sha256_bytes(data) != sha256:
        raise DataError(f"{path}: its SHA-256 is not {sha256[:12]}...; reinstall the package that ships it")
    stream = BytesIO(data)
    *_, references, keys = [_describe(stream) for _ in range(5)]
    # A reference is (storage, offset, shape, stride, ...); a storage ("storage", dtype, key, device, count).
    dtypes = {storage[2]: _DTYPES[storage[1]] for storage, *_ in references.values()}
    start = stream.tell()
    storages = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", data, start)
        array = np.frombuffer(data, dtypes[key], count, start + 8)
        storages[key] = torch.from_numpy(array.copy())
        start += 8 + array.nbytes
    return {
        name: storages[storage[2]].as_strided(shape, stride, offset).clone()
        for name, (storage, offset, shape, stride, *_) in references.items()
    }


def _describe(stream: BytesIO) -> Any:
    """Read one pickle as plain numbers, strings, lists, tuples and dictionaries; call nothing it names."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO" | "STOP" | "BINPERSID":
                pass
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE" | "GLOBAL":
                stack.append(argument)
            case "NONE" | "NEWFALSE" | "NEWTRUE":
                stack.append({"NONE": None, "NEWFALSE": False, "NEWTRUE": True}[opcode.name])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "REDUCE":
                # The call is left out: an ordered dictionary stays a dictionary, a tensor its arguments.
                arguments, function = stack.pop(), stack.pop()
                stack.append({} if function == "collections OrderedDict" else arguments)
            case "BUILD":
                stack.pop()
            case name:
                raise DataError(f"pickle opcode {name} has no place in a file of weights")
    return stack[-1]
