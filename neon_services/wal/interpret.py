"""Decoded WAL in, interpreted WAL out: which keys get which values, and what else the records say. Columns in, columns out.

Invariant: every block that a record names is one value, in the order of the WAL; every record that says more than that has its
metadata record; both are Neon's. Blocks are handled in bulk, and so are plain commits, aborts and full-page images; only
records that say more are looked at one by one. Nothing here depends on a shard: interpreted_encoding.py picks.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from neon_services.ground.lsn import Lsn
from neon_services.protocols import interpreted_metadata as md
from neon_services.protocols.interpreted_metadata import pack_metadata
from neon_services.protocols.page_keys import PAGE_SIZE, TABLESPACE_MAX, U64Array, block_keys
from neon_services.wal import xact
from neon_services.wal.block_images import applied_images
from neon_services.wal.interpret_metadata import metadata_of
from neon_services.wal.interpret_visibility import HEAP, HEAP2, NEON, Block, cleared_bits
from neon_services.wal.raw_record import DBASE, LOGICAL_MESSAGE, LOOKED_AT, XACT, XLOG, Record
from neon_services.wal.records import REF_FPI, REF_IMPLIED_VM, REF_WILL_INIT, WalBatch

I64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
ClearBits = md.ClearVmBits | md.NeonClearVmBits

_FPI, _FPI_FOR_HINT = 0xB0, 0xA0
_IS_LOOKED_AT = np.zeros(256, bool)
_IS_LOOKED_AT[list(LOOKED_AT)] = True
_PLAIN_XACT_MAIN_AT = 26  # header and a short main data header: neither origin nor top-level xid
# metadata records of fixed size, as pack_metadata() writes them
_PLAIN_XACT = np.dtype(
    [
        ("kind", ">u4"), ("variant", ">u4"), ("xid", ">u4"), ("info", "u1"), ("time", ">i8"), ("xinfo", ">u4"), ("db", ">u4"),
        ("spc", ">u4"), ("subxacts", ">u8"), ("relations", ">u8"), ("origin_lsn", ">u8"), ("origin", ">u2"),
        ("record_xid", ">u4"), ("lsn", ">u8"),
    ]
)  # fmt: skip
_EMPTY_XLOG = np.dtype([("kind", ">u4"), ("variant", ">u4"), ("info", "u1"), ("lsn", ">u8"), ("length", ">u8")])
_XACT_KIND, _XLOG_KIND = 5, 8
_BLOCK_FIELDS = ("rec", "spc", "db", "rel", "block_id", "fork", "blk")


@dataclass(frozen=True, slots=True)
class Values:
    """One row per block that a record names. ``record`` is the number of its record, ascending."""

    record: I64Array
    hi: U64Array
    lo: U64Array
    rel: npt.NDArray[np.uint32]
    fork: npt.NDArray[np.uint8]
    block: npt.NDArray[np.uint32]
    will_init: BoolArray
    is_image: BoolArray
    offset: I64Array  #: of the page or record in the data
    length: I64Array


@dataclass(frozen=True, slots=True)
class InterpretedBatch:
    """All that WAL from ``start_lsn`` to ``next_lsn`` does. ``data`` is what values and metadata are cut from."""

    start_lsn: Lsn
    next_lsn: Lsn
    end_lsn: U64Array  #: per record
    xid: npt.NDArray[np.uint32]
    flush_uncommitted: BoolArray
    values: Values
    metadata_offset: I64Array  #: per record: of the metadata record for all shards
    metadata_length: I64Array  #: -1: none
    data: bytes
    clears: tuple[tuple[int, ClearBits, bytes], ...]  #: (record, what, packed), for the shards with the map's pages
    for_shard_zero: tuple[tuple[int, bytes], ...]  #: (record, metadata record)
    left_out_tablespaces: frozenset[int]  #: oids that no key can name


def interpret(batch: WalBatch, start_lsn: Lsn, pg_major: int) -> InterpretedBatch:
    """Interpret all records of a batch that was decoded from ``start_lsn``, a record's end. Raises CorruptionError."""
    records, refs = batch.records, batch.refs
    explicit = (refs["flags"] & REF_IMPLIED_VM) == 0
    fits = refs["spc"] <= TABLESPACE_MAX
    data = _Data(batch.blob)
    values = _values(batch, refs[explicit & fits], data)
    metadata = _Metadata(batch, pg_major, data)
    metadata.put_plain_xacts()
    metadata.put_images()
    metadata.put_others()
    return InterpretedBatch(
        start_lsn,
        batch.next_lsn,
        records["end_lsn"].astype(np.uint64),
        records["xid"],
        (records["rmid"] == DBASE) & ((records["info"] & 0xF0) == 0),
        values,
        metadata.offset,
        metadata.length,
        data.joined(),
        tuple(_clears(batch)),
        tuple(metadata.for_shard_zero),
        frozenset(np.unique(refs["spc"][~fits]).tolist()),
    )


class _Data:
    """The decoded records, and behind them what is made here."""

    def __init__(self, blob: bytes) -> None:
        self._parts = [blob]
        self._size = len(blob)

    def add(self, part: bytes) -> int:
        """Append; its offset."""
        offset = self._size
        self._parts.append(part)
        self._size += len(part)
        return offset

    def joined(self) -> bytes:
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)


