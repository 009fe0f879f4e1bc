"""The gRPC server itself: keys, arity of denials, health, reflection, ports, counting."""

from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from support.serving import bearer, serving
from support.toy_domain import ToyDomain

from sona.auth import Authenticator
from sona.errors import PortInUse
from sona.rpc.server import SERVICES, build_server
from sona.v1 import control_pb2, feedback_pb2, inference_pb2
from sona.v1.control_pb2_grpc import ControlServiceStub
from sona.v1.feedback_pb2_grpc import FeedbackServiceStub
from sona.v1.inference_pb2_grpc import InferenceServiceStub

NOT_BUILT = {
    "StartDeepRun", "GetDeepRun", "CancelDeepRun",
    "ExportAdapter", "PromoteAdapter", "RemoveInfluence", "ListPolicies", "SearchPatterns",
    "GetPattern", "ListPatterns", "PutPattern", "DeletePattern", "GetBankStats", "Drain",
    "SearchWitness", "VerifyWitness",
}  # fmt: skip


def methods():
    pool = descriptor_pool.Default()
    for service in SERVICES:
        yield from pool.FindServiceByName(service).methods


def caller(channel, method):
    """A call of a method by its descriptor, with an empty request."""
    make = {
        (False, False): channel.unary_unary,
        (False, True): channel.unary_stream,
        (True, True): channel.stream_stream,
    }[method.client_streaming, method.server_streaming]
    call = make(f"/{method.containing_service.full_name}/{method.name}")
    request = iter([]) if method.client_streaming else b""
    return call, request


async def end_of(channel, method, metadata=()) -> Any:
    """How a call with an empty request ends."""
    make, request = caller(channel, method)
    call = make(request, metadata=metadata)
    try:
        if method.server_streaming:
            await call.read()
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_every_method_without_a_key_is_unauthenticated():
    # A denial of the wrong arity would be UNKNOWN.
    async with serving(ToyDomain(), with_keys=True) as served:
        for method in methods():
            error = await end_of(served.channel, method)
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method.full_name
            assert "Bearer KEY" in error.details()
            error = await end_of(served.channel, method, bearer("wrong"))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED, method.full_name


async def test_exactly_what_is_not_built_says_so_by_name():
    async with serving(ToyDomain()) as served:
        unbuilt = set()
        for method in methods():
            if method.name == "WatchEvents":
                continue  # waits for an event
            error = await end_of(served.channel, method)
            if error is not None and error.code() is grpc.StatusCode.UNIMPLEMENTED:
                assert error.details().startswith(f"{method.name} is not built")
                unbuilt.add(method.name)
    assert unbuilt == NOT_BUILT


async def test_a_key_names_the_caller_of_every_arity():
    toy = ToyDomain()
    async with serving(toy, with_keys=True) as served:
        inference = InferenceServiceStub(served.channel)
        request = inference_pb2.GenerateRequest(text="a")
        await inference.Generate(request, metadata=bearer("user-key"))
        stream = inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(request=request), metadata=bearer("operator-key")
        )
        assert [event async for event in stream]
        feedback = feedback_pb2.SubmitFeedbackRequest(feedback_id="f", request_id="r", score=1)
        submitted = FeedbackServiceStub(served.channel).SubmitFeedbackStream(
            iter([feedback_pb2.SubmitFeedbackStreamRequest(request=feedback)]),
            metadata=bearer("user-key"),
        )
        assert [outcome async for outcome in submitted]
    assert [principal.name for _, principal in toy.inference.calls] == ["ann", "olga"]
    assert toy.feedback.records["f"].principal == "ann"


async def test_health_follows_the_server_and_needs_no_key():
    serving_now = health_pb2.HealthCheckResponse.SERVING
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    async with serving(ToyDomain(), with_keys=True) as served:
        stub = health_pb2_grpc.HealthStub(served.channel)

        async def statuses():
            names = ("", *SERVICES)
            return {
                (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status
                for name in names
            }

        assert await statuses() == {not_serving}
        await served.server.serve()
        assert await statuses() == {serving_now}
        await served.server.refuse()
        assert await statuses() == {not_serving}


async def test_reflection_lists_our_services_without_a_key():
    async with serving(ToyDomain(), with_keys=True) as served:
        stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
        requests = [reflection_pb2.ServerReflectionRequest(list_services="")]
        (response,) = [each async for each in stub.ServerReflectionInfo(iter(requests))]
        listed = {service.name for service in response.list_services_response.service}
    assert listed == {
        *SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection",
    }  # fmt: skip
    assert len(SERVICES) == 5


async def test_an_unknown_method_is_unimplemented_not_denied():
    async with serving(ToyDomain(), with_keys=True) as served:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await served.channel.unary_unary("/sona.v1.InferenceService/Nothing", bytes, bytes)(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_taken_port_is_said_with_what_to_do():
    toy = ToyDomain()
    async with serving(toy) as served:
        with pytest.raises(PortInUse, match="choose another --grpc-port"):
            build_server(toy.domain(), Authenticator(()), host="127.0.0.1", port=served.server.port)


async def test_a_message_beyond_the_limit_is_refused_and_the_server_stays():
    async with serving(ToyDomain()) as served:
        stub = InferenceServiceStub(served.channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Generate(inference_pb2.GenerateRequest(text="a" * (4 * 2**20)))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await stub.Generate(inference_pb2.GenerateRequest(text="a"))).choices


async def test_every_call_is_counted_once_with_its_end():
    ended = []
    toy = ToyDomain()
    async with serving(toy, with_keys=True, observe=lambda *call: ended.append(call)) as served:
        inference = InferenceServiceStub(served.channel)
        request = inference_pb2.GenerateRequest(text="a")
        key = bearer("user-key")
        await inference.Generate(request, metadata=key)
        stream = inference.GenerateStream(
            inference_pb2.GenerateStreamRequest(request=request), metadata=key
        )
        assert [event async for event in stream]
        for metadata, refused in ((key, inference_pb2.GenerateRequest()), ((), request)):
            with pytest.raises(grpc.aio.AioRpcError):
                await inference.Generate(refused, metadata=metadata)
        control = ControlServiceStub(served.channel)
        await control.GetServerInfo(control_pb2.GetServerInfoRequest(), metadata=key)
    assert [(method.rpartition("/")[2], code.name) for method, code, _ in ended] == [
        ("Generate", "OK"), ("GenerateStream", "OK"), ("Generate", "INVALID_ARGUMENT"),
        ("Generate", "UNAUTHENTICATED"), ("GetServerInfo", "OK"),
    ]  # fmt: skip
    assert all(0.0 < seconds < 60.0 for *_, seconds in ended)
