"""ZeroMQ between the hub and its peers: authenticated, encrypted, typed; the data plane of the ring.

The hub binds one ROUTER socket, every peer connects one DEALER. CURVE is always on: the hub makes both key
pairs, and who holds the `HubAddress` (handed out over Ray only) may connect. Messages are msgpack of the
tagged unions in `types`; what does not decode is counted and dropped, and so are strangers.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from typing import Any

import msgspec
import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator

from caprl_async.types import HubMessage, PeerMessage

_ENCODER = msgspec.msgpack.Encoder()
_PEER = msgspec.msgpack.Decoder(PeerMessage)
_HUB = msgspec.msgpack.Decoder(HubMessage)
_LOOPBACK = "127.0.0.1"
_MAX_MESSAGE = 1 << 28  # bytes to the hub; whoever sends more is disconnected
_REFUSALS = "inproc://refusals"
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class HubKeys(msgspec.Struct, frozen=True, kw_only=True):
    """The two key pairs of one run, made by whoever starts the hub: a hub that is restarted has the same."""

    server_key: bytes
    server_secret: bytes
    client_key: bytes  # the peers' shared pair
    client_secret: bytes

    @classmethod
    def make(cls) -> HubKeys:
        server_key, server_secret = zmq.curve_keypair()
        client_key, client_secret = zmq.curve_keypair()
        return cls(
            server_key=server_key,
            server_secret=server_secret,
            client_key=client_key,
            client_secret=client_secret,
        )

    def __repr__(self) -> str:
        return "HubKeys(not shown)"


class HubAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the hub listens and what a peer needs to be let in. Secret: never logged."""

    endpoint: str
    server_key: bytes  # the hub's public key
    client_key: bytes  # the peers' shared key pair
    client_secret: bytes

    def __repr__(self) -> str:
        return f"HubAddress({self.endpoint}, keys not shown)"


def encode(message: Any) -> bytes:
    """Any message or value of `types` as msgpack."""
    return _ENCODER.encode(message)


def decode_peer(data: bytes) -> PeerMessage | None:
    """A message to the hub; None if it is none."""
    return _decode(_PEER, data)


def decode_hub(data: bytes) -> HubMessage | None:
    """A message from the hub; None if it is none."""
    return _decode(_HUB, data)


def _decode(decoder: Any, data: bytes) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class HubSocket:
    """The hub's end. Single event loop; `start` before use."""

    def __init__(self) -> None:
        self.dropped = 0  # messages that could not be decoded
        self.refused = 0  # connections of strangers: with a wrong key, or without any
        self._context = zmq.asyncio.Context()
        self._keys: HubKeys | None = None
        self._authenticator: AsyncioAuthenticator | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._counting: asyncio.Task[None] | None = None

    def start(self, host: str, keys: HubKeys, port: int = 0) -> HubAddress:
        """Binds `port` of `host` ("auto": this node's address); if it is 0 or taken, a free one."""
        self._keys = keys
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback(domain="*", credentials_provider=self)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.curve_server = True
        self._socket.curve_publickey = keys.server_key
        self._socket.curve_secretkey = keys.server_secret
        self._socket.router_handover = True  # a peer that reconnects keeps its name
        self._socket.linger = 0
        self._socket.sndhwm = self._socket.rcvhwm = 0  # bounded by credit, and ROUTER would drop silently
        self._socket.maxmsgsize = _MAX_MESSAGE
        self._socket.monitor(_REFUSALS, _REFUSED)
        # The socket's own thread waits until its event is taken: connected at once, and without a limit.
        events = self._context.socket(zmq.PAIR)
        events.rcvhwm = 0
        events.connect(_REFUSALS)
        self._counting = asyncio.create_task(self._count_refused(events))
        host = _node_address() if host == "auto" else host
        return HubAddress(
            endpoint=f"tcp://{host}:{self._bind(host, port)}",
            server_key=keys.server_key,
            client_key=keys.client_key,
            client_secret=keys.client_secret,
        )

    def _bind(self, host: str, port: int) -> int:
        assert self._socket is not None
        if port:
            try:
                self._socket.bind(f"tcp://{host}:{port}")
                return port
            except zmq.ZMQError as error:
                if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL):
                    raise
        return int(self._socket.bind_to_random_port(f"tcp://{host}"))

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked by the authenticator for every connection: `key` is the client's public key (z85)."""
        return self._keys is not None and key == self._keys.client_key

    async def _count_refused(self, events: zmq.asyncio.Socket) -> None:
        while True:
            await events.recv_multipart()
            self.refused += 1

    async def receive(self) -> tuple[bytes, PeerMessage]:
        """The next good message and who sent it."""
        assert self._socket is not None
        while True:
            frames = await self._socket.recv_multipart()
            message = decode_peer(frames[1]) if len(frames) == 2 else None
            if message is not None:
                return frames[0], message
            self.dropped += 1

    async def send(self, identity: bytes, data: bytes) -> None:
        """Sends encoded bytes; a peer that is gone gets nothing, its leases run out instead."""
        assert self._socket is not None
        await self._socket.send_multipart([identity, data])

    def close(self) -> None:
        """Closes everything; may be called twice."""
        if self._counting is not None:
            self._counting.cancel()
            self._counting = None
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None
        self._context.destroy(linger=0)


def connect(context: zmq.Context[Any], address: HubAddress, identity: str) -> Any:
    """A DEALER socket of `context` (blocking or asyncio), connected to the hub."""
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.IDENTITY, identity.encode())
    dealer.curve_serverkey = address.server_key
    dealer.curve_publickey = address.client_key
    dealer.curve_secretkey = address.client_secret
    dealer.linger = 0
    dealer.reconnect_ivl_max = 2000  # milliseconds
    dealer.connect(address.endpoint)
    return dealer


def _node_address() -> str:
    """This node's address as Ray knows it; without Ray, that of the route outwards."""
    try:
        import ray

        if ray.is_initialized():
            return str(ray.util.get_node_ip_address())
    except ImportError:
        return _LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: only asks for the route
        return str(probe.getsockname()[0])
