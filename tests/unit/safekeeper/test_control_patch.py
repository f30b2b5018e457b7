"""Patching control files: every field by its JSON form, and what is refused."""

import json
from dataclasses import replace
from typing import Any

import pytest

from neon_services.ground.lsn import Lsn
from neon_services.protocols.safekeeper_messages import MembershipConfiguration, SafekeeperId, TermLsn
from neon_services.safekeeper.admin_api import control_of_copy
from neon_services.safekeeper.control_file import ControlFile, PartialSegment
from neon_services.safekeeper.control_patch import patched
from tests.unit.safekeeper.test_timelines import OTHER, TTID, state

OLD = ControlFile(TTID, state(1), creation_ts_ns=1_700_000_000_123_456_789)
NEW = ControlFile(
    TTID,
    replace(
        state(7),
        mconf=MembershipConfiguration(7, (SafekeeperId(1, "a", 2),), (SafekeeperId(3, "b", 4),)),
        term=9,
        term_history=(TermLsn(1, Lsn(0x10)), TermLsn(9, Lsn(0x20))),
        pg_version=170001,
        system_id=5,
        proposer_uuid=bytes(range(16)),
        timeline_start_lsn=Lsn(1),
        local_start_lsn=Lsn(2),
        commit_lsn=Lsn(3),
        backup_lsn=Lsn(4),
        peer_horizon_lsn=Lsn(5),
        remote_consistent_lsn=Lsn(6),
    ),
    (PartialSegment(1, "x.partial", Lsn(1), Lsn(2), 3),),
    Lsn(0x77),
    1_800_000_000_123_456_000,
)

GOES_BACK = [{"term": 2, "lsn": "0/1"}, {"term": 1, "lsn": "0/1"}]


def test_every_field_and_what_is_not_named_stays_exact() -> None:
    shown = json.loads(json.dumps(NEW.to_json()))
    names = [name for name in shown if name not in ("tenant_id", "timeline_id")]
    assert patched(OLD, shown, names) == NEW
    assert patched(OLD, shown, []) == OLD
    for name in names:
        assert patched(patched(OLD, shown, [name]), OLD.to_json(), [name]).acceptor == OLD.acceptor
    assert patched(OLD, shown, ["commit_lsn"]) == replace(OLD, acceptor=replace(OLD.acceptor, commit_lsn=Lsn(3)))


@pytest.mark.parametrize(
    ("updates", "name"),
    [
        ({}, "commit_lsn"),
        ({"tenant_id": "x"}, "tenant_id"),
        ({"colour": 1}, "colour"),
        ({"commit_lsn": 5}, "commit_lsn"),
        ({"commit_lsn": "x"}, "commit_lsn"),
        ({"mconf": {"generation": -1}}, "mconf"),
        ({"acceptor_state": {"term": 1}}, "acceptor_state"),
        ({"acceptor_state": {"term": 1, "term_history": [{"term": 2, "lsn": "0/1"}]}}, "acceptor_state"),
        (
            {"acceptor_state": {"term": 9, "term_history": [{"term": 2, "lsn": "0/1"}, {"term": 1, "lsn": "0/1"}]}},
            "acceptor_state",
        ),
        ({"acceptor_state": {"term": 1 << 64, "term_history": []}}, "acceptor_state"),
        ({"server": {"pg_version": 1, "system_id": 1, "wal_seg_size": 1 << 20}}, "server"),
        ({"proposer_uuid": "zz" * 16}, "proposer_uuid"),
        ({"partial_backup": {"segments": [{}]}}, "partial_backup"),
        ({"eviction_state": "Gone"}, "eviction_state"),
        ({"creation_ts": "1970-01-01T00:00:00+05:00"}, "creation_ts"),
        ({"creation_ts": "2026-01-01T00:00:00"}, "creation_ts"),
    ],
)
def test_a_wrong_value_is_refused_by_name(updates: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        patched(OLD, updates, [name])


def test_the_control_file_of_a_copy() -> None:
    copied = control_of_copy(NEW, OTHER, Lsn(0x1F))
    assert (copied.ttid, copied.acceptor.term, copied.acceptor.term_history) == (OTHER, 1, (TermLsn(1, Lsn(0x10)),))
    assert (copied.acceptor.commit_lsn, copied.acceptor.backup_lsn, copied.acceptor.remote_consistent_lsn) == (0x1F, 2, 0)
    assert copied.partial_backup == () and copied.offloaded_flush_lsn is None
