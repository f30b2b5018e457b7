"""The broker as its users see it. One BrokerClient per process; each call is one attempt.

Invariant: a call never hides a failure. Every stream ends with BrokerError when the broker goes away; whoever runs it tries
again no sooner than after RETRY_INTERVAL_S, because gossip that is late by a second is worth less than a broker that is
left in peace. Messages are those of protocols/broker_messages.py.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc

from neon_services.ground.errors import ConfigError, NeonError
from neon_services.ground.ids import TenantTimelineId
from neon_services.ground.net import parse_endpoint
from neon_services.ground.tls import ca_bundle, client_context
from neon_services.protocols import broker_messages as bm

RETRY_INTERVAL_S = 1.0
PUBLISH_TIMEOUT_S = 5.0


class BrokerError(NeonError):
    """The broker cannot be reached, went away, or refused the call."""


class BrokerClient:
    """A lazily connected channel to one broker. Use it on the event loop that runs when it is first used."""

    def __init__(self, endpoint: str, *, keepalive_interval_ms: int = 5000, ca_file: Path | None = None) -> None:
        """``endpoint`` is ``http://HOST:PORT``, or ``https://HOST:PORT`` with a certificate that the CA file vouches for.

        Without a CA file those of the system do. Raises ConfigError.
        """
        parsed = parse_endpoint(endpoint, what="--broker-endpoint")
        self.endpoint = endpoint
        self._target = f"dns:///{parsed.netloc}"
        self._tls = parsed.tls
        self._ca_file = ca_file
        self._authorities: bytes | None = None
        self._closing: set[asyncio.Task[None]] = set()
        if self._tls and ca_file is not None:
            client_context(ca_file)  # grpc would find out when it connects, and not say what is wrong
        self._keepalive_interval_ms = keepalive_interval_ms
        self._channel: Any = None

    def _follow_authorities(self) -> None:
        """With another CA file comes another channel: this one would never trust a certificate of the new authority."""
        if not self._tls or self._ca_file is None:
            return
        try:
            authorities = ca_bundle(self._ca_file)
            if authorities != self._authorities:
                client_context(self._ca_file)  # half a file must not take the place of a whole one
        except ConfigError as error:
            if self._channel is None:
                raise BrokerError(f"broker {self.endpoint}: {error}") from error
            return  # it is being replaced: the next call looks again
        if authorities != self._authorities and self._channel is not None:
            closing = asyncio.get_running_loop().create_task(self._channel.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)
            self._channel = None
        self._authorities = authorities

    def _method(self, kind: str, name: str) -> Any:
        self._follow_authorities()
        if self._channel is None:
            options = [
                ("grpc.keepalive_time_ms", self._keepalive_interval_ms),
                ("grpc.keepalive_timeout_ms", 20_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.max_pings_without_data", 0),
                ("grpc.initial_reconnect_backoff_ms", 500),
                ("grpc.min_reconnect_backoff_ms", 5000),  # the time limit of one attempt to connect
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.enable_http_proxy", 0),
                ("grpc.use_local_subchannel_pool", 1),
            ]
            if self._tls:
                credentials = grpc.ssl_channel_credentials(root_certificates=self._authorities)
                self._channel = grpc.aio.secure_channel(self._target, credentials, options=options)
            else:
                self._channel = grpc.aio.insecure_channel(self._target, options=options)
        return getattr(self._channel, kind)(f"/{bm.SERVICE}/{name}")

    async def close(self) -> None:
        """Drop the connection; running calls end with BrokerError."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
        await asyncio.gather(*self._closing)

    @contextlib.asynccontextmanager
    async def _errors(self, what: str) -> AsyncIterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise BrokerError(f"{what} at broker {self.endpoint}: {error.code().name}: {error.details()}") from error
        except asyncio.CancelledError as error:
            # grpc reports a channel closed under a call as a cancellation; ours must stay one
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                raise BrokerError(f"{what} at broker {self.endpoint}: the client was closed") from error
            raise
        except grpc.aio.UsageError as error:
            raise BrokerError(f"{what} at broker {self.endpoint}: {error}") from error

    async def publish_infos(self, infos: AsyncIterator[Any]) -> None:
        """Publish SafekeeperTimelineInfo messages until the iterator ends. Raises BrokerError when the stream breaks."""
        async with self._errors("publishing"):
            call = self._method("stream_unary", "PublishSafekeeperInfo")()
            try:
                async for info in infos:
                    await call.write(info.SerializeToString())
                await call.done_writing()
                await call
            except asyncio.InvalidStateError:
                await call  # the broker ended the stream: its status says why
            finally:
                call.cancel()

    async def subscribe_all(self) -> AsyncIterator[Any]:
        """SafekeeperTimelineInfo of every timeline, as they come. Raises BrokerError when the stream ends."""
        request = bm.SubscribeSafekeeperInfoRequest(all=bm.Empty())
        async for data in self._subscribe("SubscribeSafekeeperInfo", request):
            yield bm.SafekeeperTimelineInfo.FromString(data)

    async def subscribe(self, ttid: TenantTimelineId | None, types: Iterable[int]) -> AsyncIterator[Any]:
        """TypedMessage of the wanted types, of one timeline or (None) of all. Raises BrokerError when the stream ends."""
        request = bm.SubscribeByFilterRequest(types=[bm.TypeSubscription(type=wanted) for wanted in types])
        if ttid is not None:
            request.tenant_timeline_id.enabled = True
            request.tenant_timeline_id.tenant_timeline_id.CopyFrom(bm.encode_ttid(ttid))
        async for data in self._subscribe("SubscribeByFilter", request):
            yield bm.TypedMessage.FromString(data)

    async def _subscribe(self, name: str, request: Any) -> AsyncIterator[bytes]:
        call = None
        try:
            async with self._errors("subscription"):
                call = self._method("unary_stream", name)(request.SerializeToString())
                async for data in call:
                    yield data
                await call.code()
        finally:
            if call is not None:
                call.cancel()
        raise BrokerError(f"subscription at broker {self.endpoint}: the broker ended the stream")

    async def publish_one(self, payload: Any) -> None:
        """Publish one info, discovery request or discovery response. Raises BrokerError."""
        async with self._errors("publishing"):
            await self._method("unary_unary", "PublishOne")(bm.typed(payload).SerializeToString(), timeout=PUBLISH_TIMEOUT_S)
