"""Parity of the engine's operations and of a small model on this accelerator, then timings.

Expected values are the float64 references of the tests. Run it by `benchmarks/gpu.sh`.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from reference.decoder import attend_one, hidden_states, logits
from reference.sampling import distribution
from support.checkpoints import SHAPE, make_checkpoint
from support.engines import final, finals, greedy, running_engine
from support.loras import random_lora

from engine import sampling
from engine.api import HeadRef, HeadTable, Job, LoraRef, SamplingParams
from engine.config import EngineConfig, plan_engine
from engine.kv.pool import copy_pages
from engine.model import ModelConfig, causal_attend, load_checkpoint
from engine.ops.head_delta import HeadStack, add_head_delta
from engine.ops.lora_delta import add_lora_delta
from engine.ops.paged_attention import append, paged_attention
from engine.runner import Runner
from engine.sequence import Kind, Sequence

RNG = np.random.default_rng(0)


def check(name: str, got: Any, want: Any, tolerance: float) -> dict[str, Any]:
    """Largest difference, relative to values above 1."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    error = float(np.max(np.abs(got - want) / np.maximum(np.abs(want), 1.0)))
    held = bool(np.isfinite(got).all() and error <= tolerance)
    print(f"  {name:44} {error:.2e} ≤ {tolerance:g}: {'held' if held else 'MISSED'}", flush=True)
    return {"name": name, "error": error, "tolerance": tolerance, "held": held}


