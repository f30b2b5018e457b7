"""The short way of an append: from the receive buffer to the disk, and its answer, in one step.

Every commit waits for this, and what costs most there is the number of Python steps. Invariant: what is done here is what
Acceptor.append_request, WalStore.write and flush, and Acceptor.flush_batch do to the same bytes, in that order; whatever is not
exactly one append that they would take and answer, and that needs one write and nothing else, is left to them untouched.
"""

from neon_services.consensus.acceptor import Acceptor, ProposerConnection
from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import (
    FRAMED_APPEND_OVERHEAD,
    FRAMED_APPEND_REQUEST,
    FRAMED_APPEND_RESPONSE,
    MAX_APPEND_BYTES,
)
from neon_services.safekeeper.wal_store import WalStore

_unpack, _pack = FRAMED_APPEND_REQUEST.unpack_from, FRAMED_APPEND_RESPONSE.pack
_OTHER_BYTES = FRAMED_APPEND_OVERHEAD - 1  # of a CopyData message's length, besides the WAL
_ANSWER_LENGTH = FRAMED_APPEND_RESPONSE.size - 1


class AppendLane:
    """One proposer's connection to one timeline."""

    def __init__(self, acceptor: Acceptor, store: WalStore, connection: ProposerConnection) -> None:
        self._acceptor, self._store, self._connection = acceptor, store, connection

    def take(self, buffer: memoryview, filled: int) -> bytes | None:
        """Take the one append that fills the buffer; the CopyData message that answers it. None: nothing was done.

        Raises WalStoreError or ProtocolViolation, like the long way. ``store.account()`` is owed afterwards.
        """
        count = filled - FRAMED_APPEND_OVERHEAD
        if not 0 < count <= MAX_APPEND_BYTES:
            return None
        tag, length, kind, generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn = _unpack(buffer)
        acceptor, connection = self._acceptor, self._connection
        if (
            end_lsn - begin_lsn != count
            or length != count + _OTHER_BYTES
            or tag != b"d"
            or kind != b"a"
            or not acceptor.takes(connection, generation, term)
        ):
            return None
        flush_lsn = self._store.append(begin_lsn, buffer[FRAMED_APPEND_OVERHEAD:filled], count)
        if flush_lsn is None:
            return None
        acceptor.appended(connection, flush_lsn, commit_lsn, truncate_lsn)
        state = acceptor.state
        flush_lsn = Lsn(max(flush_lsn, state.timeline_start_lsn))
        return _pack(b"d", _ANSWER_LENGTH, b"a", generation, term, flush_lsn, state.commit_lsn, *acceptor.standby_feedback)
