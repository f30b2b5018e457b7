"""The broker's gRPC service: four methods over a Hub.

Invariant: a payload is decoded once, to learn its timeline, and sent on as the bytes it came in: fields that this version does
not know survive.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc

from neon_services.ground.errors import ProtocolViolation
from neon_services.ground.ids import TenantTimelineId
from neon_services.protocols import broker_messages as bm
from neon_services.storage_broker import metrics
from neon_services.storage_broker.hub import Hub, Published, Receiver
from neon_services.storage_broker.latest import LatestInfos

log = logging.getLogger(__name__)

LAG_WARNING_INTERVAL_S = 1.0


def _typed_message(message: Published) -> bytes:
    """The TypedMessage around an encoded payload: a varint field for the type, a length-delimited one for the payload."""
    field_number = bm.TypedMessage.DESCRIPTOR.fields_by_name[bm.PAYLOAD_FIELDS[message.type]].number
    encoded, length = bytearray([1 << 3, message.type, field_number << 3 | 2]), len(message.payload)
    while length > 0x7F:
        encoded.append(length & 0x7F | 0x80)
        length >>= 7
    encoded.append(length)
    return bytes(encoded) + message.payload


class BrokerService:
    """Serves publishers and subscribers. ``handler()`` is what a gRPC server registers."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        #: What every safekeeper said last, for people who ask.
        self.latest = LatestInfos(time.monotonic)
        self._next_lag_warning = 0.0
        self.stopped = False
        self._ready: set[asyncio.Event] = set()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service's methods. Requests and responses are bytes: this class decodes what it needs."""
        return grpc.method_handlers_generic_handler(
            bm.SERVICE,
            {
                "SubscribeSafekeeperInfo": grpc.unary_stream_rpc_method_handler(self.subscribe_safekeeper_info),
                "SubscribeByFilter": grpc.unary_stream_rpc_method_handler(self.subscribe_by_filter),
                "PublishSafekeeperInfo": grpc.stream_unary_rpc_method_handler(self.publish_safekeeper_info),
                "PublishOne": grpc.unary_unary_rpc_method_handler(self.publish_one),
            },
        )

    def stop(self) -> None:
        """End all subscriptions."""
        self.stopped = True
        for ready in self._ready:
            ready.set()

    # -- publishers

    async def publish_safekeeper_info(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> bytes:
        """Publish every info of the stream; one without proper ids ends the stream with InvalidArgument."""
        metrics.ACTIVE_PUBLISHERS.inc()
        try:
            async for data in requests:
                metrics.PROCESSED.inc()
                try:
                    info = bm.parse(bm.SafekeeperTimelineInfo, data)
                    ttid = bm.ttid_of(info)
                except ProtocolViolation as error:
                    await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
                self.latest.record(ttid, info.safekeeper_id, data)
                metrics.BROADCASTED.inc(self._hub.publish(Published(bm.SAFEKEEPER_TIMELINE_INFO, ttid, data)))
        finally:
            metrics.ACTIVE_PUBLISHERS.dec()
        return b""

    async def publish_one(self, data: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """Publish one typed message; InvalidArgument when its payload is not of its type."""
        try:
            message = bm.parse(bm.TypedMessage, data)
            payload = bm.payload_of(message)
            ttid = bm.ttid_of(payload)
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        metrics.PROCESSED.inc()
        metrics.PUBLISHED_ONEOFF.inc()
        if message.type == bm.SAFEKEEPER_TIMELINE_INFO:
            self.latest.record(ttid, payload.safekeeper_id, payload.SerializeToString())
        metrics.BROADCASTED.inc(self._hub.publish(Published(message.type, ttid, payload.SerializeToString())))
        return b""

    # -- subscribers

    async def subscribe_safekeeper_info(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Infos of one timeline, or of all."""
        ttid: TenantTimelineId | None = None
        try:
            request = bm.parse(bm.SubscribeSafekeeperInfoRequest, data)
            key = request.WhichOneof("subscription_key")
            if key is None:
                raise ProtocolViolation("subscription_key is missing: set either all or tenant_timeline_id")
            if key == "tenant_timeline_id":
                ttid = bm.decode_ttid(request.tenant_timeline_id)
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        await self._forward(context, ttid, frozenset({bm.SAFEKEEPER_TIMELINE_INFO}), lambda message: message.payload)

    async def subscribe_by_filter(self, data: bytes, context: grpc.aio.ServicerContext) -> None:
        """Messages of the wanted types, of one timeline or of all."""
        ttid: TenantTimelineId | None = None
        try:
            request = bm.parse(bm.SubscribeByFilterRequest, data)
            if request.HasField("tenant_timeline_id") and request.tenant_timeline_id.enabled:
                ttid = bm.ttid_of(request.tenant_timeline_id)
        except ProtocolViolation as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        await self._forward(context, ttid, frozenset(wanted.type for wanted in request.types), _typed_message)

    async def _forward(
        self,
        context: grpc.aio.ServicerContext,
        ttid: TenantTimelineId | None,
        types: frozenset[int],
        encode: Callable[[Published], bytes],
    ) -> None:
        """Send messages as they come until the subscriber leaves (which cancels this) or the broker stops."""
        with self.subscribed(ttid, types) as (receiver, ready):
            # headers first, so that the subscriber knows that it misses nothing from here on
            await context.send_initial_metadata(())
            while not self.stopped:
                ready.clear()
                while (message := receiver.take()) is not None:
                    self.take_lost(ttid, receiver)
                    await context.write(encode(message))
                self.take_lost(ttid, receiver)
                await ready.wait()

    @contextlib.contextmanager
    def subscribed(self, ttid: TenantTimelineId | None, types: frozenset[int]) -> Iterator[tuple[Receiver, asyncio.Event]]:
        """A place in a channel, and the event that is set when there is news in it or the broker stops."""
        gauge: Any = metrics.ALL_SUBSCRIBERS if ttid is None else metrics.TIMELINE_SUBSCRIBERS
        ready = asyncio.Event()
        receiver = self._hub.subscribe(ttid, types, ready.set)
        self._ready.add(ready)
        gauge.inc()
        try:
            yield receiver, ready
        finally:
            gauge.dec()
            self._ready.discard(ready)
            self._hub.unsubscribe(ttid, receiver)

    def take_lost(self, ttid: TenantTimelineId | None, receiver: Receiver) -> int:
        """How many messages the receiver lost since the last call; they are counted, and warned of at most once a second."""
        lost, receiver.lost = receiver.lost, 0
        if lost:
            self._count_lost(ttid, lost)
        return lost

    def _count_lost(self, ttid: TenantTimelineId | None, lost: int) -> None:
        metrics.DROPPED.inc(lost)
        now = time.monotonic()
        if now >= self._next_lag_warning:
            self._next_lag_warning = now + LAG_WARNING_INTERVAL_S
            log.warning("a subscriber of %s is too slow and lost %d messages", ttid or "all timelines", lost)
