"""Messages between proposer and acceptor, protocol version 3: one message is the payload of one CopyData.

Every message is a one-byte tag and a body; integers are big-endian, ids are hex text with a NUL, LSNs are u64. ``MCONF`` is
``u32 generation, u32 n, n * (u64 node_id, cstr host, u16 port), u32 n_new, n_new * (same)``; ``TH`` is
``u32 n, n * (u64 term, u64 lsn)``. A message that is cut off, too long or impossible raises ProtocolViolation and nothing else.

Hot path: an AppendRequest keeps its WAL as a view of the receive buffer, and an AppendResponse is one ``struct.pack``.
"""

import itertools
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn
from neon_services.protocols.feedback import PageserverFeedback

PROTOCOL_VERSION = 3
MAX_APPEND_BYTES = 128 * 1024
MAX_MEMBERS = 1000
MAX_TERM_HISTORY = 1_000_000

_U16, _U32, _U64 = struct.Struct("!H"), struct.Struct("!I"), struct.Struct("!Q")
_TERM_LSN = struct.Struct("!QQ")
_GREETING_TAIL = struct.Struct("!IQI")
_VOTE_REQUEST = struct.Struct("!cIQ")
_VOTE_RESPONSE = struct.Struct("!cIQBQQ")
_ELECTED = struct.Struct("!cIQQ")
_APPEND_REQUEST = struct.Struct("!cIQQQQQ")
_APPEND_RESPONSE = struct.Struct("!cIQQQqQQ")
#: A CopyData message (tag, length) with an AppendRequest in front of its WAL, and with an AppendResponse without feedback.
FRAMED_APPEND_REQUEST = struct.Struct("!ci" + _APPEND_REQUEST.format[1:])
FRAMED_APPEND_RESPONSE = struct.Struct("!ci" + _APPEND_RESPONSE.format[1:])

#: Bytes of an AppendRequest in front of its WAL, and of an AppendResponse in front of its pageserver feedback.
APPEND_REQUEST_HEADER_BYTES = _APPEND_REQUEST.size
APPEND_RESPONSE_BYTES = _APPEND_RESPONSE.size
#: Bytes of an AppendRequest in front of its WAL, with those of the CopyData message around it.
FRAMED_APPEND_OVERHEAD = FRAMED_APPEND_REQUEST.size
_APPEND_LENGTH = APPEND_REQUEST_HEADER_BYTES + 4  # which CopyData gives to an append without WAL


class TermLsn(NamedTuple):
    """From ``lsn`` on, WAL was written by the leader of ``term``."""

    term: int
    lsn: Lsn


#: Term switches in the order in which they happened.
TermHistory = tuple[TermLsn, ...]


class SafekeeperId(NamedTuple):
    """A member of a configuration: its id and where its WAL service listens."""

    node_id: int
    host: str
    pg_port: int


@dataclass(frozen=True, slots=True)
class MembershipConfiguration:
    """Who votes. Generation 0 means "none": a timeline from before generations. Joint while ``new_members`` is not None."""

    generation: int = 0
    members: tuple[SafekeeperId, ...] = ()
    new_members: tuple[SafekeeperId, ...] | None = None

    def contains(self, node_id: int) -> bool:
        """Whether the node votes in this configuration, in the old or in the new set."""
        return any(member.node_id == node_id for member in (*self.members, *(self.new_members or ())))

    def pack(self) -> bytes:
        """MCONF."""
        return _U32.pack(self.generation) + _pack_members(self.members) + _pack_members(self.new_members or ())

    def to_json(self) -> dict[str, Any]:
        """Neon's JSON form."""

        def members(ids: tuple[SafekeeperId, ...]) -> list[dict[str, Any]]:
            return [{"id": member.node_id, "host": member.host, "pg_port": member.pg_port} for member in ids]

        new_members = None if self.new_members is None else members(self.new_members)
        return {"generation": self.generation, "members": members(self.members), "new_members": new_members}

    @classmethod
    def from_json(cls, value: Any) -> "MembershipConfiguration":
        """Read Neon's JSON form. Raises ValueError that says what is wrong."""
        if not isinstance(value, dict):
            raise ValueError("a membership configuration is an object with generation, members and new_members")

        def members(name: str) -> tuple[SafekeeperId, ...]:
            listed = value[name]
            if not isinstance(listed, list) or len(listed) > MAX_MEMBERS or not all(_is_member(m) for m in listed):
                raise ValueError(
                    f"{name} of a membership configuration is a list of at most {MAX_MEMBERS} objects with id (number), "
                    f"host (text) and pg_port (number)"
                )
            found = tuple(SafekeeperId(m["id"], m["host"], m["pg_port"]) for m in listed)
            _check_members(found, ValueError)
            return found

        generation = value.get("generation")
        if not isinstance(generation, int) or isinstance(generation, bool) or not 0 <= generation < 1 << 32:
            raise ValueError(f"generation of a membership configuration is a number from 0 to 4294967295, not {generation!r}")
        new_members = members("new_members") if value.get("new_members") is not None else None
        found = cls(generation, members("members") if "members" in value else (), new_members)
        if generation and not found.members:
            raise ValueError(f"membership generation {generation} has no members")
        return found


