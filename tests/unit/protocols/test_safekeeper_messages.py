"""Every message against its byte layout, on every prefix, and with a tail."""

import random

import pytest

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import Lsn
from neon_services.protocols import pgwire
from neon_services.protocols import safekeeper_messages as m
from neon_services.protocols.feedback import PageserverFeedback

ID = "9e4c8f36063c6c6e93bc20d65a820f3d"
TTID = TenantTimelineId(TenantId.parse(ID), TimelineId.parse(ID))
A, B, C = (m.SafekeeperId(i, f"sk{i}.example", 5454 + i) for i in (1, 2, 3))
JOINT = m.MembershipConfiguration(7, (A, B), (B, C))
HISTORY = (m.TermLsn(1, Lsn(0x100)), m.TermLsn(2, Lsn(0x539)))
FEEDBACK = PageserverFeedback(1 << 40, Lsn(5), Lsn(4), Lsn(3), -7, 2, True)

FROM_PROPOSER = [
    m.ProposerGreeting(TTID, m.NO_MEMBERSHIP, 160004, 0, 1 << 24),
    m.ProposerGreeting(TTID, JOINT, 150020, 2**64 - 1, 1 << 24),
    m.VoteRequest(0, 3),
    m.ProposerElected(5, 2, Lsn(0x200), HISTORY),
    m.AppendRequest(1, 2, Lsn(100), Lsn(100), Lsn(90), Lsn(80)),
    m.AppendRequest(1, 2, Lsn(100), Lsn(104), Lsn(90), Lsn(80), b"wal!"),
]
FROM_ACCEPTOR = [
    m.AcceptorGreeting(2**64 - 1, m.NO_MEMBERSHIP, 9),
    m.AcceptorGreeting(1, JOINT, 9),
    m.VoteResponse(0, 3, True, Lsn(0x539), Lsn(0x539), HISTORY),
    m.VoteResponse(4, 3, False, Lsn(0), Lsn(0), ()),
    m.AppendResponse(1, 2, Lsn(300), Lsn(200)),
    m.AppendResponse(1, 2, Lsn(300), Lsn(200), m.HotStandbyFeedback(-5, 700, 1 << 33), FEEDBACK),
]
PARSERS = [(x, m.parse_proposer_message) for x in FROM_PROPOSER] + [(x, m.parse_acceptor_message) for x in FROM_ACCEPTOR]


def test_vectors() -> None:
    greeting = "67" + (ID.encode().hex() + "00") * 2 + "00000000" * 3 + f"{160004:08x}" + "00" * 8 + "01000000"
    assert FROM_PROPOSER[0].pack().hex() == greeting
    assert m.VoteRequest(0, 3).pack().hex() == "76000000000000000000000003"
    answer = m.VoteResponse(0, 3, True, Lsn(0x539), Lsn(0x539), (m.TermLsn(2, Lsn(0x539)),)).pack().hex()
    lsn = f"{0x539:016x}"
    assert answer == "7600000000" + f"{3:016x}" + "01" + lsn + lsn + "00000001" + f"{2:016x}" + lsn


def test_sizes() -> None:
    assert len(m.VoteRequest(0, 3).pack()) == 13
    assert len(m.AppendRequest(0, 1, Lsn(1), Lsn(1), Lsn(0), Lsn(0)).pack()) == m.APPEND_REQUEST_HEADER_BYTES == 45
    assert len(m.AppendResponse(0, 1, Lsn(1), Lsn(1)).pack()) == m.APPEND_RESPONSE_BYTES == 53
    assert len(m.AcceptorGreeting(1, m.NO_MEMBERSHIP, 1).pack()) == 29


@pytest.mark.parametrize(("message", "parse"), PARSERS, ids=lambda x: type(x).__name__)
def test_round_trip_prefixes_and_tail(message, parse) -> None:  # type: ignore[no-untyped-def]
    packed = message.pack()
    assert parse(memoryview(packed)) == message
    assert parse(packed).pack() == packed
    for length in range(len(packed)):
        if packed[:1] == b"a" and parse is m.parse_acceptor_message and length == 53:
            continue  # the feedback is optional
        with pytest.raises(ProtocolViolation):
            parse(memoryview(packed)[:length])
    with pytest.raises(ProtocolViolation):
        parse(memoryview(packed + b"\x01"))


def test_append_request_views_the_buffer() -> None:
    buffer = bytearray(m.AppendRequest(1, 2, Lsn(100), Lsn(104), Lsn(90), Lsn(80), b"wal!").pack())
    parsed = m.parse_proposer_message(memoryview(buffer))
    assert isinstance(parsed, m.AppendRequest)
    buffer[-1] = ord("?")
    assert bytes(parsed.wal_data) == b"wal?"


