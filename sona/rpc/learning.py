"""LearningService: parse, check what the role allows, delegate to `sona.ports.Learning`."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from adapters.loras import LoraInfo
from adapters.store.records import Scope
from sona import checks
from sona.auth import Principal, current_principal
from sona.checks import MAX_DIGITS
from sona.errors import InvalidField
from sona.ports import AdapterInfo, Learning
from sona.rpc import convert, convert_learning
from sona.rpc.status import Context, not_built, streaming, unary
from sona.v1 import common_pb2, learning_pb2
from sona.v1.learning_pb2_grpc import LearningServiceServicer

_PAGE_SIZE = 100
_MAX_PAGE_SIZE = 1_000
_MAX_REASON_LEN = 1_000  # characters


class LearningService(LearningServiceServicer):
    """One instance per process; holds no per-request state."""

    def __init__(self, learning: Learning) -> None:
        self._learning = learning

    @unary
    async def GetStatus(
        self, request: learning_pb2.GetStatusRequest, context: Context
    ) -> learning_pb2.GetStatusResponse:
        """Whether the server learns, and what waits."""
        status = await self._learning.status(current_principal())
        response = learning_pb2.GetStatusResponse(
            state=convert_learning.learning_state(status.state),
            reason=status.reason,
            num_pending=status.num_pending,
            feedback=[
                learning_pb2.FeedbackCount(
                    state=convert_learning.feedback_state(state), count=count
                )
                for state, count in status.num_feedback.items()
            ],
            num_adapters=status.num_adapters,
            num_failed_steps=status.num_failed_steps,
        )
        if status.last_publish is not None:
            response.last_publish_time.CopyFrom(convert.timestamp(status.last_publish))
        return response

    @unary
    async def PauseLearning(
        self, request: learning_pb2.PauseLearningRequest, context: Context
    ) -> learning_pb2.PauseLearningResponse:
        """Operators only: it stops learning for every tenant."""
        principal = current_principal()
        principal.require("operator", "PauseLearning")
        state = await self._learning.pause(_reason(request.reason), principal)
        return learning_pb2.PauseLearningResponse(state=convert_learning.learning_state(state))

    @unary
    async def ResumeLearning(
        self, request: learning_pb2.ResumeLearningRequest, context: Context
    ) -> learning_pb2.ResumeLearningResponse:
        """Operators only."""
        principal = current_principal()
        principal.require("operator", "ResumeLearning")
        state = await self._learning.resume(principal)
        return learning_pb2.ResumeLearningResponse(state=convert_learning.learning_state(state))

    @unary
    async def ListAdapters(
        self, request: learning_pb2.ListAdaptersRequest, context: Context
    ) -> learning_pb2.ListAdaptersResponse:
        """A page of what the caller may see, by pattern, scope and owner."""
        principal = current_principal()
        page_size = min(request.page_size or _PAGE_SIZE, _MAX_PAGE_SIZE)
        scope, after = _scope(request.scope), _parse_page_token(request.page_token)
        loras = await self._learning.list_loras(principal)
        visible = sorted([*loras, *await self._learning.list_adapters(principal)], key=_order)
        rest = [
            info
            for info in visible
            if scope in (None, _scope_of(info)) and (after is None or _order(info) > after)
        ]
        page = rest[:page_size]
        return learning_pb2.ListAdaptersResponse(
            adapters=[_adapter(info) for info in page],
            next_page_token=_page_token(page[-1]) if len(rest) > len(page) else "",
        )

    @unary
    async def GetAdapter(
        self, request: learning_pb2.GetAdapterRequest, context: Context
    ) -> learning_pb2.GetAdapterResponse:
        """One adapter with its versions, newest first; a LoRA has the loaded one alone."""
        principal = current_principal()
        owner = _owner(request.owner, principal, "GetAdapter")
        if request.name and not checks.is_pattern_name(request.name):
            lora = await self._learning.get_lora(request.name, principal)
            return learning_pb2.GetAdapterResponse(adapter=convert_learning.lora(lora))
        found = await self._learning.get_adapter(
            _name(request.name), _scope(request.scope), owner, principal
        )
        return learning_pb2.GetAdapterResponse(
            adapter=convert_learning.adapter(found.adapter),
            revisions=[convert_learning.revision(one) for one in found.revisions],
        )

    @unary
    async def RollbackAdapter(
        self, request: learning_pb2.RollbackAdapterRequest, context: Context
    ) -> learning_pb2.RollbackAdapterResponse:
        """A user's own; at tenant scope, or another's, an operator's."""
        principal = current_principal()
        if request.name and not checks.is_pattern_name(request.name):
            raise InvalidField(
                "name",
                f"name is {request.name[:80]!r}; a learned adapter (pattern-7) has versions to "
                "return to, a LoRA has none: load its earlier files again",
            )
        owner = _owner(request.owner, principal, "RollbackAdapter")
        found = await self._learning.get_adapter(
            _name(request.name), _scope(request.scope), owner, principal
        )
        slot = found.adapter.slot  # from here on it is pinned: what is checked is rolled back
        if slot.scope == "tenant":
            principal.require("operator", f"RollbackAdapter of {slot.adapter_name} at tenant scope")
        done = await self._learning.rollback(
            slot,
            request.to_version if request.HasField("to_version") else None,
            _reason(request.reason),
            principal,
        )
        return learning_pb2.RollbackAdapterResponse(
            adapter=convert_learning.adapter(done.adapter),
            rolled_back_feedback_ids=done.feedback_ids,
        )

    @unary
    async def LoadAdapter(
        self, request: learning_pb2.LoadAdapterRequest, context: Context
    ) -> learning_pb2.LoadAdapterResponse:
        """Operators only: it reads files of the server, and every principal may use it."""
        principal = current_principal()
        principal.require("operator", "LoadAdapter")
        if not request.path:
            raise InvalidField("path", "path is empty; name the LoRA's directory on the server")
        info = await self._learning.load_lora(
            _name(request.name), request.path, principal, any_base=request.any_base
        )
        return learning_pb2.LoadAdapterResponse(adapter=convert_learning.lora(info))

    @unary
    async def UnloadAdapter(
        self, request: learning_pb2.UnloadAdapterRequest, context: Context
    ) -> learning_pb2.UnloadAdapterResponse:
        """Operators only."""
        principal = current_principal()
        principal.require("operator", "UnloadAdapter")
        await self._learning.unload_lora(_name(request.name), principal)
        return learning_pb2.UnloadAdapterResponse()

    @streaming
    async def WatchEvents(
        self, request: learning_pb2.WatchEventsRequest, context: Context
    ) -> AsyncGenerator[learning_pb2.WatchEventsResponse, None]:
        """Events from now on, until the caller has enough."""
        principal = current_principal()
        kinds = convert_learning.event_kinds(request.kinds)
        if len(kinds) < len(set(request.kinds)):
            raise InvalidField("kinds", "kinds has one that is not known; leave it empty for all")
        async with aclosing(self._learning.events(kinds, principal)) as events:
            async for event in events:
                yield learning_pb2.WatchEventsResponse(event=convert_learning.event(event))

    StartDeepRun = not_built("StartDeepRun")
    GetDeepRun = not_built("GetDeepRun")
    CancelDeepRun = not_built("CancelDeepRun")
    ExportAdapter = not_built("ExportAdapter")
    PromoteAdapter = not_built("PromoteAdapter")
    RemoveInfluence = not_built("RemoveInfluence")
    ListPolicies = not_built("ListPolicies")


