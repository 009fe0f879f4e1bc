"""LearningService and ControlService over the toy domain: pages, roles, events, aborts."""

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest
from support.serving import bearer, serving
from support.toy_domain import ToyDomain

from adapters.store import SlotKey
from sona.ports import LearningState
from sona.v1 import common_pb2, control_pb2, feedback_pb2
from sona.v1 import learning_pb2 as pb
from sona.v1.control_pb2_grpc import ControlServiceStub
from sona.v1.learning_pb2_grpc import LearningServiceStub

USER, OPERATOR = bearer("user-key"), bearer("operator-key")


@pytest.fixture
async def served():
    toy = ToyDomain()
    async with serving(toy, with_keys=True) as server:
        toy.stub = LearningServiceStub(server.channel)
        toy.control_stub = ControlServiceStub(server.channel)
        yield toy


async def code_of(call) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_status_tells_the_state_and_the_counts(served):
    status = await served.stub.GetStatus(pb.GetStatusRequest(), metadata=USER)
    assert (status.state, status.num_pending) == (pb.LEARNING_STATE_RUNNING, 2)
    assert {each.state: each.count for each in status.feedback} == {
        feedback_pb2.FEEDBACK_STATE_LEARNED: 5,
        feedback_pb2.FEEDBACK_STATE_ACCEPTED: 2,
    }
    assert status.last_publish_time.seconds == 1_700_000_000


async def test_an_operator_pauses_and_resumes(served):
    request = pb.PauseLearningRequest(reason="audit")
    paused = await served.stub.PauseLearning(request, metadata=OPERATOR)
    assert paused.state == pb.LEARNING_STATE_PAUSED
    assert (served.learning.state, served.learning.reason) == (LearningState.PAUSED, "audit")
    resumed = await served.stub.ResumeLearning(pb.ResumeLearningRequest(), metadata=OPERATOR)
    assert resumed.state == pb.LEARNING_STATE_RUNNING


async def test_a_user_neither_pauses_nor_resumes(served):
    denied = grpc.StatusCode.PERMISSION_DENIED
    pause = served.stub.PauseLearning(pb.PauseLearningRequest(), metadata=USER)
    assert await code_of(pause) is denied
    resume = served.stub.ResumeLearning(pb.ResumeLearningRequest(), metadata=USER)
    assert await code_of(resume) is denied
    assert served.learning.state is LearningState.RUNNING


async def test_adapters_come_in_pages_by_pattern(served):
    names, token = [], ""
    while True:
        request = pb.ListAdaptersRequest(page_size=2, page_token=token)
        page = await served.stub.ListAdapters(request, metadata=OPERATOR)
        names.append([adapter.name for adapter in page.adapters])
        token = page.next_page_token
        if not token:
            break
    assert names == [["pattern-1", "pattern-2"], ["pattern-3"]]


async def test_adapters_of_one_scope(served):
    request = pb.ListAdaptersRequest(scope=common_pb2.SCOPE_TENANT)
    (adapter,) = (await served.stub.ListAdapters(request, metadata=USER)).adapters
    assert (adapter.name, adapter.scope, adapter.owner) == ("pattern-3", request.scope, "")
    assert (adapter.version, adapter.num_edits, adapter.num_constraints) == (4, 5, 6)
    assert (adapter.create_time.seconds, adapter.update_time.seconds) == (1, 2)


@pytest.mark.parametrize("token", ["x", "9" * 5_000 + "/a/b"])
async def test_a_foreign_page_token_is_refused(served, token):
    call = served.stub.ListAdapters(pb.ListAdaptersRequest(page_token=token), metadata=USER)
    assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_adapter_with_its_versions(served):
    found = await served.stub.GetAdapter(pb.GetAdapterRequest(name="pattern-1"), metadata=USER)
    assert (found.adapter.scope, found.adapter.owner) == (common_pb2.SCOPE_PRINCIPAL, "ann")
    newest, oldest = found.revisions
    assert (newest.version, newest.kind, newest.restores) == (2, pb.REVISION_KIND_ROLLBACK, 0)
    assert newest.HasField("restores") and newest.available
    assert (oldest.version, oldest.kind, oldest.parent) == (1, pb.REVISION_KIND_EDIT, 0)
    assert not oldest.HasField("restores") and not oldest.available
    assert (list(oldest.feedback_ids), oldest.reason) == (["f1"], "why")


