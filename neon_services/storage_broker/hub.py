"""Who gets which message: the broker's channels, without sockets or clocks.

Invariant: publishing never waits. A channel is a ring shared by its receivers; a receiver that falls behind by more than
the ring loses the oldest messages, never the newest, and keeps the order of each publisher. Nothing is kept for receivers
to come: every message is a full snapshot that its sender repeats.
"""

from collections.abc import Callable
from dataclasses import dataclass

from neon_services.ground.ids import TenantTimelineId


@dataclass(frozen=True, slots=True)
class Published:
    """One message on its way: its type, its timeline when it names one, and its payload, encoded."""

    type: int
    ttid: TenantTimelineId | None
    payload: bytes


class Channel:
    """A bounded ring of messages; its capacity is rounded up to a power of two."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a channel needs room for at least one message, not {capacity}")
        self._mask = (1 << (capacity - 1).bit_length()) - 1
        self._ring: list[Published | None] = [None] * (self._mask + 1)
        self._head = 0  # number of messages ever published here
        self.receivers: set[Receiver] = set()

    @property
    def capacity(self) -> int:
        """How many messages the ring holds."""
        return self._mask + 1

    def publish(self, message: Published) -> None:
        """Put the message into the ring, over the oldest, and wake the receivers."""
        self._ring[self._head & self._mask] = message
        self._head += 1
        for receiver in self.receivers:
            receiver.wake()

    def take(self, position: int) -> tuple[Published | None, int, int]:
        """(message at the position or None, the next position, messages lost before it)."""
        lost = max(0, self._head - self.capacity - position)
        position += lost
        if position == self._head:
            return None, position, lost
        return self._ring[position & self._mask], position + 1, lost

    @property
    def head(self) -> int:
        """The position of the next message."""
        return self._head


class Receiver:
    """One subscriber's place in a channel. ``wake`` is called whenever there is something new to take."""

    def __init__(self, channel: Channel, types: frozenset[int], wake: Callable[[], None]) -> None:
        self._channel = channel
        self._types = types
        self._position = channel.head
        self.wake = wake
        #: Messages overwritten before this receiver took them, whatever their type.
        self.lost = 0

    def take(self) -> Published | None:
        """The oldest message of a wanted type that is still there, or None."""
        while True:
            message, self._position, lost = self._channel.take(self._position)
            self.lost += lost
            if message is None or message.type in self._types:
                return message


class Hub:
    """One channel for everything, and one per timeline while somebody listens to it."""

    def __init__(self, timeline_capacity: int, all_capacity: int) -> None:
        self._timeline_capacity = timeline_capacity
        self._all = Channel(all_capacity)
        self._timelines: dict[TenantTimelineId, Channel] = {}

    def publish(self, message: Published) -> int:
        """Deliver to the "all" channel and to the timeline's, if it exists. The number of channels delivered to."""
        self._all.publish(message)
        channel = None if message.ttid is None else self._timelines.get(message.ttid)
        if channel is None:
            return 1
        channel.publish(message)
        return 2

    def subscribe(self, ttid: TenantTimelineId | None, types: frozenset[int], wake: Callable[[], None]) -> Receiver:
        """Listen to one timeline, or to all (None), from now on."""
        channel = self._all
        if ttid is not None:
            channel = self._timelines.setdefault(ttid, Channel(self._timeline_capacity))
        receiver = Receiver(channel, types, wake)
        channel.receivers.add(receiver)
        return receiver

    def unsubscribe(self, ttid: TenantTimelineId | None, receiver: Receiver) -> None:
        """Stop listening; a timeline's channel goes with its last receiver."""
        channel = self._all if ttid is None else self._timelines[ttid]
        channel.receivers.discard(receiver)
        if ttid is not None and not channel.receivers:
            del self._timelines[ttid]

    @property
    def timeline_channels(self) -> int:
        """How many timelines somebody listens to."""
        return len(self._timelines)
