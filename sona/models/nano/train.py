"""Train sona-nano from nothing: two cores, under an hour.

The schedule follows the clock, so a run on a slower machine ends in time with fewer steps.
"""

import functools
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from tokenizers import Tokenizer

from engine.model import ModelConfig, load_checkpoint, save_checkpoint
from sona.bench.tasks import TWO_VOICED
from sona.models.nano import tokenizer as tokens_of_nano
from sona.models.nano.card import Making, write_card
from sona.models.nano.data import SHARES, BackgroundBatches, Mixture, corpus
from sona.models.nano.evaluate import Predict, held_out_accuracy
from sona.models.nano.model import CONFIG, TrainState, losses, new_state, to_device, train_step

Say = Callable[[str], None]

_WARMUP = 0.02  # fraction of the run
_STATE = "training_state"  # orbax directory beside the served files
_EVALUATED_ITEMS = 96  # per family, on the way
_FINAL_SEED = 11


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPlan:
    """How long and on what."""

    minutes: float = 45.0  # of training; compilation and evaluation included
    max_steps: int | None = None  # ends earlier after this many steps
    seed: int = 0
    tokens_per_batch: int = 2048
    prompt_weight: float = 0.1  # loss weight of prompt tokens against 1 for answer tokens
    evaluate_every_s: float = 240.0
    num_final_items: int = 500  # per family, for the figures that are reported
    num_corpus_items: int = 30_000  # text that the tokenizer is built on
    config: ModelConfig = CONFIG


def train_nano(
    out_dir: Path, *, plan: TrainPlan | None = None, resume: bool = False, say: Say = print
) -> dict[str, float]:
    """Train, saving to `out_dir` on the way; returns the final held-out accuracy per family.

    `resume` continues from the state in `out_dir` where there is one.
    """
    plan = TrainPlan() if plan is None else plan
    out_dir = out_dir.resolve()
    is_resumed = resume and (out_dir / _STATE).is_dir()
    if not is_resumed:
        built = tokens_of_nano.build(corpus(plan.num_corpus_items, seed=0))
        tokens_of_nano.save(built, out_dir)
    run = _Run(plan, out_dir, Tokenizer.from_file(str(out_dir / "tokenizer.json")), say)
    if is_resumed:
        run.restore()
    run.loop()
    making = run.making()
    figures = held_out_figures(out_dir, num_items=plan.num_final_items)
    write_card(out_dir, making, figures, num_items=plan.num_final_items)
    say("final " + shown(figures))
    return figures


def held_out_figures(directory: Path, *, num_items: int) -> dict[str, float]:
    """Held-out accuracy per family of a saved checkpoint, as its files are."""
    model = load_checkpoint(directory)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    predict = _predictor(model.graph, lambda: model.params)
    return held_out_accuracy(predict, tokenizer, num_items=num_items, seed=_FINAL_SEED)


def shown(figures: Mapping[str, float]) -> str:
    """Figures on one line."""
    return "  ".join(f"{name} {value:.3f}" for name, value in figures.items())


class _Run:
    """One training run: its state, its clock, its files."""

    def __init__(self, plan: TrainPlan, out_dir: Path, tokenizer: Tokenizer, say: Say) -> None:
        self._plan, self._out_dir, self._say = plan, out_dir, say
        self._tokenizer = tokenizer
        self._graph, self._state = new_state(plan.config, plan.seed)
        self._step = functools.partial(
            jax.jit(train_step, static_argnums=0, donate_argnums=1), self._graph
        )
        self._predict = _predictor(self._graph, lambda: self._state.average)
        self._num_steps = 0
        self._elapsed_before_s = 0.0
        self._began = time.monotonic()
        self._loss = 0.0

    @property
    def _elapsed_s(self) -> float:
        return self._elapsed_before_s + time.monotonic() - self._began

    def loop(self) -> None:
        """Train until the time or the steps are used up, then save."""
        seed = (self._plan.seed, self._num_steps)  # a resumed run draws fresh examples
        mixture = Mixture(self._tokenizer, seed, prompt_weight=self._plan.prompt_weight)
        evaluated_s = self._elapsed_s
        with BackgroundBatches(mixture, self._plan.tokens_per_batch) as batches:
            while (progress := self._progress()) < 1.0:
                batch = to_device(batches.next())
                rate = jnp.asarray(min(progress / _WARMUP, 1.0 - progress), jnp.float32)
                rate = jnp.minimum(jnp.maximum(rate, 1e-3), 1.0)
                self._state, loss = self._step(self._state, batch, rate)
                self._loss += 0.02 * (float(loss) - self._loss)
                self._num_steps += 1
                if self._elapsed_s - evaluated_s > self._plan.evaluate_every_s:
                    mixture.set_shares(self._evaluate())
                    self._save()
                    evaluated_s = self._elapsed_s
        self._save()

    def making(self) -> Making:
        """What the checkpoint's README says of this run."""
        return Making(
            command="sona models train-nano",
            date=datetime.now(UTC).date().isoformat(),
            seed=self._plan.seed,
            num_steps=self._num_steps,
            minutes=self._elapsed_s / 60,
            machine=f"{os.cpu_count()} {platform.machine()} cores",
        )

    def _progress(self) -> float:
        by_steps = self._num_steps / (self._plan.max_steps or np.inf)
        return max(self._elapsed_s / (60 * self._plan.minutes), by_steps)

    def _evaluate(self) -> dict[str, float]:
        """Print held-out accuracy; the shares for what follows, more where more is missing."""
        figures = held_out_accuracy(
            self._predict, self._tokenizer, num_items=_EVALUATED_ITEMS, seed=self._num_steps
        )
        self._say(
            f"{self._elapsed_s / 60:5.1f} min  step {self._num_steps}  loss {self._loss:.4f}  "
            + shown(figures)
        )
        return {
            name: share * (0.4 + (0.0 if name in TWO_VOICED else min(4 * (1 - figures[name]), 1.6)))
            for name, share in SHARES.items()
        }

    def _save(self) -> None:
        """The served files at once; the training state beside them."""
        save_checkpoint(self._out_dir, self._plan.config, self._state.average)
        clock = np.asarray([self._num_steps, self._elapsed_s])
        with ocp.StandardCheckpointer() as checkpointer:
            path = self._out_dir / _STATE
            checkpointer.save(path, {"state": _leaves(self._state), "clock": clock}, force=True)

    def restore(self) -> None:
        """Continue from the state in the directory."""
        like = {"state": _leaves(self._state), "clock": np.zeros(2)}
        with ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.restore(self._out_dir / _STATE, like)
        structure = jax.tree.structure(self._state)
        leaves = [saved["state"][f"{i:04d}"] for i in range(structure.num_leaves)]
        self._state = jax.tree.unflatten(structure, leaves)
        self._num_steps, self._elapsed_before_s = int(saved["clock"][0]), float(saved["clock"][1])
        self._began = time.monotonic()
        self._say(f"resumed at step {self._num_steps}, {self._elapsed_before_s / 60:.1f} min")


def _leaves(state: TrainState) -> dict[str, jax.Array]:
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(state))}


def _predictor(graph: nnx.GraphDef, params: Callable[[], nnx.State]) -> Predict:
    run = functools.partial(jax.jit(losses, static_argnums=0), graph)

    def predict(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = run(params(), tokens)
        return np.asarray(found.nll), np.asarray(found.best)

    return predict
