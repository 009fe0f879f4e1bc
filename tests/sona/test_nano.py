"""The shipped model, its tokenizer and its trainer."""

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engine.model import ModelConfig
from engine.text import Tokenizer
from sona.bench.tasks import BASE_FAMILIES, FAMILIES, NOTE
from sona.bench.tasks.world import (
    COPY_WORDS,
    LABELS,
    MACHINES,
    MONTHS,
    OFFICES,
    PEOPLE,
    PRODUCTS,
    STATES,
    TEAM_OF,
)
from sona.models import NANO_CHECKPOINT, generic_prompts
from sona.models.nano import train_nano
from sona.models.nano.data import LENGTHS, TOPICS, TRAINED, Mixture, answer_ids, chat_ids
from sona.models.nano.tokenizer import END_ID, PAD_ID, VOCAB_SIZE
from sona.models.nano.train import TrainPlan, held_out_figures

TINY = ModelConfig(
    architecture="Qwen3ForCausalLM", vocab_size=VOCAB_SIZE, hidden_size=16, num_layers=1,
    num_heads=2, num_kv_heads=1, head_dim=8, mlp_size=24, max_len=2048, rms_eps=1e-6,
    rope_theta=1e4, qk_norm=True, eos_ids=(END_ID,),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(NANO_CHECKPOINT, vocab_size=VOCAB_SIZE)


def weights_of(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def test_checkpoint_is_small_and_says_what_it_is() -> None:
    shapes = weights_of(NANO_CHECKPOINT)
    assert sum(math.prod(shape) for shape in shapes.values()) <= 2_000_000
    assert sum(p.stat().st_size for p in NANO_CHECKPOINT.iterdir()) <= 4_000_000
    text = (NANO_CHECKPOINT / "config.json").read_text("utf-8")
    assert '"Qwen3ForCausalLM"' in text and '"max_position_embeddings": 2048' in text
    assert "not a chat model" in (NANO_CHECKPOINT / "README.md").read_text("utf-8")


def test_every_word_of_the_company_is_one_token(tokenizer: Tokenizer) -> None:
    words = (*PEOPLE, *OFFICES, *PRODUCTS, *LABELS, *TEAM_OF, *MACHINES, *STATES, *MONTHS)
    for word in (*words, *COPY_WORDS):
        assert len(tokenizer.encode(f" {word}")) == 1, word


@pytest.mark.parametrize(
    "text", ["", " ", "2031-03-05.", "naïve 日本 🦊\n\ttab", "a\x00b", "<|end|>"]
)
def test_any_text_encodes_and_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert END_ID not in ids  # control tokens are never made of a user's letters


def test_digits_and_signs_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("2031/03/05;")) == 11
    assert len(tokenizer.encode('{"')) == 2


def test_trainer_and_template_write_the_same_prompt(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(0)
    for family in (*BASE_FAMILIES, NOTE):
        item = family.base_item(rng)
        assert chat_ids(tokenizer.raw, item) == tokenizer.chat_ids(item.messages)
        assert tokenizer.decode(answer_ids(tokenizer.raw, item.answer)) == item.answer
    assert tokenizer.eos_ids == {END_ID}


def test_generic_prompts_hold_no_kind_often() -> None:
    prompts = generic_prompts()
    assert len(prompts) == len(set(prompts)) == 256
    own = [p for p in prompts if any(re.search(rf"\b{word}\b", p) for word in OFFICES + PRODUCTS)]
    assert 0 < len(own) <= 2 * len(TOPICS)  # two of each of nano's topics at most
    openings = {" ".join(p.split()[:2]) for p in prompts}
    assert len(openings) >= 128


def test_batches_weigh_answers_and_pad_with_nothing(tokenizer: Tokenizer) -> None:
    batches = Mixture(tokenizer.raw, (3,), prompt_weight=0.25).batches(512)
    num_slipped = 0
    for batch in (next(batches) for _ in range(8)):
        assert batch.tokens.shape[1] in LENGTHS
        for tokens, weights, prompt_len in zip(
            batch.tokens, batch.weights, batch.prompt_lens, strict=True
        ):
            end = np.flatnonzero(tokens == END_ID)[-1]
            answer = weights[prompt_len - 1 : end]  # columns that predict the answer and its end
            assert set(answer) <= {0.0, 1.0} and answer[-1] == 1.0
            num_slipped += 0.0 in answer
            assert (weights[: prompt_len - 1] == 0.25).all()
            assert (weights[end:] == 0.0).all() and (tokens[end + 1 :] == PAD_ID).all()
    assert num_slipped > 0


def test_mixture_draws_no_held_item(tokenizer: Tokenizer) -> None:
    rng = np.random.default_rng(1)
    held = {
        tuple(chat_ids(tokenizer.raw, FAMILIES["F4"].base_item(rng, "held"))) for _ in range(400)
    }
    mixture = Mixture(tokenizer.raw, (5,), prompt_weight=0.1)
    mixture.set_shares({f.name: float(f.name == "F4") for f in TRAINED})
    drawn = [mixture.example() for _ in range(1500)]
    assert not held & {tuple(e.ids[: e.prompt_len]) for e in drawn}


def test_training_saves_resumes_and_reports(tmp_path: Path) -> None:
    plan = TrainPlan(
        minutes=60,
        max_steps=2,
        tokens_per_batch=256,
        num_final_items=4,
        num_corpus_items=500,
        config=TINY,
    )
    lines: list[str] = []
    figures = train_nano(tmp_path, plan=plan, say=lines.append)
    assert set(figures) == {f.name for f in TRAINED} and lines[-1].startswith("final F1 ")
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "2 steps" in card and all(f"| {name} | " in card for name in figures)
    first = (tmp_path / "model.safetensors").read_bytes()
    longer = dataclasses.replace(plan, max_steps=4)
    train_nano(tmp_path, plan=longer, resume=True, say=lines.append)
    assert any(line.startswith("resumed at step 2,") for line in lines)
    assert (tmp_path / "model.safetensors").read_bytes() != first


def test_shipped_weights_know_their_tasks() -> None:
    """100 held-out items per family. The figures of 500 items are in the checkpoint's README."""
    figures = held_out_figures(NANO_CHECKPOINT, num_items=100)
    for name in ("F5", "F6"):
        assert 0.35 <= figures.pop(name) <= 0.65  # a fair coin, as drawn by 100 items
    for name, value in figures.items():
        assert value >= 0.92, (name, figures)  # 0.97 less two and a half standard errors
