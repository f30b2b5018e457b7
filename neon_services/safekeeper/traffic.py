"""How many bytes went over the WAL port, by who was at the other end: the metric ``safekeeper_pg_io_bytes_total``.

Invariant: nothing is added up while bytes flow; connections count for themselves, and their counts are asked for when somebody
reads the metrics, and once more when they end. Names that clients choose make no more than ``MAX_LABELS`` label sets.
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from neon_services.protocols.pgframe import FrameConnection

LABELS = ("client_az", "sk_az", "app_name", "dir", "same_az")
UNKNOWN = "unknown"
MAX_LABELS = 1000
MAX_NAME = 64

_Origin = tuple[str, str]  # the client's availability zone and application_name


class Traffic(Collector):
    """Of one process. ``availability_zone`` is this safekeeper's."""

    def __init__(self) -> None:
        self.availability_zone: str | None = None
        self._ended: dict[_Origin, list[int]] = {}
        self._open: dict[FrameConnection, _Origin] = {}

    def begin(self, connection: FrameConnection, client_az: str | None, app_name: str | None) -> None:
        """The client has said who it is."""
        origin = ((client_az or UNKNOWN)[:MAX_NAME], (app_name or UNKNOWN)[:MAX_NAME])
        if origin not in self._ended:
            if len(self._ended) >= MAX_LABELS:
                origin = (UNKNOWN, UNKNOWN)
            self._ended.setdefault(origin, [0, 0])
        self._open[connection] = origin

    def end(self, connection: FrameConnection) -> None:
        """The connection is gone, whether it has begun or not."""
        total = self._ended.setdefault(self._open.pop(connection, (UNKNOWN, UNKNOWN)), [0, 0])
        total[0] += connection.received_bytes
        total[1] += connection.sent_bytes

    def _same_az(self, client_az: str) -> str:
        if UNKNOWN in (client_az, self.availability_zone or UNKNOWN):
            return UNKNOWN
        return "true" if client_az == self.availability_zone else "false"

    def collect(self) -> Iterable[Metric]:
        """The sums of this moment."""
        totals = {origin: list(total) for origin, total in self._ended.items()}
        for connection, origin in self._open.items():
            totals[origin][0] += connection.received_bytes
            totals[origin][1] += connection.sent_bytes
        family = CounterMetricFamily("safekeeper_pg_io_bytes", "Bytes read from and written to the WAL port", labels=LABELS)
        for (client_az, app_name), total in totals.items():
            for direction, count in zip(("read", "write"), total, strict=True):
                labels = (client_az, self.availability_zone or UNKNOWN, app_name, direction, self._same_az(client_az))
                family.add_metric(labels, count)
        yield family


TRAFFIC = Traffic()
