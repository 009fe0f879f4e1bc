"""The collaborators behind the borders, made once the model is warm."""

import asyncio
import time
from dataclasses import dataclass
from importlib import metadata

import jax
import psutil

from adapters.loras import LoraStore
from adapters.store import AdapterStore
from adapters.table import TableLimits
from engine.client import EngineClient
from sona.captures import CaptureRing
from sona.checks import Limits
from sona.config import SonaConfig
from sona.control import ControlService
from sona.events import EventBus
from sona.feedback import FeedbackService, target_ids
from sona.inference import InferenceService
from sona.journal import FeedbackRecord, Journal
from sona.learning import LearningService
from sona.loops.instant import InstantLoop
from sona.loops.patterns import Patterns
from sona.loops.teacher import Teacher
from sona.metrics import Metrics
from sona.model import Warm
from sona.ports import ServerInfo
from sona.routing import Routing


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Everything behind the borders, once it is warm."""

    warm: Warm
    engine_ended: asyncio.Event  # set when nothing more can be served
    metrics: Metrics
    inference: InferenceService
    feedback: FeedbackService
    learning: LearningService
    control: ControlService
    limits: Limits


def compose(
    config: SonaConfig,
    warm: Warm,
    engine: EngineClient,
    journal: Journal,
    store: AdapterStore,
    loras: LoraStore,
    routing: Routing,
) -> Parts:
    info, plan, events = warm.info, warm.plan, EventBus()
    metrics = _metrics(warm, engine, journal, store, loras)
    captures = CaptureRing(config.learning.capture_memory_bytes, config.data.retention_s)
    limits = Limits(
        model_names=(info.name,),
        max_model_len=plan.max_len,
        vocab_size=info.vocab_size,
        max_choices=plan.max_num_seqs,
        max_chars=warm.tokenizer.max_chars(plan.max_len),
        max_correction_bytes=config.learning.max_correction_bytes,
    )
    table_limits = TableLimits(
        rank=plan.head_rank, max_rows=plan.head_rows, max_tokens=plan.head_tokens
    )

    def targets(record: FeedbackRecord) -> tuple[int, ...]:
        return target_ids(warm.tokenizer, record)

    patterns = Patterns(
        store, journal, routing, warm.head_rows, table_limits, info.base_hash, targets
    )
    teacher = Teacher(journal, patterns, events, metrics)
    loop = InstantLoop(journal, teacher, engine, metrics)
    running: dict[str, str] = {}
    inference = InferenceService(
        generator=engine,
        tokenizer=warm.tokenizer,
        routing=routing,
        store=store,
        loras=loras,
        journal=journal,
        captures=captures,
        model=info,
        limits=limits,
        keeps_captures=config.learning.enabled,
        running=running,
        observe=metrics.generation_ended,
    )
    feedback = FeedbackService(
        journal=journal,
        captures=captures,
        tokenizer=warm.tokenizer,
        routing=routing,
        events=events,
        loop=loop if config.learning.enabled else None,
        metrics=metrics,
        limits=limits,
    )
    learning = LearningService(
        store=store,
        loras=loras,
        lora_sizes=warm.runner.loras.sizes,
        max_lora_rank=plan.lora_rank,
        base_names=warm.names,
        base_hash=info.base_hash,
        journal=journal,
        events_bus=events,
        loop=loop,
        is_enabled=config.learning.enabled,
    )
    control = ControlService(info=_server_info(config, warm), generator=engine, running=running)
    return Parts(
        warm=warm,
        engine_ended=engine.ended,
        metrics=metrics,
        inference=inference,
        feedback=feedback,
        learning=learning,
        control=control,
        limits=limits,
    )


def _metrics(
    warm: Warm, engine: EngineClient, journal: Journal, store: AdapterStore, loras: LoraStore
) -> Metrics:
    """The registry, watching what counts for itself."""
    metrics = Metrics(
        version=metadata.version("sona"),
        model=warm.info.name,
        dtype=warm.info.dtype,
        base_hash=warm.info.base_hash,
    )
    metrics.watch_engine(engine.stats)
    metrics.watch_journal(journal.counts)
    metrics.watch_adapters(lambda: len(store.slots()), lambda: loras.num_loaded)
    return metrics


def _server_info(config: SonaConfig, warm: Warm) -> ServerInfo:
    return ServerInfo(
        version=metadata.version("sona"),
        model=warm.info,
        plan=warm.plan,
        platform=jax.default_backend(),
        devices=tuple(str(device) for device in jax.devices()),
        num_cpus=len(psutil.Process().cpu_affinity()),
        memory_bytes=psutil.virtual_memory().total,
        started=time.time(),
        is_learning_enabled=config.learning.enabled,
    )
