"""Term histories: which leader wrote which range of a log, and where two logs part.

Invariant: in a history terms strictly increase and LSNs never decrease. A history says something only about WAL that is on
disk, so it is always read restricted to the log's flush_lsn: an entry beyond it was adopted but no byte of it arrived.
"""

import itertools

from neon_services.ground.errors import CorruptionError
from neon_services.ground.lsn import Lsn, format_lsn
from neon_services.protocols.safekeeper_messages import TermHistory


def up_to(history: TermHistory, flush_lsn: int) -> TermHistory:
    """The entries that start at or below flush_lsn."""
    end = len(history)
    while end and history[end - 1].lsn > flush_lsn:
        end -= 1
    return history[:end]


def last_log_term(history: TermHistory, flush_lsn: int) -> int:
    """The term of the leader that wrote the end of the log; 0 when nothing is known."""
    for entry in reversed(history):
        if entry.lsn <= flush_lsn:
            return entry.term
    return 0


def check(history: TermHistory) -> None:
    """Raise CorruptionError when the history goes back."""
    for before, after in itertools.pairwise(history):
        if after.term <= before.term or after.lsn < before.lsn:
            raise CorruptionError(f"term history goes back from {before} to {after}")


def divergence_lsn(leader: TermHistory, mine: TermHistory, flush_lsn: Lsn) -> Lsn | None:
    """Where a log with history ``mine`` (restricted to its ``flush_lsn``) parts from the leader's log.

    The leader streams from there and the acceptor cuts its log there; both compute it. None when they share no term: the
    log is then useless as a whole. Raises CorruptionError when one term starts at two positions.
    """
    common = 0
    for theirs, ours in zip(leader, mine, strict=False):
        if theirs.term != ours.term:
            break
        if theirs.lsn != ours.lsn:
            raise CorruptionError(
                f"term {ours.term} starts at {format_lsn(ours.lsn)} here, at {format_lsn(theirs.lsn)} in the leader's history"
            )
        common += 1
    if common == 0:
        return None
    if common == len(leader):
        return flush_lsn  # the last common term is the leader's own: everything here came from it
    return Lsn(min(leader[common].lsn, mine[common].lsn if common < len(mine) else flush_lsn))
