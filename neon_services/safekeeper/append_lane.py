"""The lane of a proposer's connection: appends from the socket to the disk, and their answers, in C while the event loop waits.

Invariant: the lane is open only while Acceptor.takes() and WalStore.plain_writes() say that an append of this leader needs one
durable write and nothing else. Whoever changes what they depend on calls ``WalStore.recall`` first (every operation of the log
does; Timeline.run does for the acceptor). What the lane did is told to both by ``settle`` before any other Python code runs.

Everything that is not such an append is left to Acceptor.append_request, WalStore.write and flush, and Acceptor.flush_batch,
which do the same to the same bytes in more steps.
"""

import ctypes
import errno
import os
from collections.abc import Callable
from typing import NoReturn

from neon_services.consensus.acceptor import Acceptor, ProposerConnection
from neon_services.ground.disk import REAL_DISK, Views, write_all
from neon_services.ground.errors import NeonError
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.lanes import WRITER, CAppendLane, Lane, function_address, library
from neon_services.protocols.safekeeper_messages import FRAMED_APPEND_RESPONSE
from neon_services.safekeeper.connections import SOON_S
from neon_services.safekeeper.wal_store import WalStore
from neon_services.wal.buffers import address_of

_NOT_WAL = -1


def _nothing() -> None:
    pass


class AppendLane(Lane):
    """One proposer's connection to one timeline. Raises ConfigError when there is no compiled library.

    ``refused``: whether no WAL is taken just now. ``tell_s``: how soon others want to hear of an append; 0: of each at once.
    """

    def __init__(
        self,
        acceptor: Acceptor,
        store: WalStore,
        connection: ProposerConnection,
        *,
        refused: Callable[[], bool] = lambda: False,
        tell_s: Callable[[], float] = lambda: SOON_S,
    ) -> None:
        super().__init__(CAppendLane())
        self._acceptor, self._store, self._proposer = acceptor, store, connection
        self._refused, self._tell_s = refused, tell_s
        self._library = library()
        self.base.readable = function_address(self._library.append_lane_readable)
        self.base.due = function_address(self._library.append_lane_due)
        self._raised: BaseException | None = None
        if store.disk is not REAL_DISK:
            self._writer = WRITER(self._write)
            self.c.writer = function_address(self._writer)
        #: Called after the lane has taken appends, with their number.
        self.on_taken: Callable[[int], None] = lambda _: None
        #: Called when it is time to tell others what the lane took.
        self.on_due: Callable[[], None] = lambda: None
        #: Called with what ends the connection.
        self.on_failed: Callable[[NeonError | OSError], None] = self._raise

    @staticmethod
    def _raise(error: NeonError | OSError) -> NoReturn:
        raise error

    def _write(self, descriptor: int, pieces: int, count: int, offset: int, flags: int) -> int:
        """Write to a disk that is not the kernel's."""
        vectors = (ctypes.c_size_t * 2 * count).from_address(pieces)
        views: Views = [memoryview((ctypes.c_uint8 * length).from_address(base)).cast("B") for base, length in vectors]
        try:
            disk = self._store.disk
            if disk.pwritev(descriptor, views, offset, flags) != sum(map(len, views)):
                write_all(disk, descriptor, views, offset, flags)  # once more, from the beginning
        except BaseException as error:
            self._raised = error
            return (error.errno if isinstance(error, OSError) else None) or errno.EIO
        return 0

    # -- lending

    def lend(self) -> bool:
        """Open the lane if all an append needs is one durable write; whether it is open."""
        c, acceptor, store = self.c, self._acceptor, self._store
        state = acceptor.state
        store.recall()  # from whoever has it
        writes = store.plain_writes()
        if writes is None or self._refused() or not acceptor.takes(self._proposer, state.mconf.generation, state.term):
            return False
        c.scanner, c.file, c.segment_lsn, c.plain_end = writes.scanner, writes.descriptor, writes.segment_lsn, writes.end
        c.generation, c.term = state.mconf.generation, state.term
        c.write_lsn, c.flush_lsn, c.timeline_start_lsn = store.write_lsn, store.flush_lsn, state.timeline_start_lsn
        c.commit_lsn = c.truncate_lsn = INVALID_LSN
        c.early_bytes = store.early_bytes if store.disk is REAL_DISK else 0
        c.flags, c.error = os.RWF_DSYNC, 0
        self.retime()
        answer = FRAMED_APPEND_RESPONSE.pack(
            b"d",
            FRAMED_APPEND_RESPONSE.size - 1,
            b"a",
            state.mconf.generation,
            state.term,
            acceptor.flush_lsn,
            state.commit_lsn,
            *acceptor.standby_feedback,
        )
        ctypes.memmove(c.answer, answer, len(answer))
        store.recall = self.shut
        self.base.open = 1
        return True

    def retime(self) -> None:
        """Others want to hear of appends sooner or later than before."""
        c, base = self.c, self.base
        c.tell_ns = int(self._tell_s() * 1e9)
        if base.due_ns:
            base.due_ns = min(base.due_ns, c.told_ns + c.tell_ns)

    def detach(self) -> None:
        super().detach()
        if self._store.recall == self.shut:
            self._store.recall = _nothing

    def settle(self) -> bool:
        """Tell acceptor and log what the lane did; whether there is more to do."""
        c, base = self.c, self.base
        if count := c.appends:
            c.appends = 0
            flush_lsn = Lsn(c.flush_lsn)
            sizes, seconds = c.sizes[: c.writes], [ns / 1e9 for ns in c.took_ns[: c.writes]]
            c.writes = 0
            self._store.appended(Lsn(c.write_lsn), flush_lsn, sizes, seconds)
            self._acceptor.appended(self._proposer, flush_lsn, Lsn(c.commit_lsn), Lsn(c.truncate_lsn))
            if c.unsent and self.connection is not None:
                self.connection.write(bytes(c.answer)[-c.unsent :])
            c.unsent = 0
            self.on_taken(count)
        self.count_traffic()
        wanted, base.wants = base.wants, 0
        if c.error:
            base.open = 0
        return bool(wanted or base.leaves or c.error)

    def attend(self) -> None:
        c = self.c
        if c.error:
            error, c.error = c.error, 0
            self.base.filled = self.base.leaves = 0  # what could not be written goes with the connection
            try:
                self._fail(error)
            except (NeonError, OSError) as failure:
                self.on_failed(failure)
            except BaseException:
                if self.connection is not None:
                    self.connection.abort()
                raise
            return
        if self.base.leaves:
            self.hand_over()
        else:
            self.retime()
        self.on_due()

    def _fail(self, error: int) -> NoReturn:
        raised, self._raised = self._raised, None
        if error == _NOT_WAL:
            self._store.append_failed(None)
        self._store.append_failed(raised or OSError(error, os.strerror(error)))

    # -- without an event loop that runs lanes

    def take(self, buffer: memoryview, filled: int) -> tuple[int, bytes]:
        """Take the appends at the beginning of the buffer; how many bytes they were, and the message that answers them.

        (0, b"") when nothing was done. Raises WalStoreError or ProtocolViolation, like the long way. The lane is lent for it,
        and stays so until it is recalled.
        """
        if not self.base.open and not self.lend():
            return 0, b""
        taken = self._library.append_lane_take(self.address, address_of(buffer), filled)
        self.settle()
        if self.c.error:
            error, self.c.error = self.c.error, 0
            self._fail(error)
        return (taken, bytes(self.c.answer)) if taken else (0, b"")