def attention() -> list[dict[str, Any]]:
    """Decode and a chunk over shuffled pages; rows nobody owns hold NaN."""
    size, heads, kv_heads, dim, lengths = 16, 6, 2, 64, (1, 33, 300)
    pool = [np.full((64, size, kv_heads, dim), np.nan, np.float32) for _ in "kv"]
    table, sequences, free = np.zeros((3, 20), np.int32), [], list(RNG.permutation(64))
    for row, length in enumerate(lengths):
        sides = [RNG.standard_normal((length, kv_heads, dim)).astype(np.float32) for _ in "kv"]
        sequences.append(sides)
        for column, start in enumerate(range(0, length, size)):
            table[row, column] = page = free.pop()
            for array, side in zip(pool, sides, strict=True):
                part = side[start : start + size]
                array[page, : len(part)] = part
    run = jax.jit(paged_attention, static_argnames="scale")
    found = []
    for width in (1, 8):
        q = RNG.standard_normal((3, width, heads, dim)).astype(np.float32)
        first = [max(0, length - width) for length in lengths]
        positions = np.array([[p if p < n else -1 for p in range(f, f + width)]
                              for f, n in zip(first, lengths, strict=True)], np.int32)  # fmt: skip
        got = np.asarray(run(q, *pool, table, positions, scale=dim**-0.5))
        want = np.zeros_like(got)
        for row, (keys, values) in enumerate(sequences):
            for at, position in enumerate(positions[row]):
                if position >= 0:
                    until = position + 1
                    want[row, at] = attend_one(q[row, at], keys[:until], values[:until], dim**-0.5)
        found.append(check(f"paged_attention, {width} new tokens", got, want, 5e-5))
    new = RNG.standard_normal((3, 1, kv_heads, dim)).astype(np.float32)
    positions = np.array([[1], [-1], [300]], np.int32)
    written = np.asarray(jax.jit(append)(np.zeros_like(pool[0]), new, table, positions))
    want = np.zeros_like(written)
    want[table[0, 0], 1], want[table[2, 300 // size], 300 % size] = new[0, 0], new[2, 0]
    found.append(check("append", written, want, 0.0))
    source, target = np.array([3, 5, 0], np.int32), np.array([5, 9, 64], np.int32)
    whole = np.nan_to_num(pool[0])
    want = whole.copy()
    want[5], want[9] = whole[3], whole[5]
    return [*found, check("copy_pages", jax.jit(copy_pages)((whole,), source, target)[0], want, 0)]


def deltas() -> list[dict[str, Any]]:
    """Head edits and LoRAs, every row through its own slot."""
    slots, rank, vocab, dim = np.array([2, 0, 1, 2], np.int32), 6, 700, 48

    def normal(*shape: int) -> np.ndarray:
        return RNG.standard_normal(shape).astype(np.float32)

    row_ids = np.stack([RNG.permutation(vocab)[:300] for _ in range(3)]).astype(np.int32)
    stack = HeadStack(
        normal(3, rank, dim), RNG.integers(0, vocab, (3, 5)).astype(np.int32), normal(3, rank, 5),
        normal(3, rank), row_ids, normal(3, rank, 300), np.array([0, 300, 300], np.int32),
    )  # fmt: skip
    base, hidden = normal(4, vocab), normal(4, dim)
    best = np.asarray(stack.token_ids)[slots, 0]
    want = base.astype(np.float64)
    for row, slot in enumerate(slots):
        if slot:
            u = np.asarray(stack.keys)[slot].astype(np.float64) @ hidden[row]
            u += np.asarray(stack.const_keys)[slot]
            hit = np.asarray(stack.token_ids)[slot] == best[row]
            u += (np.asarray(stack.token_keys)[slot] * hit).sum(1)
            want[row, row_ids[slot]] += u @ np.asarray(stack.values)[slot]
    got = jax.jit(add_head_delta)(base, hidden, best, slots, stack)
    found = [check("add_head_delta", got, want, 1e-4)]
    a, b, x, y = normal(2, 3, 16, 48), normal(2, 3, 16, 80), normal(4, 5, 48), normal(4, 5, 80)
    a[:, 0], b[:, 0] = 0, 0
    run = jax.jit(add_lora_delta, static_argnums=3)
    (got,) = run((y,), x, ((a, b),), 1, slots, jnp.int32(2))
    want = y + np.einsum(
        "btx,brx,bry->bty", *(z.astype(np.float64) for z in (x, a[1][slots], b[1][slots]))
    )
    return [*found, check("add_lora_delta", got, want, 1e-4)]


def draws() -> list[dict[str, Any]]:
    """Shares of 20,000 draws, in standard deviations of a binomial share."""
    count, size = 20_000, 40
    one = RNG.standard_normal(size).astype(np.float32) * 2
    rows = sampling.Rows(
        jnp.zeros((1, size), jnp.int32), jnp.full((1, 4), size, jnp.int32), jnp.zeros((1, 4)),
        jnp.zeros((1, 4), jnp.int32),
    )  # fmt: skip
    found = []
    for params in (
        SamplingParams(), SamplingParams(temperature=0.7, top_k=9, top_p=0.8),
        SamplingParams(temperature=1.4, min_p=0.05),
    ):  # fmt: skip
        ints = np.zeros((count, sampling.NUM_INTS), np.int32)
        ints[:, sampling.SEED], ints[:, sampling.TOP_K] = np.arange(count), params.top_k
        floats = np.zeros((count, sampling.NUM_FLOATS), np.float32)
        floats[:, sampling.TEMPERATURE], floats[:, sampling.TOP_P] = (
            params.temperature,
            params.top_p,
        )
        floats[:, sampling.MIN_P], floats[:, sampling.REPETITION] = params.min_p, 1.0
        masks = np.zeros((count, 2), np.int32)
        drawn = jax.jit(sampling.sample)(np.tile(one, (count, 1)), rows, masks, ints, floats)
        got = np.bincount(np.asarray(drawn), minlength=size) / count
        want = distribution(one, params)
        deviation = np.sqrt(np.maximum(want * (1 - want), 1e-12) / count)
        far = np.abs(got - want) / np.where(want > 0, deviation, 1e-9)
        name = f"sample, T={params.temperature} k={params.top_k} p={params.top_p} m={params.min_p}"
        found.append(check(name, far.max() / 5, 0.0, 1.0))
    return found


async def small_model(directory: Path) -> list[dict[str, Any]]:
    """Logits, greedy answers and states of a small model, alone and together."""
    config, tensors = make_checkpoint(directory, "qwen3")
    model = load_checkpoint(directory).merge()
    ids = RNG.integers(0, 256, 90).tolist()
    hidden = hidden_states(tensors, config, ids)
    positions = jnp.arange(len(ids), dtype=jnp.int32)[None]
    ours = model.logits(model(jnp.asarray([ids], jnp.int32), positions, causal_attend))[0]
    found = [check("logits of a small model", ours, logits(tensors, hidden), 1e-4)]
    table = HeadTable(
        RNG.standard_normal((2, 48)).astype(np.float32), np.zeros(0, np.int32),
        np.zeros((2, 0), np.float32), np.zeros(2, np.float32), np.arange(40, dtype=np.int32),
        RNG.standard_normal((2, 40)).astype(np.float32),
    )  # fmt: skip
    head = HeadRef("pattern-1", 1, ("t", "1"), table)
    loras = [LoraRef(f"l{i}", 1, (str(i),), random_lora(SHAPE, seed=i)) for i in range(3)]
    kinds: list[dict[str, Any]] = [
        {}, {"choose_head": lambda _: head}, *({"lora": lora} for lora in loras)
    ]  # fmt: skip
    jobs = [replace(greedy(f"r{i}", ids[: 20 + 9 * i], 24), **kinds[i % 5]) for i in range(10)]
    async with running_engine(directory, max_loras=3, splits_step=True, num_pages=40) as engine:
        alone = [await final(engine, job) for job in jobs]
        together = await asyncio.gather(*(final(engine, job) for job in jobs))
        many = replace(jobs[0], request_id="n", sampling=SamplingParams(n=3, seed=1, max_tokens=9))
        answers = await finals(engine, many)
        stats = engine.stats()
    same = np.mean([a.token_ids == b.token_ids for a, b in zip(alone, together, strict=True)])
    found.append(check("greedy answers alone and together", same, 1.0, 0.1))
    found.append(check("states alone and together", together[0].capture.top_logprobs,
                       alone[0].capture.top_logprobs, 1e-3))  # fmt: skip
    found.append(check("answers to one prompt", len({a.token_ids for a in answers}), 3, 0))
    return [*found, check("programs compiled after warm-up", stats.num_recompiles, 0, 0)]


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 1 GiB, or of 64 MiB on a CPU."""
    size = 2**28 if jax.default_backend() != "cpu" else 2**24
    x = jnp.zeros(size, jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return 2 * x.nbytes / _median_s(lambda: copy(x).block_until_ready())


def _median_s(call: Callable[[], object], rounds: int = 10) -> float:
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def timings(shape: ModelConfig, name: str, *, rows: tuple[int, ...], prompt: int) -> dict[str, Any]:
    """Decode steps by batch, and a prompt's prefill, with random weights."""
    from sona.bench.shapes import random_model

    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    model = random_model(shape, dtype=dtype)
    settings = EngineConfig(
        dtype=dtype, max_model_len=2 * prompt, max_num_seqs=max(rows), prefill_chunk=prompt,
        num_pages=max(rows) * (2 * prompt // 16), max_learned_slots=4,
    )  # fmt: skip
    plan = replace(plan_engine(settings, shape, platform="gpu"), decode_buckets=rows)
    runner = Runner(model, plan)
    runner.warm_up(lambda *_: None)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    found: dict[str, Any] = {"weights_bytes": num_bytes, "dtype": dtype, "decode": {}}
    bandwidth = copy_bandwidth()
    job = Job(request_id="r", prompt_ids=(1,) * prompt, sampling=SamplingParams(seed=0))
    pages = prompt // 16 + 1
    sequences = [
        Sequence(kind=Kind.GENERATE, job=job, tokens=[1] * (prompt + 1), num_prompt=prompt,
                 num_computed=prompt, row=row, pages=list(range(row * pages, (row + 1) * pages)))
        for row in range(max(rows))
    ]  # fmt: skip
    for count in rows:
        step_s = _median_s(lambda count=count: runner.decode(sequences[:count], None))
        share = num_bytes / step_s / bandwidth
        found["decode"][count] = {"step_s": step_s, "of_copy_bandwidth": share}
        print(f"  {name} decode B={count}: {step_s * 1e3:.2f} ms, {share:.2f} of copy bandwidth")
    found["prefill_s"] = _median_s(lambda: runner.prefill(sequences[0], 0, prompt), 5)
    print(f"  {name} prefill {prompt}: {found['prefill_s'] * 1e3:.1f} ms", flush=True)
    return found


def main(output: Path) -> int:
    """Everything, written as JSON; 1 when a parity is missed."""
    from sona.bench.shapes import QWEN25_05B

    device = jax.devices()[0]
    print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        parity = [
            *attention(),
            *deltas(),
            *draws(),
            *asyncio.run(small_model(Path(directory) / "m")),
        ]
    small = os.environ.get("SONA_GPU_SMALL")  # a check of this script itself
    shape = replace(QWEN25_05B, num_layers=2, vocab_size=2_000) if small else QWEN25_05B
    rows, prompt = ((1, 4), 64) if small else ((1, 8, 16), 1024)
    jax.config.update("jax_default_matmul_precision", "default")
    timed = {"qwen2.5-0.5b": timings(shape, "0.5B", rows=rows, prompt=prompt)}
    document = {
        "command": "benchmarks/gpu.sh",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device.device_kind, "platform": device.platform, "jax": jax.__version__,
        "python": sys.version.split()[0], "copy_bytes_per_s": copy_bandwidth(),
        "parity": parity, "timings": timed,
    }  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    return 0 if all(one["held"] for one in parity) else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
