"""/metrics, /health and /ready, by a real client over a real socket."""

import asyncio
import contextlib
from dataclasses import dataclass

import httpx
import pytest

from sona.errors import PortInUse
from sona.http.app import build_app
from sona.http.server import HttpServer


@dataclass
class Feeling:
    alive: bool = True
    ready: bool = False
    word: str = "loading weights"

    def is_alive(self):
        return self.alive

    def is_ready(self):
        return self.ready

    def stage(self):
        return self.word


@contextlib.asynccontextmanager
async def answering(probe):
    server = HttpServer(build_app(probe, lambda: b"m 1\n"), host="127.0.0.1", port=0)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(server.serve())
        await server.started()
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
                yield client, server
        finally:
            server.stop()


async def test_alive_and_not_ready_while_loading():
    async with answering(Feeling()) as (client, _):
        health, ready = await client.get("/health"), await client.get("/ready")
    assert (health.status_code, health.json()) == (200, {"ok": True, "stage": "loading weights"})
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")


async def test_ready_when_serving():
    async with answering(Feeling(ready=True, word="serving")) as (client, _):
        ready = await client.get("/ready")
    assert (ready.status_code, ready.json()) == (200, {"ok": True, "stage": "serving"})


async def test_a_dead_engine_is_neither():
    async with answering(Feeling(alive=False, ready=True)) as (client, _):
        codes = [(await client.get(path)).status_code for path in ("/health", "/ready")]
    assert codes == [503, 503]


async def test_metrics_have_prometheus_type():
    async with answering(Feeling()) as (client, _):
        response = await client.get("/metrics")
    assert response.text == "m 1\n"
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_nothing_else_is_there():
    async with answering(Feeling()) as (client, _):
        missing = await client.get("/v1/models")
        wrong = await client.post("/health")
    assert (missing.status_code, wrong.status_code) == (404, 405)


async def test_a_taken_port_is_said_with_what_to_do():
    async with answering(Feeling()) as (_, server):
        with pytest.raises(PortInUse, match="choose another --port"):
            HttpServer(build_app(Feeling(), bytes), host="127.0.0.1", port=server.port)


def test_a_host_of_another_machine_is_refused():
    with pytest.raises(PortInUse, match=r"192\.0\.2\.1"):
        HttpServer(build_app(Feeling(), bytes), host="192.0.2.1", port=0)
