"""Messages between proposer and acceptor, protocol version 2: the older layout, still the default of START_WAL_PUSH.

Little-endian structures, the tag is a u64, ids are 16 raw bytes; there are no membership generations, so every message stands
for one of generation 0. What a proposer sends is parsed into the messages of version 3, and the answers of version 3 are packed
in the old layout, so the acceptor knows only one protocol. The feedback of pageservers inside an AppendResponse is big-endian
here too. A message that is cut off, too long or impossible raises ProtocolViolation and nothing else.
"""

import itertools
import struct

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.protocols.safekeeper_messages import (
    MAX_APPEND_BYTES,
    MAX_TERM_HISTORY,
    NO_MEMBERSHIP,
    AcceptorGreeting,
    AcceptorMessage,
    AppendRequest,
    ProposerElected,
    ProposerGreeting,
    ProposerMessage,
    TermLsn,
    VoteRequest,
    VoteResponse,
)

PROTOCOL_VERSION_2 = 2

_GREETING = struct.Struct("<QII16sQ16s16sII")
_VOTE_REQUEST = struct.Struct("<QQ16s")
_ELECTED = struct.Struct("<QQQI")
_TERM_LSN = struct.Struct("<QQ")
_U64 = struct.Struct("<Q")
_APPEND_REQUEST = struct.Struct("<QQQQQQQ16s")
_ACCEPTOR_GREETING = struct.Struct("<QQQ")
_VOTE_RESPONSE = struct.Struct("<QQQQQI")
_APPEND_RESPONSE = struct.Struct("<QQQQqQQ")


def parse_proposer_message(body: memoryview | bytes) -> ProposerMessage:
    """What a proposer sent; an AppendRequest's WAL views ``body``. Raises ProtocolViolation."""
    if len(body) < 8:
        raise ProtocolViolation(f"the proposer's message is cut off at {len(body)} bytes")
    (tag,) = _U64.unpack_from(body)
    if tag == 97:  # a
        return _parse_append_request(body)
    if tag == 103:  # g
        return _parse_greeting(body)
    if tag == 118:  # v
        if len(body) < _VOTE_REQUEST.size:  # older proposers send more: it is ignored
            raise ProtocolViolation(f"VoteRequest is cut off at {len(body)} bytes")
        return VoteRequest(0, _VOTE_REQUEST.unpack_from(body)[1])
    if tag == 101:  # e
        return _parse_elected(body)
    raise ProtocolViolation(f"unknown message with tag {tag:#x} from the proposer")


def _parse_greeting(body: memoryview | bytes) -> ProposerGreeting:
    if len(body) != _GREETING.size:
        raise ProtocolViolation(f"ProposerGreeting has {len(body)} bytes instead of {_GREETING.size}")
    _, version, pg_version, _, system_id, timeline_id, tenant_id, _, segment_size = _GREETING.unpack(body)
    if version != PROTOCOL_VERSION_2:
        raise ProtocolViolation(
            f"ProposerGreeting of protocol version {version} on a connection of version {PROTOCOL_VERSION_2}"
        )
    ttid = TenantTimelineId(TenantId(tenant_id), TimelineId(timeline_id))
    return ProposerGreeting(ttid, NO_MEMBERSHIP, pg_version, system_id, segment_size)


def _parse_elected(body: memoryview | bytes) -> ProposerElected:
    if len(body) < _ELECTED.size:
        raise ProtocolViolation(f"ProposerElected is cut off at {len(body)} bytes")
    _, term, start_streaming_at, count = _ELECTED.unpack_from(body)
    size = _ELECTED.size + count * _TERM_LSN.size + _U64.size
    if count > MAX_TERM_HISTORY or len(body) != size:
        raise ProtocolViolation(f"ProposerElected has {len(body)} bytes, but {count} entries in its term history")
    history = tuple(TermLsn(*_TERM_LSN.unpack_from(body, _ELECTED.size + i * _TERM_LSN.size)) for i in range(count))
    for before, after in itertools.pairwise(history):
        if after.term <= before.term or after.lsn < before.lsn:
            raise ProtocolViolation(f"ProposerElected: term history goes back from {before} to {after}")
    if not history or history[-1].term != term:
        raise ProtocolViolation(f"ProposerElected of term {term} has a history that does not end in that term")
    return ProposerElected(0, term, start_streaming_at, history)


def _parse_append_request(body: memoryview | bytes) -> AppendRequest:
    if len(body) < _APPEND_REQUEST.size:
        raise ProtocolViolation(f"AppendRequest is cut off at {len(body)} bytes")
    _, term, _, begin_lsn, end_lsn, commit_lsn, truncate_lsn, _ = _APPEND_REQUEST.unpack_from(body)
    wal_data = body[_APPEND_REQUEST.size :]
    if end_lsn - begin_lsn != len(wal_data):
        raise ProtocolViolation(f"AppendRequest carries {len(wal_data)} bytes of WAL and claims {begin_lsn:#x}..{end_lsn:#x}")
    if len(wal_data) > MAX_APPEND_BYTES:
        raise ProtocolViolation(f"AppendRequest carries {len(wal_data)} bytes of WAL, more than {MAX_APPEND_BYTES}")
    return AppendRequest(0, term, begin_lsn, end_lsn, commit_lsn, truncate_lsn, wal_data)


def pack_acceptor_message(message: AcceptorMessage) -> bytes:
    """An answer in the old layout. A membership generation in it is lost: the acceptor refuses all but generation 0 before."""
    if isinstance(message, AcceptorGreeting):
        return _ACCEPTOR_GREETING.pack(103, message.term, message.node_id)  # the other way round than in version 3
    if isinstance(message, VoteResponse):
        history = message.term_history
        head = _VOTE_RESPONSE.pack(118, message.term, message.vote_given, message.flush_lsn, message.truncate_lsn, len(history))
        entries = b"".join(_TERM_LSN.pack(*entry) for entry in history)
        return head + entries + _U64.pack(0)  # timeline_start_lsn: not used by anybody
    head = _APPEND_RESPONSE.pack(97, message.term, message.flush_lsn, message.commit_lsn, *message.hs_feedback)
    return head if message.pageserver_feedback is None else head + message.pageserver_feedback.pack()
