"""The broker's messages against protobuf's own wire rules, and the checks of what they carry."""

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.protocols import broker_messages as bm

TTID = TenantTimelineId(TenantId(b"T" * 16), TimelineId(b"L" * 16))
TTID_FIELDS = b"\x0a\x10" + b"T" * 16 + b"\x12\x10" + b"L" * 16


def test_field_numbers_and_types_of_an_info() -> None:
    info = bm.SafekeeperTimelineInfo(
        safekeeper_id=1,
        tenant_timeline_id=bm.encode_ttid(TTID),
        last_log_term=3,
        flush_lsn=4,
        commit_lsn=5,
        backup_lsn=6,
        remote_consistent_lsn=7,
        peer_horizon_lsn=8,
        local_start_lsn=9,
        safekeeper_connstr="c",
        availability_zone="",
        term=12,
        http_connstr="h",
        standby_horizon=14,
        https_connstr="s",
    )
    expected = b"\x08\x01\x12\x24" + TTID_FIELDS
    expected += b"".join(bytes([number << 3, value]) for number, value in zip(range(3, 10), range(3, 10), strict=True))
    expected += b"\x52\x01c" + b"\x5a\x00" + b"\x60\x0c" + b"\x6a\x01h" + b"\x70\x0e" + b"\x7a\x01s"
    assert info.SerializeToString(deterministic=True) == expected
    assert bm.SafekeeperTimelineInfo.FromString(expected) == info


def test_optional_fields_know_whether_they_are_there() -> None:
    info = bm.SafekeeperTimelineInfo()
    assert not info.HasField("availability_zone")
    assert not info.HasField("https_connstr")
    assert bm.SafekeeperTimelineInfo.FromString(b"\x5a\x00").HasField("availability_zone")


def test_the_subscription_key_is_a_oneof() -> None:
    assert bm.SubscribeSafekeeperInfoRequest().WhichOneof("subscription_key") is None
    everything = bm.SubscribeSafekeeperInfoRequest(all=bm.Empty())
    assert everything.SerializeToString() == b"\x0a\x00"
    assert everything.WhichOneof("subscription_key") == "all"


def test_typed_messages() -> None:
    request = bm.SafekeeperDiscoveryRequest(tenant_timeline_id=bm.encode_ttid(TTID))
    message = bm.typed(request)
    assert message.SerializeToString(deterministic=True) == b"\x08\x03\x1a\x26\x0a\x24" + TTID_FIELDS
    assert bm.ttid_of(bm.payload_of(message)) == TTID
    with pytest.raises(TypeError):
        bm.typed(bm.TypedMessage())


def test_mismatched_payloads_are_refused() -> None:
    info = bm.SafekeeperTimelineInfo(tenant_timeline_id=bm.encode_ttid(TTID))
    with pytest.raises(ProtocolViolation, match="safekeeper_discovery_request"):
        bm.payload_of(bm.TypedMessage(type=bm.SAFEKEEPER_DISCOVERY_REQUEST, safekeeper_timeline_info=info))
    with pytest.raises(ProtocolViolation, match="type 0"):
        bm.payload_of(bm.TypedMessage(safekeeper_timeline_info=info))


def test_ids_must_have_sixteen_bytes() -> None:
    with pytest.raises(ProtocolViolation, match="missing"):
        bm.ttid_of(bm.SafekeeperTimelineInfo())
    with pytest.raises(ProtocolViolation, match="16 bytes, not 3"):
        bm.decode_ttid(bm.TenantTimelineIdMessage(tenant_id=b"abc", timeline_id=b"L" * 16))


def test_every_prefix_parses_or_is_refused() -> None:
    """A cut message must never be taken for something else than itself or an error."""
    encoded = bm.typed(
        bm.SafekeeperDiscoveryResponse(
            safekeeper_id=300, tenant_timeline_id=bm.encode_ttid(TTID), commit_lsn=1 << 40, safekeeper_connstr="host:5454"
        )
    ).SerializeToString()
    refused = 0
    for length in range(len(encoded)):
        try:
            bm.payload_of(bm.parse(bm.TypedMessage, encoded[:length]))
        except ProtocolViolation:
            refused += 1
    assert refused == len(encoded)
