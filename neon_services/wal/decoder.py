"""The WAL decoder of pageservers: WAL bytes in, columns out. The work is one C call per chunk.

Invariant: the batches, put one after another, are the same whatever way the stream was cut into chunks, and no record is
in a batch before its last byte has arrived and its CRC was found right.
"""

import ctypes

import numpy as np

from neon_services.ground.lsn import WAL_SEGMENT_SIZE, Lsn, align_lsn, format_lsn
from neon_services.wal.buffers import address_of
from neon_services.wal.libraries import load_waldec
from neon_services.wal.records import (
    IMPLIED_BLOCK_ID,
    RECORD_DTYPE,
    REF_DATA,
    REF_DTYPE,
    REF_FPI,
    REF_IMAGE,
    REF_IMPLIED_VM,
    REF_WILL_INIT,
    STOP_NO_MEMORY,
    WalBatch,
    WalDecodeError,
    check_segment_size,
)

__all__ = [
    "IMPLIED_BLOCK_ID",
    "RECORD_DTYPE",
    "REF_DATA",
    "REF_DTYPE",
    "REF_FPI",
    "REF_IMAGE",
    "REF_IMPLIED_VM",
    "REF_WILL_INIT",
    "WalBatch",
    "WalDecodeError",
    "WalDecoder",
]


class _Result(ctypes.Structure):
    _fields_ = [
        ("records", ctypes.c_uint64),
        ("nrecords", ctypes.c_uint64),
        ("refs", ctypes.c_uint64),
        ("nrefs", ctypes.c_uint64),
        ("blob", ctypes.c_uint64),
        ("blob_len", ctypes.c_uint64),
        ("position", ctypes.c_uint64),
        ("record_end", ctypes.c_uint64),
    ]


def _bind(pg_major: int) -> ctypes.CDLL:
    library = load_waldec(pg_major)
    library.waldec_new.restype = ctypes.c_void_p
    library.waldec_new.argtypes = [ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int]
    library.waldec_free.restype = None
    library.waldec_free.argtypes = [ctypes.c_void_p]
    library.waldec_feed.restype = ctypes.c_int
    library.waldec_feed.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    library.waldec_result.restype = None
    library.waldec_result.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Result)]
    library.waldec_consume.restype = None
    library.waldec_consume.argtypes = [ctypes.c_void_p]
    library.waldec_error.restype = ctypes.c_char_p
    library.waldec_error.argtypes = [ctypes.c_void_p]
    return library


class WalDecoder:
    """Decodes one timeline's WAL of one Postgres major from a start LSN on.

    `start_lsn` is the start of a record, of a page or of a segment; at a page start a leading tail of an older record is
    skipped. The decoder holds at most the rows of one feed and one unfinished record.
    """

    def __init__(self, start_lsn: int, pg_major: int, *, segment_size: int = WAL_SEGMENT_SIZE, verify_crc: bool = True) -> None:
        check_segment_size(segment_size)
        self._library = _bind(pg_major)
        self._handle: int | None = self._library.waldec_new(start_lsn, segment_size, int(verify_crc))
        if self._handle is None:
            raise MemoryError("no memory for a WAL decoder")
        self._result = _Result()
        self._result_ref = ctypes.byref(self._result)
        self.position = Lsn(start_lsn)
        """LSN of the next input byte."""
        self.next_lsn = align_lsn(start_lsn)
        """End of the last complete record."""

    def feed(self, data: bytes | bytearray | memoryview) -> WalBatch:
        """Consume all of the chunk and return what it completed.

        Raises WalDecodeError at the first byte that is not WAL: the records before it are lost to this feed, but decoding
        can start anew at `next_lsn` once there are right bytes. Chunks of 128 KiB to 4 MiB are the efficient ones.
        """
        handle = self._handle
        if handle is None:
            raise ValueError("the WAL decoder is closed")
        length = len(data)
        status = self._library.waldec_feed(handle, address_of(data), length)
        if status:
            text = self._library.waldec_error(handle).decode()
            if status == STOP_NO_MEMORY:
                raise MemoryError(text)
            raise WalDecodeError(f"{text} (decoding from {format_lsn(self.next_lsn)})", status)
        result = self._result
        self._library.waldec_result(handle, self._result_ref)
        batch = WalBatch(
            records=np.frombuffer(ctypes.string_at(result.records, result.nrecords * RECORD_DTYPE.itemsize), RECORD_DTYPE),
            refs=np.frombuffer(ctypes.string_at(result.refs, result.nrefs * REF_DTYPE.itemsize), REF_DTYPE),
            blob=ctypes.string_at(result.blob, result.blob_len),
            next_lsn=Lsn(result.record_end),
        )
        self._library.waldec_consume(handle)
        self.position = Lsn(result.position)
        self.next_lsn = batch.next_lsn
        return batch

    def close(self) -> None:
        """Free the decoder. Idempotent."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self._library.waldec_free(handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()
