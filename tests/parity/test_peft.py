"""LoRAs that the peft package made, against the peft package, in float32."""

import asyncio
import json
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.engines import final, greedy, running_engine
from support.plans import plan_of

from adapters.errors import InvalidAdapter
from adapters.lora import merge
from adapters.peft import read_peft
from engine.api import LoraRef, LoraTable
from engine.model import causal_attend, load_checkpoint
from engine.ops.lora_delta import adapter_of
from engine.slots import LoraSlots, module_sizes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = [
    # transformers warns of its own use of its own name, peft of what cannot be merged later
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings(
        "ignore:.*(lora_bias|tie_word|ensure_weight|embedding|invalid shape):UserWarning"
    ),
]

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    **{module: {"target_modules": [module]} for module in MODULES},
    "lm_head": {"target_modules": ["lm_head"]},
    "all": {"target_modules": MODULES},
    "rslora": {"target_modules": MODULES, "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj"],
        "rank_pattern": {"layers.1.self_attn.q_proj": 5},
        "alpha_pattern": {"up_proj": 3},
    },
    "rank 64": {"target_modules": ["v_proj"], "r": 64},
}
IDS = np.random.default_rng(0).integers(0, 256, 50).tolist()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def directory(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    make_checkpoint(directory, request.param)
    return directory


def trained(directory, seed: int = 0, **settings: Any):
    """A model of peft's whose LoRA is not the zeros it begins with."""
    base = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 12, **settings})
    model = peft.get_peft_model(base, config).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def our_logits(directory, table, *, rank=64):
    model = load_checkpoint(directory)
    plan = plan_of(model.config, max_loras=2, max_lora_rank=rank, lora_on_head=True)
    slots = LoraSlots(plan, model.config)
    other = LoraRef("other", 1, ("o",), random_table(dict(slots.sizes)))
    assert slots.acquire(other) == 1  # its neighbour in the stack must not be read
    slot = slots.acquire(LoraRef("mine", 1, ("m",), table))
    adapt = adapter_of(slots.stack, jnp.array([slot], jnp.int32))
    decoder = model.merge()
    positions = jnp.arange(len(IDS), dtype=jnp.int32)[None]
    hidden = decoder(jnp.asarray([IDS], jnp.int32), positions, causal_attend, adapt)
    return np.asarray(decoder.logits(hidden, adapt))[0]


def random_table(sizes):
    rng = np.random.default_rng(9)
    a = {m: rng.standard_normal((n, 2, i)).astype(np.float32) for m, (n, i, _) in sizes.items()}
    b = {m: rng.standard_normal((n, 2, o)).astype(np.float32) for m, (n, _, o) in sizes.items()}
    return LoraTable(a, b)


def sizes_of(directory):
    return dict(module_sizes(load_checkpoint(directory).config, on_head=True))


@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_target_module(directory, tmp_path, case):
    model = trained(directory, **CASES[case])
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    table = read_peft(tmp_path, sizes_of(directory), max_rank=64)
    want = their_logits(model)
    assert np.abs(our_logits(directory, table) - want).max() <= 1e-4
    with model.disable_adapter():
        assert np.abs(their_logits(model) - want).max() > 1e-2  # the LoRA says something


def test_several_merged_by_weight(directory, tmp_path):
    model = trained(directory, target_modules=MODULES)
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if ".second." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    model.add_weighted_adapter(["default", "second"], [0.7, -0.3], "both", combination_type="cat")
    model.set_adapter("both")
    sizes = sizes_of(directory)
    first = read_peft(tmp_path, sizes, max_rank=64)
    second = read_peft(tmp_path / "second", sizes, max_rank=64)
    merged = merge([(first, 0.7), (second, -0.3)])
    assert merged.rank == 7
    assert np.abs(our_logits(directory, merged, rank=8) - their_logits(model)).max() <= 1e-4


async def test_served_beside_the_base_and_another_lora(directory, tmp_path):
    """Three requests share every step; each has its own model's greedy answer and logprobs."""
    models = [trained(directory, seed, target_modules=MODULES) for seed in (1, 2)]
    refs, sizes = [], sizes_of(directory)
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
        table = read_peft(tmp_path / str(index), sizes, max_rank=16)
        refs.append(LoraRef(f"lora-{index}", 1, (str(index),), table))
    wants = [their_logits(models[0]), their_logits(models[1])]
    with models[0].disable_adapter():
        wants.append(their_logits(models[0]))
    async with running_engine(directory, max_loras=2) as engine:

        async def ask(index, lora):
            job = replace(greedy(f"r{index}", IDS, 1, prompt_logprobs=3, logprobs=1), lora=lora)
            return await final(engine, job)

        answers = await asyncio.gather(*(ask(i, lora) for i, lora in enumerate([*refs, None])))
    for answer, logits in zip(answers, wants, strict=True):
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        assert answer.token_ids[0] == logits[-1].argmax()
        for at, token in enumerate(answer.prompt_tokens):
            assert token.token_id == IDS[at + 1]
            assert token.logprob == pytest.approx(logprobs[at, token.token_id], abs=1e-4)
            best = [top.logprob for top in token.top]
            np.testing.assert_allclose(best, np.sort(logprobs[at])[::-1][:3], atol=1e-4)


def test_what_peft_can_and_we_cannot_is_refused_by_name(directory, tmp_path):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
    ]
    for index, (settings, name) in enumerate(cases):
        where = tmp_path / str(index)
        trained(directory, target_modules=["q_proj"], **settings).save_pretrained(where)
        with pytest.raises(InvalidAdapter, match=name):
            read_peft(where, sizes_of(directory), max_rank=64)
    trained(directory, target_modules=["q_proj"]).save_pretrained(tmp_path / "pissa")
    path = tmp_path / "pissa" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    with pytest.raises(InvalidAdapter, match="rewritten base weights"):
        read_peft(tmp_path / "pissa", sizes_of(directory), max_rank=64)
