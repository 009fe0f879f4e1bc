"""What the gRPC services delegate to, small enough to be read: the ports over the toy engine."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from support.toy_engine import VOCAB_SIZE, ToyEngine, text_of
from support.toy_learning import ToyLearning

from engine.api import Job
from engine.config import EnginePlan
from sona.auth import Principal
from sona.checks import Limits, check_prompt_len
from sona.errors import FeedbackNotFound
from sona.journal import (
    AdapterSpan,
    Choice,
    FeedbackOutcome,
    FeedbackRecord,
    FeedbackState,
)
from sona.ports import (
    ModelInfo,
    ServerInfo,
)
from sona.requests import (
    Answer,
    CallTiming,
    Delta,
    EmbedCall,
    EmbedReply,
    FeedbackCall,
    GenerateCall,
    GenerateReply,
    Preview,
    PreviewEdit,
    Prompt,
    ScoreCall,
    ScoreReply,
    Started,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from sona.rpc.server import Domain

LIMITS = Limits(
    model_names=("toy",), max_model_len=64, vocab_size=VOCAB_SIZE, max_correction_bytes=100
)
MODEL = ModelInfo(
    name="toy", architecture="ToyForCausalLM", max_model_len=64, vocab_size=VOCAB_SIZE,
    num_parameters=3, dtype="float32", base_hash="abc",
)  # fmt: skip
PLAN = EnginePlan(
    dtype="float32", max_len=64, max_num_seqs=2, max_waiting=4, page_size=8, num_pages=10,
    pages_per_seq=8, page_bytes=128, decode_buckets=(2,), prefill_buckets=(16,), prefill_chunk=16,
    slice_tokens=16, is_deterministic=False, splits_step=False, num_head_slots=4, head_rank=2,
    head_rows=8, head_tokens=4, learning_fraction=0.15, max_waiting_tokens=64,
    priority_patience_s=10.0, step_tokens=18, caches_prefixes=True, session_pages=2,
    session_idle_s=60.0, num_lora_slots=1,
    lora_rank=8, lora_on_head=False,
)  # fmt: skip


def prompt_ids(prompt: Prompt) -> tuple[int, ...]:
    """Letters to their numbers; messages are joined."""
    match prompt:
        case TokenPrompt(ids):
            return ids
        case TextPrompt(text):
            return tuple(ord(letter) - ord("a") for letter in text)
        case _:
            return tuple(
                ord(letter) - ord("a") for turn in prompt.messages for letter in turn.content
            )


class ToyInference:
    """Every answer is shaped by pattern-7@3 from its second token on."""

    def __init__(self, engine: ToyEngine) -> None:
        self._engine = engine
        self.calls: list[tuple[GenerateCall, Principal]] = []

    async def generate(
        self, call: GenerateCall, principal: Principal
    ) -> AsyncGenerator[Started | Delta | GenerateReply, None]:
        self.calls.append((call, principal))
        ids = prompt_ids(call.prompt)
        check_prompt_len(len(ids), LIMITS)
        yield Started(request_id=call.request_id, num_prompt_tokens=len(ids))
        tokens = [[] for _ in range(call.sampling.n)]
        job = Job(request_id=call.request_id, prompt_ids=ids, sampling=call.sampling)
        async with aclosing(self._engine.generate(job)) as updates:
            async for update in updates:
                tokens[update.index] += update.tokens
                yield Delta(choice_index=update.index, tokens=update.tokens, text=update.text)
                if update.final is not None and update.index == call.sampling.n - 1:
                    yield _reply(call.request_id, update.final, tokens)

    async def embed(self, call: EmbedCall, principal: Principal) -> EmbedReply:
        ids = prompt_ids(call.prompt)
        embedded = await self._engine.embed(Job(request_id="e", prompt_ids=ids))
        return EmbedReply(embedded.vector, Usage(num_prompt_tokens=len(ids)))

    async def score(self, call: ScoreCall, principal: Principal) -> ScoreReply:
        ids = prompt_ids(call.prompt)
        told = prompt_ids(TextPrompt(call.continuation))
        scored = await self._engine.score(Job(request_id="s", prompt_ids=ids), told)
        usage = Usage(num_prompt_tokens=len(ids), num_completion_tokens=len(told))
        return ScoreReply(logprobs=scored.tokens, usage=usage)

    async def tokenize(self, prompt: Prompt) -> tuple[int, ...]:
        return prompt_ids(prompt)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        return text_of(token_ids)

    def models(self) -> tuple[ModelInfo, ...]:
        return (MODEL,)


class ToyFeedback:
    """Keeps feedback in a dictionary; the same id is a duplicate whatever it says."""

    def __init__(self) -> None:
        self.records: dict[str, FeedbackRecord] = {}

    async def submit(self, call: FeedbackCall, principal: Principal) -> FeedbackOutcome:
        known = self.records.get(call.feedback_id)
        if known is not None:
            return FeedbackOutcome(known, True)
        record = FeedbackRecord(
            seq=len(self.records) + 1,
            tenant=principal.tenant,
            principal=principal.name,
            feedback_id=call.feedback_id,
            request_id=call.request_id,
            choice_index=call.choice_index,
            signal=call.signal,
            comment=call.comment,
            metadata=call.metadata,
            created=1_700_000_000.5,
            state=FeedbackState.ACCEPTED,
            adapter=None,
            version=None,
            reason="",
            conflicts_with=(),
            pattern_id=None,
            model="toy",
            base_hash="abc",
            adapter_versions=(),
            prompt_text="ab",
            prompt_ids=(0, 1),
            prompt_vector=None,
            answer=Choice(text="bc", token_ids=(1, 2)),
        )
        self.records[call.feedback_id] = record
        return FeedbackOutcome(record, False)

    async def get(self, feedback_id: str, principal: Principal) -> FeedbackRecord:
        try:
            return self.records[feedback_id]
        except KeyError:
            raise FeedbackNotFound(f"no feedback {feedback_id!r}") from None

    async def preview(self, call: FeedbackCall, principal: Principal) -> Preview:
        edit = PreviewEdit(
            position=1, old_token_id=2, old_text="c", new_token_id=None, new_text="",
            base_probability=0.0,
        )  # fmt: skip
        return Preview(would_learn=True, pattern_id=None, edits=(edit,), conflicts_with=("f0",))


class ToyControl:
    """Knows one running request, "r1"."""

    def __init__(self) -> None:
        self.aborted: list[tuple[str, Principal]] = []

    def server_info(self) -> ServerInfo:
        return ServerInfo(
            version="9.9", model=MODEL, plan=PLAN, platform="cpu", devices=("cpu:0",),
            num_cpus=2, memory_bytes=1_024, started=1_700_000_000.0, is_learning_enabled=True,
        )  # fmt: skip

    async def abort(self, request_id: str, principal: Principal) -> bool:
        self.aborted.append((request_id, principal))
        return request_id == "r1"


class ToyDomain:
    """All four ports, kept at hand for assertions."""

    stub: Any  # of the service under test, set by its fixture
    control_stub: Any
    address: str  # of the server, set by its fixture

    def __init__(self, engine: ToyEngine | None = None) -> None:
        self.engine = engine or ToyEngine()
        self.inference = ToyInference(self.engine)
        self.feedback = ToyFeedback()
        self.learning = ToyLearning()
        self.control = ToyControl()

    def domain(self) -> Domain:
        return Domain(
            inference=self.inference, feedback=self.feedback, learning=self.learning,
            control=self.control, limits=LIMITS,
        )  # fmt: skip


def _reply(request_id: str, final, tokens) -> GenerateReply:
    timing = final.timing
    return GenerateReply(
        request_id=request_id,
        answers=tuple(
            Answer(
                index=index, text=final.text, token_ids=final.token_ids, logprobs=tuple(drawn),
                finish_reason=final.finish_reason, stop_match=final.stop_match,
            )
            for index, drawn in enumerate(tokens)
        ),
        usage=Usage(
            num_prompt_tokens=final.num_prompt_tokens,
            num_completion_tokens=final.num_completion_tokens,
        ),
        timing=CallTiming(
            queue_s=timing.queue_s, prefill_s=timing.prefill_s, decode_s=timing.decode_s,
            total_s=2.0,
        ),
        adapter_versions=(AdapterSpan("pattern-7", 3, 1, final.num_completion_tokens),),
        pattern_ids=(7,),
    )  # fmt: skip