def _values(batch: WalBatch, refs: np.ndarray, data: _Data) -> Values:
    hi, lo = block_keys(refs["spc"], refs["db"], refs["rel"], refs["fork"], refs["blk"])
    owner = batch.records[refs["rec"]]
    offset = owner["blob_off"].astype(np.int64) + 8
    length = owner["tot_len"].astype(np.int64)
    is_image = np.zeros(len(refs), bool)
    candidates = (owner["rmid"] == XLOG) & ((owner["info"] == _FPI) | (owner["info"] == _FPI_FOR_HINT))
    candidates &= (refs["flags"] & REF_FPI) != 0
    record, images = -1, {}
    for row in np.flatnonzero(candidates).tolist():
        if refs["rec"][row] != record:
            record = refs["rec"][row]
            start = int(owner["blob_off"][row]) + 8
            raw = memoryview(batch.blob)[start : start + int(owner["tot_len"][row])]
            images = applied_images(raw, int(refs["end_lsn"][row]))
        page = images.get(int(refs["block_id"][row]))
        if page is not None:
            offset[row], length[row], is_image[row] = data.add(page), PAGE_SIZE, True
    return Values(
        refs["rec"].astype(np.int64),
        hi,
        lo,
        refs["rel"],
        refs["fork"],
        refs["blk"],
        (refs["flags"] & (REF_WILL_INIT | REF_FPI)) != 0,
        is_image,
        offset,
        length,
    )


class _Metadata:
    """Metadata records on their way into columns."""

    def __init__(self, batch: WalBatch, pg_major: int, data: _Data) -> None:
        self._batch = batch
        self._pg_major = pg_major
        self._data = data
        records = batch.records
        self.offset = np.zeros(len(records), np.int64)
        self.length = np.full(len(records), -1, np.int64)
        self.for_shard_zero: list[tuple[int, bytes]] = []
        self._opcode = records["info"] & np.uint8(0xF0)
        self._others = _IS_LOOKED_AT[records["rmid"]]

    def _put_rows(self, rows: I64Array, made: np.ndarray) -> None:
        size = made.dtype.itemsize
        self.offset[rows] = self._data.add(made.tobytes()) + np.arange(len(rows)) * size
        self.length[rows] = size
        self._others[rows] = False

    def put_plain_xacts(self) -> None:
        """Commits and aborts that carry nothing but their time: with the 0x80 bit clear, the opcode is the whole high half."""
        records, opcode = self._batch.records, self._opcode
        plain = (records["rmid"] == XACT) & ((opcode == xact.COMMIT) | (opcode == xact.ABORT))
        plain &= (records["main_off"] == _PLAIN_XACT_MAIN_AT) & (records["main_len"] == 8)
        rows = np.flatnonzero(plain)
        if not len(rows):
            return
        found = records[rows]
        made = np.zeros(len(rows), _PLAIN_XACT)
        made["kind"], made["variant"] = _XACT_KIND, found["info"] & xact.OPCODE_MASK == xact.ABORT
        made["xid"] = made["record_xid"] = found["xid"]
        made["info"], made["lsn"] = opcode[rows], found["end_lsn"]
        at = found["blob_off"].astype(np.int64) + 8 + found["main_off"]
        blob = np.frombuffer(self._batch.blob, np.uint8)
        made["time"] = blob[at[:, None] + np.arange(8)].view("<i8").ravel()
        self._put_rows(rows, made)

    def put_images(self) -> None:
        """Records that are full-page images and nothing else."""
        records, opcode = self._batch.records, self._opcode
        is_image = (records["rmid"] == XLOG) & ((opcode == _FPI) | (opcode == _FPI_FOR_HINT)) & (records["main_len"] == 0)
        rows = np.flatnonzero(is_image)
        if len(rows):
            made = np.zeros(len(rows), _EMPTY_XLOG)
            made["kind"], made["info"], made["lsn"] = _XLOG_KIND, opcode[rows], records["end_lsn"][rows]
            self._put_rows(rows, made)

    def put_others(self) -> None:
        """All that remain, one by one."""
        for row in np.flatnonzero(self._others).tolist():
            record = Record.of(self._batch, row, self._pg_major)
            metadata = metadata_of(record)
            if metadata is None:
                continue
            packed = pack_metadata(metadata)
            if record.rmid == LOGICAL_MESSAGE:
                self.for_shard_zero.append((row, packed))
            else:
                self.offset[row], self.length[row] = self._data.add(packed), len(packed)


def _clears(batch: WalBatch) -> list[tuple[int, ClearBits, bytes]]:
    """What heap records clear in visibility maps: once for a page after each vacuum, so one by one."""
    records, refs = batch.records, batch.refs
    implied = (refs["flags"] & REF_IMPLIED_VM) != 0
    clears = np.zeros(len(records), bool)
    clears[refs["rec"][implied & ((refs["rmid"] == HEAP) | (refs["rmid"] == HEAP2))]] = True
    clears |= records["rmid"] == NEON  # the decoder does not know what those imply
    rows = np.flatnonzero(clears)
    if not len(rows):
        return []
    named = refs[clears[refs["rec"]] & ~implied]
    blocks: dict[int, list[Block]] = {}
    relations: dict[int, tuple[int, int, int]] = {}
    for record, spc, db, rel, *block in zip(*(named[name].tolist() for name in _BLOCK_FIELDS), strict=True):
        blocks.setdefault(record, []).append(tuple(block))
        relations.setdefault(record, (spc, db, rel))  # of its first block
    found = []
    columns = (records[name][rows].tolist() for name in ("rmid", "info", "blob_off", "main_off", "main_len"))
    for row, rmid, info, blob_off, main_off, main_len in zip(rows.tolist(), *columns, strict=True):
        if row not in relations or relations[row][0] > TABLESPACE_MAX:
            continue
        main = blob_off + 8 + main_off
        cleared = cleared_bits(rmid, info, batch.blob[main : main + main_len], relations[row], blocks[row])
        if cleared is not None:
            found.append((row, cleared, pack_metadata(cleared)))
    return found
