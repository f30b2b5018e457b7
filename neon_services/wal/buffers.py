"""The address of a Python buffer for a C call, without copying it."""

import ctypes

import numpy as np


def address_of(data: bytes | bytearray | memoryview) -> bytes | int | None:
    """Something ctypes passes as ``const void *``: the first byte of the buffer.

    The caller keeps `data` alive and unresized during the call. bytes go as they are, which is the fastest way; other
    contiguous buffers by their address. None for an empty buffer.
    """
    if type(data) is bytes:
        return data
    if not len(data):
        return None
    if isinstance(data, memoryview) and data.readonly:
        return int(np.frombuffer(data, np.uint8).__array_interface__["data"][0])
    return ctypes.addressof(ctypes.c_char.from_buffer(data))