NO_MEMBERSHIP = MembershipConfiguration()


def _is_member(value: Any) -> bool:
    return isinstance(value, dict) and (type(value.get("id")), type(value.get("host")), type(value.get("pg_port"))) == (
        int,
        str,
        int,
    )


def _check_members(members: tuple[SafekeeperId, ...], error: type[Exception]) -> None:
    ids = [member.node_id for member in members]
    if len(set(ids)) != len(ids):
        raise error(f"a safekeeper is named twice in a membership set: {ids}")
    for member in members:
        host = member.host
        if not 0 <= member.node_id < 1 << 64 or not 0 <= member.pg_port < 1 << 16 or not host.isprintable() or len(host) > 255:
            raise error(f"impossible member {member}")


def _pack_members(members: tuple[SafekeeperId, ...]) -> bytes:
    packed = [_U64.pack(m.node_id) + m.host.encode() + b"\0" + _U16.pack(m.pg_port) for m in members]
    return _U32.pack(len(members)) + b"".join(packed)


def pack_term_history(history: TermHistory) -> bytes:
    """TH."""
    return _U32.pack(len(history)) + b"".join(_TERM_LSN.pack(*entry) for entry in history)


# --- from the proposer ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProposerGreeting:
    """First message. ``system_id`` 0: the proposer only synchronises and does not know the cluster."""

    ttid: TenantTimelineId
    mconf: MembershipConfiguration
    pg_version: int
    system_id: int
    wal_seg_size: int

    def pack(self) -> bytes:
        ids = f"{self.ttid.tenant_id}\0{self.ttid.timeline_id}\0".encode()
        return b"g" + ids + self.mconf.pack() + _GREETING_TAIL.pack(self.pg_version, self.system_id, self.wal_seg_size)


@dataclass(frozen=True, slots=True)
class VoteRequest:
    """Please promise me this term."""

    generation: int
    term: int

    def pack(self) -> bytes:
        return _VOTE_REQUEST.pack(b"v", self.generation, self.term)


@dataclass(frozen=True, slots=True)
class ProposerElected:
    """I lead this term; my log has this history; I shall stream to you from this position."""

    generation: int
    term: int
    start_streaming_at: Lsn
    term_history: TermHistory

    def pack(self) -> bytes:
        head = _ELECTED.pack(b"e", self.generation, self.term, self.start_streaming_at)
        return head + pack_term_history(self.term_history)


@dataclass(slots=True)
class AppendRequest:
    """WAL bytes [begin_lsn, end_lsn), or none: a heartbeat that spreads commit_lsn. ``wal_data`` may view a receive buffer."""

    generation: int
    term: int
    begin_lsn: Lsn
    end_lsn: Lsn
    commit_lsn: Lsn
    truncate_lsn: Lsn
    wal_data: memoryview | bytes = b""

    def pack_header(self) -> bytes:
        """The message without its WAL bytes, which follow separately."""
        return pack_append_header(self.generation, self.term, self.begin_lsn, self.end_lsn, self.commit_lsn, self.truncate_lsn)

    def pack(self) -> bytes:
        return self.pack_header() + bytes(self.wal_data)


def pack_append_header(generation: int, term: int, begin_lsn: int, end_lsn: int, commit_lsn: int, truncate_lsn: int) -> bytes:
    """The 45 bytes in front of an AppendRequest's WAL."""
    return _APPEND_REQUEST.pack(b"a", generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn)


# --- from the acceptor ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AcceptorGreeting:
    """Who I am, the newest configuration I know, the highest term I promised."""

    node_id: int
    mconf: MembershipConfiguration
    term: int

    def pack(self) -> bytes:
        return b"g" + _U64.pack(self.node_id) + self.mconf.pack() + _U64.pack(self.term)


@dataclass(frozen=True, slots=True)
class VoteResponse:
    """The promise, or its refusal, with what the voter has on disk."""

    generation: int
    term: int
    vote_given: bool
    flush_lsn: Lsn
    truncate_lsn: Lsn
    term_history: TermHistory

    def pack(self) -> bytes:
        head = _VOTE_RESPONSE.pack(b"v", self.generation, self.term, self.vote_given, self.flush_lsn, self.truncate_lsn)
        return head + pack_term_history(self.term_history)