@pytest.mark.parametrize(
    "bad",
    [
        b"x",
        m.AppendRequest(1, 2, Lsn(100), Lsn(103), Lsn(90), Lsn(80), b"wal!").pack(),
        m.AppendRequest(1, 2, Lsn(104), Lsn(100), Lsn(90), Lsn(80), b"wal!").pack(),
        m.AppendRequest(1, 2, Lsn(0), Lsn(131073), Lsn(0), Lsn(0), bytes(131073)).pack(),
        m.ProposerElected(5, 2, Lsn(0x200), ()).pack(),
        m.ProposerElected(5, 3, Lsn(0x200), HISTORY).pack(),
        m.ProposerElected(5, 1, Lsn(0x200), (HISTORY[1], HISTORY[0])).pack(),
        m.ProposerGreeting(TTID, m.MembershipConfiguration(3), 160004, 0, 1 << 24).pack(),
        m.ProposerGreeting(TTID, m.MembershipConfiguration(3, (A, A)), 160004, 0, 1 << 24).pack(),
        FROM_PROPOSER[0].pack().replace(b"9e4c", b"9e4x"),
        FROM_PROPOSER[1].pack().replace(b"sk1", b"\xff\xfe1"),
    ],
)
def test_impossible_proposer_messages(bad: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        m.parse_proposer_message(memoryview(bad))


def test_noise_never_raises_anything_else() -> None:
    seed = 20260101
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(3000):
        message, parse = rng.choice(PARSERS)
        packed = bytearray(message.pack())
        for _ in range(rng.randint(1, 4)):
            packed[rng.randrange(len(packed))] = rng.randrange(256)
        try:
            parse(memoryview(packed))
        except ProtocolViolation:
            pass


def test_membership_json() -> None:
    assert m.MembershipConfiguration.from_json(JOINT.to_json()) == JOINT
    assert m.MembershipConfiguration.from_json({"generation": 0, "members": []}) == m.NO_MEMBERSHIP
    for bad in (
        None,
        {},
        {"generation": -1, "members": []},
        {"generation": 1, "members": []},
        {"generation": 1, "members": [{"id": 1, "host": "a"}]},
        {"generation": 1, "members": [{"id": 1, "host": "a", "pg_port": 70000}]},
        {"generation": 1, "members": [{"id": 1, "host": "a", "pg_port": 1}] * 2},
    ):
        with pytest.raises(ValueError):
            m.MembershipConfiguration.from_json(bad)


def test_a_framed_append_is_found_only_whole() -> None:
    append = m.AppendRequest(7, 8, Lsn(100), Lsn(105), Lsn(90), Lsn(80), b"bytes")
    framed = pgwire.copy_data(append.pack())
    assert len(framed) == m.FRAMED_APPEND_OVERHEAD + 5
    buffer = memoryview(b"xyz" + framed + framed)
    for filled in range(len(buffer) + 1):
        for at in (3, 3 + len(framed)):
            found = m.framed_append(buffer, at, filled)
            assert (found is not None) == (filled >= at + len(framed)), (at, filled)
            if found is not None:
                assert (found.pack(), bytes(found.wal_data)) == (append.pack(), b"bytes")
    assert m.framed_append(buffer, 4, len(buffer)) is None


@pytest.mark.parametrize("at", [0, 4, 5])
def test_a_framed_append_of_another_shape_is_left_to_others(at: int) -> None:
    framed = bytearray(pgwire.copy_data(m.AppendRequest(7, 8, Lsn(100), Lsn(105), Lsn(90), Lsn(80), b"bytes").pack()))
    framed[at] ^= 1
    assert m.framed_append(memoryview(framed), 0, len(framed)) is None


def test_a_framed_append_is_bounded() -> None:
    backwards = bytearray(pgwire.copy_data(m.AppendRequest(7, 8, Lsn(110), Lsn(100), Lsn(0), Lsn(0)).pack()[:35]))
    assert m.framed_append(memoryview(backwards + bytes(50)), 0, len(backwards) + 50) is None
    for size, taken in ((m.MAX_APPEND_BYTES, True), (m.MAX_APPEND_BYTES + 1, False)):
        append = m.AppendRequest(7, 8, Lsn(0), Lsn(size), Lsn(0), Lsn(0), bytes(size))
        framed = memoryview(pgwire.copy_data(append.pack()))
        assert (m.framed_append(framed, 0, len(framed)) is not None) is taken
