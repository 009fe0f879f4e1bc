"""Clients of a running server: thin, typed, over gRPC.

    with Client() as sona:
        reply = sona.generate("Invoice date: 2024-03-05", temperature=0)
        sona.feedback(reply.request_id, correction="05.03.2024")

A refused call raises `grpc.RpcError`; `explain` says why in one line.
"""

from sona.client.aio import AsyncClient
from sona.client.calls import DEFAULT_ADDRESS, explain
from sona.client.sync import Client

__all__ = ["DEFAULT_ADDRESS", "AsyncClient", "Client", "explain"]