class HotStandbyFeedback(NamedTuple):
    """Aggregated feedback of the read replicas: time in Postgres microseconds, 64-bit transaction ids (0 = none)."""

    ts_us: int = 0
    xmin: int = 0
    catalog_xmin: int = 0


NO_STANDBY_FEEDBACK = HotStandbyFeedback()


@dataclass(slots=True)
class AppendResponse:
    """What is durable here. ``commit_lsn`` is the persisted one; flush and commit are 0 when the term is refused."""

    generation: int
    term: int
    flush_lsn: Lsn
    commit_lsn: Lsn
    hs_feedback: HotStandbyFeedback = NO_STANDBY_FEEDBACK
    pageserver_feedback: PageserverFeedback | None = None

    def pack(self) -> bytes:
        head = _APPEND_RESPONSE.pack(b"a", self.generation, self.term, self.flush_lsn, self.commit_lsn, *self.hs_feedback)
        return head if self.pageserver_feedback is None else head + self.pageserver_feedback.pack()


ProposerMessage = ProposerGreeting | VoteRequest | ProposerElected | AppendRequest
AcceptorMessage = AcceptorGreeting | VoteResponse | AppendResponse


# --- parsing ----------------------------------------------------------------------------------------------------------


class _Reader:
    """A cursor over one message."""

    __slots__ = ("data", "offset", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.offset = 1
        self.what = what

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        end = self.offset + layout.size
        if end > len(self.data):
            raise ProtocolViolation(f"{self.what} is cut off at {len(self.data)} bytes")
        values = layout.unpack_from(self.data, self.offset)
        self.offset = end
        return values

    def text(self) -> str:
        end = self.data.find(b"\0", self.offset)
        if end < 0:
            raise ProtocolViolation(f"{self.what} is cut off at {len(self.data)} bytes")
        raw = self.data[self.offset : end]
        self.offset = end + 1
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise ProtocolViolation(f"{self.what} has text that is not UTF-8: {raw[:80]!r}") from None

    def membership(self) -> MembershipConfiguration:
        (generation,) = self.take(_U32)
        members, new_members = self.members(), self.members()
        if generation and not members:
            raise ProtocolViolation(f"{self.what}: membership generation {generation} has no members")
        return MembershipConfiguration(generation, members, new_members or None)

    def members(self) -> tuple[SafekeeperId, ...]:
        (count,) = self.take(_U32)
        if count > MAX_MEMBERS:
            raise ProtocolViolation(f"{self.what}: a membership set cannot have {count} members")
        found = []
        for _ in range(count):
            (node_id,) = self.take(_U64)
            host = self.text()
            (port,) = self.take(_U16)
            found.append(SafekeeperId(node_id, host, port))
        _check_members(tuple(found), ProtocolViolation)
        return tuple(found)

    def term_history(self) -> TermHistory:
        (count,) = self.take(_U32)
        if count > MAX_TERM_HISTORY or self.offset + count * _TERM_LSN.size > len(self.data):
            raise ProtocolViolation(f"{self.what} is cut off: its term history claims {count} entries")
        found = tuple(TermLsn(*self.take(_TERM_LSN)) for _ in range(count))
        for before, after in itertools.pairwise(found):
            if after.term <= before.term or after.lsn < before.lsn:
                raise ProtocolViolation(f"{self.what}: term history goes back from {before} to {after}")
        return found

    def finish(self) -> None:
        if self.offset != len(self.data):
            raise ProtocolViolation(f"{self.what} has {len(self.data) - self.offset} bytes too many")


def _parse_id(kind: type[TenantId] | type[TimelineId], reader: _Reader) -> Any:
    try:
        return kind.parse(reader.text())
    except ValueError as error:
        raise ProtocolViolation(f"{reader.what}: {error}") from None


def _parse_proposer_greeting(body: bytes) -> ProposerGreeting:
    reader = _Reader(body, "ProposerGreeting")
    ttid = TenantTimelineId(_parse_id(TenantId, reader), _parse_id(TimelineId, reader))
    mconf = reader.membership()
    pg_version, system_id, wal_seg_size = reader.take(_GREETING_TAIL)
    reader.finish()
    return ProposerGreeting(ttid, mconf, pg_version, system_id, wal_seg_size)


def _parse_elected(body: bytes) -> ProposerElected:
    reader = _Reader(body, "ProposerElected")
    reader.offset = 0
    _, generation, term, start_streaming_at = reader.take(_ELECTED)
    history = reader.term_history()
    reader.finish()
    if not history:
        raise ProtocolViolation("ProposerElected has an empty term history")
    if history[-1].term != term:
        raise ProtocolViolation(f"ProposerElected of term {term} has a history that ends in term {history[-1].term}")
    return ProposerElected(generation, term, start_streaming_at, history)


def parse_append_request(body: memoryview | bytes) -> AppendRequest:
    """An AppendRequest whose ``wal_data`` views ``body``: valid as long as the receive buffer is."""
    if len(body) < 45:
        raise ProtocolViolation(f"AppendRequest is cut off at {len(body)} bytes")
    _, generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn = _APPEND_REQUEST.unpack_from(body)
    wal_data = body[45:]
    if end_lsn - begin_lsn != len(wal_data):
        raise ProtocolViolation(f"AppendRequest carries {len(wal_data)} bytes of WAL and claims {begin_lsn:#x}..{end_lsn:#x}")
    if len(wal_data) > MAX_APPEND_BYTES:
        raise ProtocolViolation(f"AppendRequest carries {len(wal_data)} bytes of WAL, more than {MAX_APPEND_BYTES}")
    return AppendRequest(generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn, wal_data)


def framed_append(buffer: memoryview, at: int, filled: int) -> AppendRequest | None:
    """The AppendRequest in the CopyData message at this place of a receive buffer, to be read like the others' views of it.

    None when there is something else, or not all of it within the first ``filled`` bytes. It takes FRAMED_APPEND_OVERHEAD bytes
    and its WAL.
    """
    data = at + FRAMED_APPEND_OVERHEAD
    if data > filled:
        return None
    found = FRAMED_APPEND_REQUEST.unpack_from(buffer, at)
    tag, length, kind, generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn = found
    count = end_lsn - begin_lsn
    if (
        tag != b"d"
        or kind != b"a"
        or length != count + _APPEND_LENGTH
        or not 0 <= count <= MAX_APPEND_BYTES
        or data + count > filled
    ):
        return None
    return AppendRequest(generation, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn, buffer[data : data + count])


def parse_proposer_message(body: memoryview | bytes) -> ProposerMessage:
    """What a proposer sent. Raises ProtocolViolation."""
    if not body:
        raise ProtocolViolation("empty message from the proposer")
    tag = body[0]
    if tag == 97:  # a
        return parse_append_request(body)
    data = bytes(body)
    if tag == 103:  # g
        return _parse_proposer_greeting(data)
    if tag == 118:  # v
        reader = _Reader(data, "VoteRequest")
        reader.offset = 0
        _, generation, term = reader.take(_VOTE_REQUEST)
        reader.finish()
        return VoteRequest(generation, term)
    if tag == 101:  # e
        return _parse_elected(data)
    raise ProtocolViolation(f"unknown message {data[:1]!r} from the proposer")


def parse_append_response(body: memoryview | bytes) -> AppendResponse:
    """An AppendResponse."""
    if len(body) < 53:
        raise ProtocolViolation(f"AppendResponse is cut off at {len(body)} bytes")
    _, generation, term, flush_lsn, commit_lsn, ts, xmin, catalog_xmin = _APPEND_RESPONSE.unpack_from(body)
    standby = HotStandbyFeedback(ts, xmin, catalog_xmin) if ts or xmin or catalog_xmin else NO_STANDBY_FEEDBACK
    feedback = PageserverFeedback.parse(body[53:]) if len(body) > 53 else None
    return AppendResponse(generation, term, flush_lsn, commit_lsn, standby, feedback)


def parse_acceptor_message(body: memoryview | bytes) -> AcceptorMessage:
    """What an acceptor sent. Raises ProtocolViolation."""
    if not body:
        raise ProtocolViolation("empty message from the acceptor")
    tag = body[0]
    if tag == 97:  # a
        return parse_append_response(body)
    data = bytes(body)
    if tag == 103:  # g
        reader = _Reader(data, "AcceptorGreeting")
        (node_id,) = reader.take(_U64)
        mconf = reader.membership()
        (term,) = reader.take(_U64)
        reader.finish()
        return AcceptorGreeting(node_id, mconf, term)
    if tag == 118:  # v
        reader = _Reader(data, "VoteResponse")
        reader.offset = 0
        _, generation, term, vote_given, flush_lsn, truncate_lsn = reader.take(_VOTE_RESPONSE)
        history = reader.term_history()
        reader.finish()
        return VoteResponse(generation, term, bool(vote_given), flush_lsn, truncate_lsn, history)
    raise ProtocolViolation(f"unknown message {data[:1]!r} from the acceptor")


def refuse_term(generation: int, term: int) -> AppendResponse:
    """The answer by which a deposed leader learns of a higher term."""
    return AppendResponse(generation, term, INVALID_LSN, INVALID_LSN)
