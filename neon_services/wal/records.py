"""What decoded WAL looks like: the rows, the batch and the error that the C decoder, the oracle and the scanner share.

Invariant: the dtypes here are, byte for byte, RecRow and RefRow of postgres_ext/waldec/waldec.h.
"""

from dataclasses import dataclass

import numpy as np

from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import XLOG_BLCKSZ, Lsn

# One WAL record, 48 bytes. `blob_off` is where its entry [u64 end_lsn][raw record][pad to 8] begins in the batch's blob, so the
# raw record is at blob_off + 8, its header field xl_prev (u64) at blob_off + 16, its main data at blob_off + 8 + main_off.
RECORD_DTYPE = np.dtype(
    [
        ("start_lsn", "<u8"),
        ("end_lsn", "<u8"),
        ("blob_off", "<u4"),
        ("tot_len", "<u4"),
        ("xid", "<u4"),
        ("main_off", "<u4"),
        ("main_len", "<u4"),
        ("first_ref", "<u4"),
        ("nref", "<u2"),
        ("rmid", "u1"),
        ("info", "u1"),
        ("toplevel_xid", "<u4"),
    ]
)

# One block that a record touches, 32 bytes. `rec` is the index of the record's row in the same batch.
REF_DTYPE = np.dtype(
    [
        ("end_lsn", "<u8"),
        ("rec", "<u4"),
        ("spc", "<u4"),
        ("db", "<u4"),
        ("rel", "<u4"),
        ("blk", "<u4"),
        ("fork", "u1"),
        ("flags", "u1"),
        ("block_id", "u1"),
        ("rmid", "u1"),
    ]
)

# RefRow.flags
REF_WILL_INIT = 1  # redo makes the page from nothing
REF_FPI = 2  # a full-page image that redo applies
REF_IMAGE = 4  # any image, also one that is only for consistency checking
REF_DATA = 8
REF_IMPLIED_VM = 16  # a visibility map page that redo changes without the record naming it
IMPLIED_BLOCK_ID = 255

# Why decoding stopped (WalStop in walstream.h).
STOP_ZERO_LENGTH = 1
STOP_ZERO_PAGE = 2
STOP_STALE_PAGE = 3
STOP_INVALID = 4
STOP_NO_MEMORY = 5
_NATURAL_ENDS = frozenset({STOP_ZERO_LENGTH, STOP_ZERO_PAGE, STOP_STALE_PAGE})


class WalDecodeError(NeonError):
    """The bytes are not WAL that goes on. The text says what is wrong and at which LSN.

    `reason` is one of the STOP_ numbers; `natural_end` tells the unwritten rest of a WAL file from damage (a torn last
    record is damage by its CRC too: the end of WAL in a file is the end of the last valid record, whatever follows).
    """

    def __init__(self, text: str, reason: int = STOP_INVALID) -> None:
        super().__init__(text)
        self.reason = reason

    @property
    def natural_end(self) -> bool:
        """True when nothing was ever written here, or the page belongs to an older use of the file."""
        return self.reason in _NATURAL_ENDS


def check_segment_size(segment_size: int) -> None:
    """Raises ValueError when no server has WAL segments of this size."""
    if segment_size <= 0 or segment_size % XLOG_BLCKSZ or segment_size > 1 << 30:
        raise ValueError(f"WAL segments cannot have {segment_size} bytes")


@dataclass(frozen=True, slots=True)
class WalBatch:
    """The records that one feed completed.

    `records` and `refs` are read-only arrays of RECORD_DTYPE and REF_DTYPE; all indexes in them count from the start of this
    batch. `blob` holds one 8-aligned entry [u64 end_lsn][raw record][zeros to 8] per record, in order. `next_lsn` is the end
    of the last complete record so far (the start LSN before the first one): the position from which decoding can start anew.
    """

    records: np.ndarray
    refs: np.ndarray
    blob: bytes
    next_lsn: Lsn