def _name(name: str) -> str:
    if not name:
        raise InvalidField("name", "name is empty; use an adapter's name, as ListAdapters tells it")
    return name


def _owner(owner: str, principal: Principal, action: str) -> str:
    if owner and owner != principal.name:
        principal.require("operator", f"{action} of another principal's adapter")
    return owner or principal.name


def _scope(scope: int) -> Scope | None:
    known = convert_learning.scope_of(scope)
    if known is None and scope != common_pb2.SCOPE_UNSPECIFIED:
        raise InvalidField("scope", f"scope is {scope}; use SCOPE_PRINCIPAL or SCOPE_TENANT")
    return known


def _reason(reason: str) -> str:
    if len(reason) > _MAX_REASON_LEN:
        raise InvalidField(
            "reason", f"reason has {len(reason)} characters; use at most {_MAX_REASON_LEN}"
        )
    return reason


_Order = tuple[int, str, str]


def _order(info: AdapterInfo | LoraInfo) -> _Order:
    """LoRAs by name, then patterns by number."""
    if isinstance(info, LoraInfo):
        return (0, "tenant", info.name)
    return (info.slot.pattern_id, info.slot.scope, info.slot.owner)


def _scope_of(info: AdapterInfo | LoraInfo) -> Scope:
    return "tenant" if isinstance(info, LoraInfo) else info.slot.scope


def _adapter(info: AdapterInfo | LoraInfo) -> learning_pb2.Adapter:
    is_lora = isinstance(info, LoraInfo)
    return convert_learning.lora(info) if is_lora else convert_learning.adapter(info)


def _page_token(last: AdapterInfo | LoraInfo) -> str:
    pattern_id, scope, owner = _order(last)
    return f"{pattern_id}/{scope}/{owner}"


def _parse_page_token(token: str) -> _Order | None:
    if not token:
        return None
    pattern_id, _, place = token.partition("/")
    scope, slash, owner = place.partition("/")
    is_number = pattern_id.isascii() and pattern_id.isdigit() and len(pattern_id) <= MAX_DIGITS
    if not (is_number and slash):
        raise InvalidField("page_token", "page_token did not come from ListAdapters; leave it out")
    return (int(pattern_id), scope, owner)
