"""ControlService: delegate to `sona.ports.Control`, convert."""

from sona import checks
from sona.auth import current_principal
from sona.ports import Control
from sona.rpc import convert
from sona.rpc.status import Context, not_built, unary
from sona.v1 import control_pb2
from sona.v1.control_pb2_grpc import ControlServiceServicer


class ControlService(ControlServiceServicer):
    """One instance per process; holds no per-request state."""

    def __init__(self, control: Control) -> None:
        self._control = control

    @unary
    async def GetServerInfo(
        self, request: control_pb2.GetServerInfoRequest, context: Context
    ) -> control_pb2.GetServerInfoResponse:
        """Version, model, hardware, plan, and who the caller is."""
        principal = current_principal()
        info = self._control.server_info()
        return control_pb2.GetServerInfoResponse(
            version=info.version,
            model=convert.model(info.model),
            hardware=control_pb2.Hardware(
                platform=info.platform,
                devices=info.devices,
                num_cpus=info.num_cpus,
                memory_bytes=info.memory_bytes,
            ),
            plan=control_pb2.Plan(
                max_model_len=info.plan.max_len,
                max_num_seqs=info.plan.max_num_seqs,
                page_size=info.plan.page_size,
                num_pages=info.plan.num_pages,
                page_bytes=info.plan.page_bytes,
                num_head_slots=info.plan.num_head_slots,
                deterministic=info.plan.is_deterministic,
                max_loras=info.plan.num_lora_slots - 1,
                max_lora_rank=info.plan.lora_rank,
                max_waiting=info.plan.max_waiting,
                max_waiting_tokens=info.plan.max_waiting_tokens,
                max_num_batched_tokens=info.plan.step_tokens,
                session_pages=info.plan.session_pages,
            ),
            start_time=convert.timestamp(info.started),
            learning_enabled=info.is_learning_enabled,
            caller=control_pb2.CallerIdentity(
                tenant=principal.tenant, principal=principal.name, role=principal.role
            ),
        )

    @unary
    async def AbortRequest(
        self, request: control_pb2.AbortRequestRequest, context: Context
    ) -> control_pb2.AbortRequestResponse:
        """End a request. A user its own, an operator its tenant's: the port tells them apart."""
        principal = current_principal()
        checks.check_id("request_id", request.request_id)
        return control_pb2.AbortRequestResponse(
            aborted=await self._control.abort(request.request_id, principal)
        )

    Drain = not_built("Drain")
    SearchWitness = not_built("SearchWitness")
    VerifyWitness = not_built("VerifyWitness")
