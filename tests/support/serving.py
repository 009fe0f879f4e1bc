"""A real gRPC server over the toy domain, on a free loopback port."""

import contextlib

import grpc.aio
from support.toy_domain import ToyDomain

from sona.auth import Authenticator, KeyConfig, hash_key
from sona.rpc.server import RpcServer, build_server

KEYS = {
    "user-key": KeyConfig(tenant="acme", principal="ann", role="user", sha256=hash_key("user-key")),
    "operator-key": KeyConfig(
        tenant="acme", principal="olga", role="operator", sha256=hash_key("operator-key")
    ),
}


@contextlib.asynccontextmanager
async def serving(toy: ToyDomain, *, with_keys: bool = False, observe=None):
    """A real gRPC server over the toy on a free loopback port, and a channel to it."""
    authenticator = Authenticator(tuple(KEYS.values()) if with_keys else ())
    server = build_server(toy.domain(), authenticator, host="127.0.0.1", port=0, observe=observe)
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield Served(server, channel)
    finally:
        await server.stop(0)


class Served:
    """A running server and a channel to it."""

    def __init__(self, server: RpcServer, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.channel = channel
        self.address = f"127.0.0.1:{server.port}"


def bearer(key: str):
    """Call metadata with a key."""
    return (("authorization", f"Bearer {key}"),)
