"""What a step of 16 answers costs with LoRAs and with forms, on a model of a real one's shape."""

import json

import numpy as np

from engine.api import Constraint, Job, LoraRef, LoraTable, SamplingParams
from engine.client import build_runner
from engine.config import EngineConfig, plan_engine
from engine.constraints import Grammars, Matcher
from engine.runner import Runner
from engine.sequence import Kind, Sequence
from sona.bench.figures import Figure, ratio_in_turn
from sona.bench.shapes import QWEN25_05B, random_model, random_tokenizer

ROWS = 16
RANK = 8
ROUNDS = 40
_CONTEXT = 64  # tokens of each answer's past


def measure_steps() -> list[Figure]:
    """Ratios of the whole decode step, host work included."""
    model = random_model(QWEN25_05B)
    settings = EngineConfig(
        max_model_len=1024, max_num_seqs=ROWS, max_loras=ROWS, num_pages=256, max_learned_slots=4
    )
    plan = plan_engine(settings, model.config, platform="cpu")
    runner = build_runner(model, plan, lambda *_: None)
    plain, adapted, formed = (_sequences() for _ in range(3))
    for index, sequence in enumerate(adapted):
        ref = LoraRef(f"lora-{index}", 1, (str(index),), _random_lora(runner, index))
        slot = runner.loras.acquire(ref)
        assert slot is not None, "there are as many slots as rows"
        sequence.lora_slot = slot
    tokenizer = random_tokenizer(QWEN25_05B.vocab_size, QWEN25_05B.eos_ids[0])
    grammars = Grammars(tokenizer, vocab_size=QWEN25_05B.vocab_size, max_len=32_768)
    forms = [grammars.compile(Constraint("json_schema", _schema(row))) for row in range(ROWS)]
    for sequence, form in zip(formed, forms, strict=True):
        sequence.matcher = form.copy()

    def base() -> None:
        runner.decode(plain, None)

    loras = ratio_in_turn(base, lambda: runner.decode(adapted, None), ROUNDS)
    masked = ratio_in_turn(base, lambda: _formed_step(runner, formed, forms), ROUNDS)
    return [
        Figure(f"{ROWS} LoRAs of rank {RANK} in a batch of {ROWS}, against none", loras, 1.10),
        Figure(f"{ROWS} JSON schemas in a batch of {ROWS}, against none", masked, 1.05),
    ]


def _sequences() -> list[Sequence]:
    """Answers in the middle of being given, each on pages of its own."""
    job = Job(request_id="r", prompt_ids=(1,) * _CONTEXT, sampling=SamplingParams(seed=0))
    pages = _CONTEXT // 16 + 1
    return [
        Sequence(
            kind=Kind.GENERATE,
            job=job,
            tokens=[1] * (_CONTEXT + 1),
            num_prompt=_CONTEXT,
            num_computed=_CONTEXT,
            row=row,
            pages=list(range(row * pages, (row + 1) * pages)),
        )
        for row in range(ROWS)
    ]


def _formed_step(runner: Runner, sequences: list[Sequence], forms: list[Matcher]) -> None:
    """Mask, draw, and take what was drawn; a form that is complete begins again."""

    def fill(words: np.ndarray) -> None:
        for row, sequence in enumerate(sequences):
            assert sequence.matcher is not None
            sequence.matcher.fill(words[row])

    _, sampled = runner.decode(sequences, fill)
    for row, sequence in enumerate(sequences):
        assert sequence.matcher is not None
        sequence.matcher.accept(int(sampled.token[row]))
        if sequence.matcher.is_complete:
            sequence.matcher = forms[row].copy()


def _random_lora(runner: Runner, seed: int) -> LoraTable:
    rng = np.random.default_rng(seed)

    def side(axis: int) -> dict[str, np.ndarray]:
        return {
            module: rng.standard_normal((size[0], RANK, size[axis]), np.float32) * 0.05
            for module, size in runner.loras.sizes.items()
        }

    return LoraTable(side(1), side(2))


def _schema(seed: int) -> str:
    """An object of a few fields of every common type."""
    kinds = [
        {"type": "string"}, {"type": "integer"}, {"type": "boolean"},
        {"enum": ["low", "high", "none"]}, {"type": "array", "items": {"type": "number"}},
    ]  # fmt: skip
    fields = {f"field_{seed}_{at}": kinds[(seed + at) % len(kinds)] for at in range(4)}
    return json.dumps(
        {
            "type": "object",
            "properties": fields,
            "required": list(fields),
            "additionalProperties": False,
        }
    )
