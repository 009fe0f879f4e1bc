"""The real server, in this process or in one of its own, and short ways to talk to it."""

import contextlib
import hashlib
from pathlib import Path

from engine.config import EngineConfig
from sona import app
from sona.auth import AuthConfig, KeyConfig
from sona.client import AsyncClient
from sona.config import DataConfig, LearningConfig, ServerConfig, SonaConfig


def key_of(student: str) -> str:
    return f"key-of-{student}"


def configured(data: Path, *, model="", students=(), engine=None, learning=None, server=None):
    """A configuration with free ports; every student is a tenant with one user."""
    keys = tuple(
        KeyConfig(
            tenant=name,
            principal=name,
            role="user",
            sha256=hashlib.sha256(key_of(name).encode()).hexdigest(),
        )
        for name in students
    )
    return SonaConfig(
        model=str(model),
        server=ServerConfig(port=0, grpc_port=0, drain_s=2.0, **(server or {})),
        engine=EngineConfig(**{"num_pages": 600, **(engine or {})}),
        learning=LearningConfig(**(learning or {})),
        auth=AuthConfig(key=keys),
        data=DataConfig(dir=data),
    )


@contextlib.asynccontextmanager
async def running_server(config: SonaConfig):
    async with app.running(config, progress=lambda *_: None) as addresses:
        yield addresses


@contextlib.asynccontextmanager
async def client_of(addresses, student=None, **options):
    key = None if student is None else key_of(student)
    async with AsyncClient(addresses.grpc, api_key=key, **options) as client:
        yield client


async def until_learned(client, feedback_id, *, timeout_s=60.0):
    """Ask until a feedback is learned or turned down."""
    import asyncio

    from sona.v1 import feedback_pb2

    async def look():
        while True:
            feedback = await client.get_feedback(feedback_id)
            is_open = feedback.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
            if not is_open or feedback.reason:
                return feedback
            await asyncio.sleep(0.01)

    return await asyncio.wait_for(look(), timeout_s)