async def test_anothers_adapter_needs_an_operator(served):
    request = pb.GetAdapterRequest(name="pattern-2", owner="bob")
    denied = served.stub.GetAdapter(request, metadata=USER)
    assert await code_of(denied) is grpc.StatusCode.PERMISSION_DENIED
    found = await served.stub.GetAdapter(request, metadata=OPERATOR)
    assert found.adapter.owner == "bob"


async def test_an_unknown_adapter_is_not_found_and_a_nameless_one_refused(served):
    call = served.stub.GetAdapter(pb.GetAdapterRequest(name="pattern-9"), metadata=USER)
    assert await code_of(call) is grpc.StatusCode.NOT_FOUND
    call = served.stub.GetAdapter(pb.GetAdapterRequest(), metadata=USER)
    assert await code_of(call) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_user_rolls_back_its_own(served):
    request = pb.RollbackAdapterRequest(name="pattern-1", to_version=0, reason="wrong")
    done = await served.stub.RollbackAdapter(request, metadata=USER)
    assert list(done.rolled_back_feedback_ids) == ["f1", "f2"]
    ((slot, to_version, reason, principal),) = served.learning.rolled_back
    assert slot == SlotKey(tenant="acme", scope="principal", owner="ann", pattern_id=1)
    assert (to_version, reason, principal.name) == (0, "wrong", "ann")


async def test_a_rollback_without_a_version_is_to_the_parent(served):
    request = pb.RollbackAdapterRequest(name="pattern-1")
    await served.stub.RollbackAdapter(request, metadata=USER)
    assert served.learning.rolled_back[0][1] is None


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "pattern-3"},  # found at tenant scope, though no scope was said
        {"name": "pattern-3", "scope": common_pb2.SCOPE_TENANT},
        {"name": "pattern-2", "owner": "bob"},
    ],
    ids=str,
)
async def test_a_rollback_beyond_ones_own_needs_an_operator(served, fields):
    request = pb.RollbackAdapterRequest(**fields)
    denied = served.stub.RollbackAdapter(request, metadata=USER)
    assert await code_of(denied) is grpc.StatusCode.PERMISSION_DENIED
    assert served.learning.rolled_back == []
    await served.stub.RollbackAdapter(request, metadata=OPERATOR)
    assert len(served.learning.rolled_back) == 1


async def test_events_are_watched_until_the_caller_has_enough(served):
    kinds = [pb.EVENT_KIND_ADAPTER_PUBLISHED]
    call = served.stub.WatchEvents(pb.WatchEventsRequest(kinds=kinds), metadata=USER)
    event = (await call.read()).event
    assert (event.kind, event.time.ToMilliseconds()) == (kinds[0], 1_500)
    assert (event.adapter_version.name, event.adapter_version.version) == ("pattern-1", 4)
    assert (event.scope, event.feedback_id) == (common_pb2.SCOPE_PRINCIPAL, "f1")
    assert served.learning.watchers == 1
    call.cancel()
    async with asyncio.timeout(5):
        await served.learning.unwatched.wait()
    assert served.learning.watchers == 0


async def test_an_unknown_kind_of_event_is_refused(served):
    kinds: Any = [99]
    call = served.stub.WatchEvents(pb.WatchEventsRequest(kinds=kinds), metadata=USER)
    assert await code_of(call.read()) is grpc.StatusCode.INVALID_ARGUMENT


async def test_abort_tells_whether_anything_ended(served):
    for request_id, aborted in (("r1", True), ("r2", False)):
        request = control_pb2.AbortRequestRequest(request_id=request_id)
        response = await served.control_stub.AbortRequest(request, metadata=USER)
        assert response.aborted is aborted
    assert [(name, who.name) for name, who in served.control.aborted] == [
        ("r1", "ann"), ("r2", "ann"),
    ]  # fmt: skip


async def test_server_info_says_what_runs_and_who_asks(served):
    info = await served.control_stub.GetServerInfo(
        control_pb2.GetServerInfoRequest(), metadata=OPERATOR
    )
    assert (info.version, info.model.name, info.hardware.num_cpus) == ("9.9", "toy", 2)
    assert (info.plan.page_size, info.plan.num_pages, info.plan.num_head_slots) == (8, 10, 4)
    caller = info.caller
    assert (caller.tenant, caller.principal, caller.role) == ("acme", "olga", "operator")
