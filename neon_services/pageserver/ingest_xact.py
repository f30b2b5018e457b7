"""Transaction records: commit status, files of prepared transactions, relations dropped at the end, replication origins."""

import numpy as np

from neon_services.pageserver import keys, native_records
from neon_services.pageserver.ingest_clog import ABORTED, COMMITTED
from neon_services.pageserver.ingest_tip import TipState
from neon_services.pageserver.native_records import CLOG_XIDS_PER_PAGE
from neon_services.pageserver.values import NATIVE, IndexArray
from neon_services.wal.records import WalBatch
from neon_services.wal.xact import (
    ABORT_PREPARED,
    COMMIT,
    COMMIT_PREPARED,
    OPCODE_MASK,
    XactRecord,
    parse_xact,
    record_origin,
)

_COMMITTED_DTYPE = np.dtype([("tag", ">u4"), ("count", ">u8"), ("xid", ">u4"), ("time", ">i8")])
_ABORTED_DTYPE = np.dtype([("tag", ">u4"), ("count", ">u8"), ("xid", ">u4")])


def put_simple_xacts(tip: TipState, batch: WalBatch, rows: IndexArray) -> None:
    """Commits and aborts that carry nothing but their time, in bulk."""
    records = batch.records[rows]
    records = records[records["xid"] != 0]
    if not len(records):
        return
    xids = records["xid"].astype(np.uint64)
    pages = xids // np.uint64(CLOG_XIDS_PER_PAGE)
    page_first = np.unique(pages, return_index=True)
    for page, first in zip(page_first[0].tolist(), page_first[1].tolist(), strict=True):
        tip.ensure_slru_page(keys.CLOG, page, int(records["end_lsn"][first]))
    committed = (records["info"] & OPCODE_MASK) == COMMIT
    for page in page_first[0].tolist():
        here = pages == page
        for mask, status in ((here & committed, COMMITTED), (here & ~committed, ABORTED)):
            if mask.any():
                tip.clog.changed(page, records["xid"][mask], status, int(records["end_lsn"][mask][-1]))
    segment, block = pages // np.uint64(keys.SLRU_PAGES_PER_SEGMENT), pages % np.uint64(keys.SLRU_PAGES_PER_SEGMENT)
    hi = np.full(len(records), keys.slru_block(keys.CLOG, 0, 0)[0], np.uint64)
    lo = segment << np.uint64(40) | block
    lsn = records["end_lsn"].astype(np.uint64)
    for mask, dtype, tag in (
        (committed, _COMMITTED_DTYPE, native_records.CLOG_SET_COMMITTED),
        (~committed, _ABORTED_DTYPE, native_records.CLOG_SET_ABORTED),
    ):
        count = int(mask.sum())
        if not count:
            continue
        values = np.zeros(count, dtype)
        values["tag"], values["count"], values["xid"] = tag, 1, records["xid"][mask]
        if dtype is _COMMITTED_DTYPE:
            at = records["blob_off"][mask].astype(np.int64) + 8 + records["main_off"][mask]
            blob = np.frombuffer(batch.blob, np.uint8)
            values["time"] = blob[at[:, None] + np.arange(8)].view("<i8").ravel()
            newest = dict(zip(pages[mask].tolist(), zip(lsn[mask].tolist(), values["time"].tolist(), strict=True), strict=True))
            for page, (end_lsn, time_us) in newest.items():  # of equal keys the last remains: rows are in WAL order
                tip.clog.committed(page, end_lsn, time_us)
        offset = tip.rows.add_data(values.tobytes())
        offsets = np.uint64(offset) + np.arange(count, dtype=np.uint64) * np.uint64(dtype.itemsize)
        tip.rows.put_columns(hi[mask], lo[mask], lsn[mask], NATIVE, offsets, dtype.itemsize)


def put_xact(tip: TipState, info: int, xid: int, main: bytes, raw: bytes, lsn: int) -> XactRecord:
    """A commit or abort, also of a prepared transaction. Dropping its relations is left to the caller."""
    record = parse_xact(info, main, tip.pg_major)
    opcode = info & OPCODE_MASK
    prepared = opcode in (COMMIT_PREPARED, ABORT_PREPARED)
    top = record.twophase_xid if prepared else xid
    by_page: dict[int, list[int]] = {}
    for member in (top, *record.subxacts):
        if member:
            by_page.setdefault(member // CLOG_XIDS_PER_PAGE, []).append(member)
    for page, members in by_page.items():
        tip.ensure_slru_page(keys.CLOG, page, lsn)
        if opcode in (COMMIT, COMMIT_PREPARED):
            value = native_records.clog_set_committed(members, record.time_us)
            tip.clog.changed(page, members, COMMITTED, lsn)
            tip.clog.committed(page, lsn, record.time_us)
        else:
            value = native_records.clog_set_aborted(members)
            tip.clog.changed(page, members, ABORTED, lsn)
        tip.rows.put(keys.slru_page(keys.CLOG, page), lsn, NATIVE, value)
    if prepared:
        tip.drop_prepared(tip.checkpoint.full_xid(top) if tip.pg_major >= 17 else top, lsn)
    if record.origin_lsn:
        origin = record_origin(raw)
        if origin:
            tip.rows.put_image(keys.replication_origin(origin), lsn, record.origin_lsn.to_bytes(8, "big"))
    return record
