"""Messages as a reader of a trace wants them: short, with positions, without WAL bytes."""

from neon_services.protocols.safekeeper_messages import (
    AcceptorGreeting,
    AppendRequest,
    AppendResponse,
    MembershipConfiguration,
    ProposerElected,
    ProposerGreeting,
    TermHistory,
    VoteRequest,
    VoteResponse,
)


def brief(value: object) -> object:
    """The value, or text for it when it is a message."""
    match value:
        case AppendRequest():
            what = f"append [{value.begin_lsn}, {value.end_lsn})" if value.end_lsn > value.begin_lsn else "heartbeat"
            return f"{what} in term {value.term}, commit {value.commit_lsn}, truncate {value.truncate_lsn}"
        case AppendResponse():
            return f"flushed {value.flush_lsn} in term {value.term}, commit saved {value.commit_lsn}"
        case VoteRequest():
            return f"vote for term {value.term}? (generation {value.generation})"
        case VoteResponse():
            given = "given" if value.vote_given else "refused"
            return f"vote {given}: term {value.term}, flush {value.flush_lsn}, history {_history(value.term_history)}"
        case ProposerElected():
            history = _history(value.term_history)
            return f"elected in term {value.term}, streaming from {value.start_streaming_at}, history {history}"
        case ProposerGreeting():
            return f"greeting, {_mconf(value.mconf)}"
        case AcceptorGreeting():
            return f"greeting of {value.node_id}: term {value.term}, {_mconf(value.mconf)}"
        case _:
            return value


def _history(history: TermHistory) -> str:
    return " ".join(f"{entry.term}@{entry.lsn}" for entry in history) or "empty"


def _mconf(mconf: MembershipConfiguration) -> str:
    return f"generation {mconf.generation}"
