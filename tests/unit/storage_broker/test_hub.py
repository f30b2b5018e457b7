"""Channels: order, loss of the oldest, filtering, life of the timelines' channels."""

from neon_services.ground.ids import TenantId, TenantTimelineId, TimelineId
from neon_services.protocols.broker_messages import SAFEKEEPER_DISCOVERY_REQUEST, SAFEKEEPER_TIMELINE_INFO
from neon_services.storage_broker.hub import Channel, Hub, Published, Receiver

INFO = frozenset({SAFEKEEPER_TIMELINE_INFO})
ONE = TenantTimelineId(TenantId(bytes(16)), TimelineId(b"1" * 16))
TWO = TenantTimelineId(TenantId(bytes(16)), TimelineId(b"2" * 16))


def info(ttid: TenantTimelineId | None, payload: bytes) -> Published:
    return Published(SAFEKEEPER_TIMELINE_INFO, ttid, payload)


def drain(receiver: Receiver) -> list[bytes]:
    taken = []
    while (message := receiver.take()) is not None:
        taken.append(message.payload)
    return taken


def test_capacity_is_rounded_up_to_a_power_of_two() -> None:
    assert [Channel(n).capacity for n in (1, 2, 3, 32, 33)] == [1, 2, 4, 32, 64]


def test_messages_reach_all_and_their_timeline_only() -> None:
    hub = Hub(4, 4)
    woken: list[str] = []
    everything = hub.subscribe(None, INFO, lambda: woken.append("all"))
    one = hub.subscribe(ONE, INFO, lambda: woken.append("one"))
    two = hub.subscribe(TWO, INFO, lambda: woken.append("two"))
    assert hub.publish(info(ONE, b"a")) == 2
    assert hub.publish(info(TenantTimelineId(TenantId(b"x" * 16), TimelineId(b"y" * 16)), b"b")) == 1
    assert drain(everything) == [b"a", b"b"]
    assert drain(one) == [b"a"]
    assert drain(two) == []
    assert woken == ["all", "one", "all"]


def test_a_slow_receiver_loses_the_oldest_and_is_told_how_many() -> None:
    hub = Hub(4, 4)
    slow = hub.subscribe(None, INFO, lambda: None)
    fast = hub.subscribe(None, INFO, lambda: None)
    seen = []
    for number in range(11):
        hub.publish(info(ONE, bytes([number])))
        seen += drain(fast)
    assert seen == [bytes([n]) for n in range(11)]
    assert drain(slow) == [bytes([n]) for n in range(7, 11)]
    assert (slow.lost, fast.lost) == (7, 0)
    hub.publish(info(ONE, b"z"))
    assert drain(slow) == [b"z"]
    assert slow.lost == 7


def test_a_receiver_gets_nothing_from_before_its_subscription_and_nothing_of_other_types() -> None:
    hub = Hub(4, 4)
    hub.publish(info(ONE, b"early"))
    requests = hub.subscribe(None, frozenset({SAFEKEEPER_DISCOVERY_REQUEST}), lambda: None)
    nothing = hub.subscribe(None, frozenset(), lambda: None)
    hub.publish(info(ONE, b"a"))
    hub.publish(Published(SAFEKEEPER_DISCOVERY_REQUEST, ONE, b"r"))
    assert drain(requests) == [b"r"]
    assert drain(nothing) == []


def test_a_timeline_channel_lives_as_long_as_its_last_receiver() -> None:
    hub = Hub(4, 4)
    first = hub.subscribe(ONE, INFO, lambda: None)
    second = hub.subscribe(ONE, INFO, lambda: None)
    assert hub.timeline_channels == 1
    hub.unsubscribe(ONE, first)
    hub.publish(info(ONE, b"a"))
    assert drain(second) == [b"a"]
    hub.unsubscribe(ONE, second)
    assert hub.timeline_channels == 0
    assert hub.publish(info(ONE, b"b")) == 1
