"""Who is connected to a timeline: proposers, readers, other members; and what their feedback adds up to."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neon_services.consensus.acceptor import PeerInfo, ProposerConnection
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.lsn import INVALID_LSN, Lsn, format_lsn
from neon_services.ground.pgtime import to_datetime
from neon_services.protocols.feedback import PageserverFeedback
from neon_services.protocols.replication_stream import StandbyStatus
from neon_services.protocols.safekeeper_messages import NO_STANDBY_FEEDBACK, AcceptorMessage, HotStandbyFeedback
from neon_services.protocols.sharding import ShardIdentity

# How long news of WAL may take to reach a reader. A replica waits for every commit; a pageserver that has said how far it is
# wants more soon; and one that has got some since then has something to do.
AT_ONCE_S, SOON_S, LATER_S = 0.0, 0.01, 0.2

_connection_ids = itertools.count(1)


def next_connection_id() -> int:
    """A number that names a connection in this process's status and logs."""
    return next(_connection_ids)


@dataclass(slots=True)
class WalReceiverState:
    """One proposer's connection. ``send`` writes one CopyData message to it, in the layout that ``pack`` makes."""

    send: Callable[[bytes], None]
    close: Callable[[str], None]
    pack: Callable[[AcceptorMessage], bytes] = operator.methodcaller("pack")
    conn_id: int = field(default_factory=next_connection_id)
    proposer: ProposerConnection = field(default_factory=ProposerConnection)
    retime: Callable[[], None] = lambda: None  #: readers want news sooner or later than before

    def to_json(self) -> dict[str, Any]:
        """Neon's JSON form."""
        return {"conn_id": self.conn_id, "status": "Streaming" if self.proposer.elected_term else "Voting"}


@dataclass(slots=True)
class WalSenderState:
    """One reader's connection. Its feedback says whether it is a pageserver or a standby."""

    ttid: TenantTimelineId
    address: str
    appname: str | None
    wake: Callable[[], None]
    close: Callable[[str], None]
    conn_id: int = field(default_factory=next_connection_id)
    pageserver: PageserverFeedback | None = None
    standby_status: StandbyStatus | None = None
    standby_feedback: HotStandbyFeedback = NO_STANDBY_FEEDBACK
    shard: ShardIdentity | None = None  #: of a reader of interpreted WAL
    news_s: float = AT_ONCE_S  #: how long news may take

    def to_json(self) -> dict[str, Any]:
        """Neon's JSON form."""
        if self.pageserver is not None:
            reply = self.pageserver
            feedback: dict[str, Any] = {
                "Pageserver": {
                    "current_timeline_size": reply.current_timeline_size,
                    "last_received_lsn": format_lsn(reply.last_received_lsn),
                    "disk_consistent_lsn": format_lsn(reply.disk_consistent_lsn),
                    "remote_consistent_lsn": format_lsn(reply.remote_consistent_lsn),
                    "replytime": to_datetime(reply.replytime_us).isoformat().replace("+00:00", "Z"),
                    "shard_number": reply.shard_number,
                    "corruption_detected": reply.corruption_detected,
                }
            }
        else:
            status = self.standby_status or StandbyStatus(INVALID_LSN, INVALID_LSN, INVALID_LSN, 0)
            feedback = {
                "Standby": {
                    "reply": {
                        "write_lsn": format_lsn(status.write_lsn),
                        "flush_lsn": format_lsn(status.flush_lsn),
                        "apply_lsn": format_lsn(status.apply_lsn),
                        "reply_ts": status.reply_time_us,
                        "reply_requested": status.reply_requested,
                    },
                    "hs_feedback": {
                        "ts": self.standby_feedback.ts_us,
                        "xmin": self.standby_feedback.xmin,
                        "catalog_xmin": self.standby_feedback.catalog_xmin,
                    },
                }
            }
        ttid = {"tenant_id": str(self.ttid.tenant_id), "timeline_id": str(self.ttid.timeline_id)}
        about = {"addr": self.address, "conn_id": self.conn_id, "appname": self.appname, "feedback": feedback}
        if self.shard is not None:
            return {"Interpreted": {"ttid": ttid, "shard": self.shard.to_json(), **about}}
        return {"Vanilla": {"ttid": ttid, **about}}


@dataclass(slots=True)
class Peer:
    """Another member as the broker last described it. ``seen_at`` is the monotonic clock's time of its arrival."""

    sk_id: int
    term: int
    flush_lsn: Lsn
    local_start_lsn: Lsn
    info: PeerInfo
    pg_connstr: str
    http_connstr: str
    https_connstr: str | None
    seen_at: float

    def to_json(self) -> dict[str, Any]:
        """Neon's JSON form."""
        return {
            "sk_id": self.sk_id,
            "term": self.term,
            "last_log_term": self.info.last_log_term,
            "flush_lsn": format_lsn(self.flush_lsn),
            "commit_lsn": format_lsn(self.info.commit_lsn),
            "local_start_lsn": format_lsn(self.local_start_lsn),
            "pg_connstr": self.pg_connstr,
            "http_connstr": self.http_connstr,
            "https_connstr": self.https_connstr,
        }


def aggregate_standby_feedback(senders: list[WalSenderState]) -> HotStandbyFeedback:
    """The oldest transactions that any replica still needs (0 = none), at the time of the newest report."""
    found = [s.standby_feedback for s in senders if s.standby_feedback is not NO_STANDBY_FEEDBACK]
    return HotStandbyFeedback(
        max((f.ts_us for f in found), default=0),
        min((f.xmin for f in found if f.xmin), default=0),
        min((f.catalog_xmin for f in found if f.catalog_xmin), default=0),
    )


def standby_horizon(senders: list[WalSenderState]) -> Lsn:
    """The lowest position that any replica has replayed up to; 0 without replicas."""
    applied = [s.standby_status.apply_lsn for s in senders if s.standby_status is not None]
    return min((lsn for lsn in applied if lsn), default=INVALID_LSN)
