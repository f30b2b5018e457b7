"""What every safekeeper said last about every timeline, for a minute: for people and scripts that ask now and then.

Invariant: bounded in time and in number; what was heard longest ago goes first. Subscribers never get anything from here.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator

from neon_services.ground.ids import TenantTimelineId

KEPT_S = 60.0
MAX_INFOS = 100_000


class LatestInfos:
    """``clock`` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float], max_infos: int = MAX_INFOS) -> None:
        self._clock = clock
        self._max_infos = max_infos
        self._infos: OrderedDict[tuple[TenantTimelineId, int], tuple[float, bytes]] = OrderedDict()

    def record(self, ttid: TenantTimelineId, safekeeper_id: int, payload: bytes) -> None:
        """A safekeeper's SafekeeperTimelineInfo, encoded, has come."""
        key, now = (ttid, safekeeper_id), self._clock()
        self._infos[key] = (now, payload)
        self._infos.move_to_end(key)
        self._forget(now)

    def _forget(self, now: float) -> None:
        infos = self._infos
        while infos and (len(infos) > self._max_infos or now - next(iter(infos.values()))[0] > KEPT_S):
            infos.popitem(last=False)

    def all(self) -> Iterator[tuple[TenantTimelineId, float, bytes]]:
        """(timeline, seconds since it was heard, info), what was heard longest ago first."""
        now = self._clock()
        self._forget(now)
        for (ttid, _), (heard_at, payload) in list(self._infos.items()):
            yield ttid, now - heard_at, payload
