"""LoRAs on disk and in memory: what is stored, replaced, forgotten, refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.checkpoints import SHAPE
from support.loras import random_lora

from adapters.errors import (
    AdapterNotFound,
    CandidateRejected,
    IncompatibleAdapter,
    InvalidAdapter,
    SnapshotCorrupt,
)
from adapters.lora import merge
from adapters.loras import LoraStore
from adapters.peft import read_peft
from engine import LoraTable

SIZES = {"q_proj": (2, 48, 96), "down_proj": (2, 80, 48)}
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
PATH = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def table(seed=0, rank=4):
    return random_lora(SHAPE, seed=seed, rank=rank, modules=("q_proj", "v_proj"))


def assert_equal(one, other):
    assert set(one.a) == set(other.a) and set(one.b) == set(other.b)
    for module in one.a:
        np.testing.assert_array_equal(one.a[module], other.a[module])
        np.testing.assert_array_equal(one.b[module], other.b[module])


def test_what_was_loaded_is_there_after_a_restart(tmp_path):
    store = LoraStore(tmp_path, clock=lambda: 7.0)
    first = store.put("t", "style", table(1), base_hash="base", source="/x")
    assert (first.version, first.rank, first.created) == (1, 4, 7.0)
    again = LoraStore(tmp_path)
    assert again.all_of("t") == [first]
    ref = again.ref("t", "style", None, base_hash="base")
    assert (ref.name, ref.version, ref.slot_key) == ("style", 1, ("t", "style"))
    assert_equal(ref.table, table(1))
    assert again.ref("t", "style", 1, base_hash="base").identity == ref.identity


def test_a_number_is_never_given_twice(tmp_path):
    store = LoraStore(tmp_path)
    versions = [store.put("t", "s", table(i), base_hash="b", source="").version for i in range(2)]
    store.remove("t", "s")
    versions.append(LoraStore(tmp_path).put("t", "s", table(9), base_hash="b", source="").version)
    assert versions == [1, 2, 3]
    assert [path.name for path in tmp_path.glob("*/s/*.safetensors")] == ["3.safetensors"]


def test_tenants_bases_and_versions_are_told_apart(tmp_path):
    store = LoraStore(tmp_path)
    store.put("t", "s", table(1), base_hash="b", source="")
    store.put("t", "s", table(2), base_hash="b", source="")
    with pytest.raises(AdapterNotFound, match="no LoRA 's' is loaded for your tenant"):
        store.ref("u", "s", None, base_hash="b")
    with pytest.raises(AdapterNotFound, match="has version 2 loaded, not 1"):
        store.ref("t", "s", 1, base_hash="b")
    with pytest.raises(IncompatibleAdapter, match="loaded for the base model b"):
        store.ref("t", "s", None, base_hash="other")
    store.remove("t", "s")
    with pytest.raises(AdapterNotFound):
        store.remove("t", "s")


@pytest.mark.parametrize("name", ["", "none", "own", "pattern-7", "../x", "a/b", ".a", "x" * 65])
def test_names_that_no_request_could_ask_for(tmp_path, name):
    with pytest.raises(InvalidAdapter, match="cannot be called"):
        LoraStore(tmp_path).put("t", name, table(), base_hash="b", source="")
    assert not list(tmp_path.rglob("*"))


def test_memory_lets_the_least_recently_used_go_and_the_disk_has_it(tmp_path):
    one = table(1).num_bytes
    store = LoraStore(tmp_path, memory_bytes=2 * one)
    for index in range(4):
        store.put("t", f"s{index}", table(index), base_hash="b", source="")
    for index in (0, 3, 1):
        assert_equal(store.ref("t", f"s{index}", None, base_hash="b").table, table(index))
    assert len(store._tables) == 2


def test_a_damaged_file_is_told_and_the_others_serve(tmp_path):
    store = LoraStore(tmp_path, memory_bytes=1)
    for name in ("good", "bad", "cut"):
        store.put("t", name, table(), base_hash="b", source="")
    (bad,) = tmp_path.glob("*/bad/*.safetensors")
    bad.write_bytes(b"nothing")
    again = LoraStore(tmp_path)
    assert [info.name for info in again.all_of("t")] == ["cut", "good"]
    assert [str(bad) in str(error) for error in again.failures] == [True]
    (cut,) = tmp_path.glob("*/cut/*.safetensors")
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(SnapshotCorrupt, match="damaged"):
        again.ref("t", "cut", None, base_hash="b")


def test_a_mix_adds_deltas_by_weight_and_is_made_once(tmp_path):
    store = LoraStore(tmp_path)
    refs = []
    for index in range(2):
        store.put("t", f"s{index}", table(index, rank=2 + index), base_hash="b", source="")
        refs.append(store.ref("t", f"s{index}", None, base_hash="b"))
    mixed = store.mix("t", [(refs[0], 0.5), (refs[1], -2.0)])
    for module in ("q_proj", "v_proj"):
        for layer in range(2):
            want = sum(
                weight * ref.table.a[module][layer].T @ ref.table.b[module][layer]
                for ref, weight in ((refs[0], 0.5), (refs[1], -2.0))
            )
            got = mixed.table.a[module][layer].T @ mixed.table.b[module][layer]
            np.testing.assert_allclose(got, want, atol=1e-6)
    assert mixed.table.rank == 5
    assert store.mix("t", [(refs[0], 0.5), (refs[1], -2.0)]).table is mixed.table
    assert store.mix("t", [(refs[0], 1.0)]) is refs[0]
    assert len({r.identity for r in (mixed, store.mix("t", [(refs[0], 0.5), (refs[1], 2.0)]))}) == 2
    with pytest.raises(CandidateRejected, match="weight is nan"):
        store.mix("t", [(refs[0], float("nan"))])


def test_merging_loras_of_two_models_is_refused():
    other = LoraTable({"q_proj": np.zeros((2, 1, 7), np.float32)}, {"q_proj": np.zeros((2, 1, 9))})
    with pytest.raises(CandidateRejected, match="of different models: q_proj"):
        merge([(table(), 1.0), (other, 1.0)])


def write_peft(directory, *, config=None, tensors=None):
    directory.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    tensors = tensors or {
        PATH.format(0, "A"): rng.standard_normal((2, 48)).astype(np.float32),
        PATH.format(0, "B"): rng.standard_normal((96, 2)).astype(np.float32),
    }
    (directory / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(tensors, directory / "adapter_model.safetensors")
    return tensors


def test_factors_and_scale(tmp_path):
    tensors = write_peft(tmp_path)
    read = read_peft(tmp_path, SIZES, max_rank=2)
    assert read.rank == 2
    np.testing.assert_array_equal(read.a["q_proj"][0], tensors[PATH.format(0, "A")])
    np.testing.assert_allclose(read.b["q_proj"][0], 3 * tensors[PATH.format(0, "B")].T)
    assert not read.a["q_proj"][1].any()  # the other layer has none


def _twice(name):
    """With and without the prefix that peft writes."""
    return name, name.removeprefix("base_model.model.")


BASES = frozenset({"some-model", "sona-nano"})


def test_rslora_divides_by_the_root_of_the_rank(tmp_path):
    tensors = write_peft(tmp_path, config={"use_rslora": True})
    read = read_peft(tmp_path, SIZES, max_rank=2)
    scale = CONFIG["lora_alpha"] / 2**0.5
    np.testing.assert_allclose(
        read.b["q_proj"][0], scale * tensors[PATH.format(0, "B")].T, rtol=1e-6
    )


A, B = np.zeros((2, 48), np.float32), np.zeros((96, 2), np.float32)
REFUSED = [
    ({"peft_type": "IA3"}, None, "peft_type is 'IA3'"),
    ({"use_dora": True}, None, "DoRA is not supported"),
    ({"modules_to_save": ["lm_head"]}, None, "modules_to_save"),
    ({"bias": "all"}, None, "bias is 'all'"),
    ({"init_lora_weights": "olora"}, None, "rewritten base weights"),
    ({"lora_alpha": "much"}, None, "lora_alpha is 'much'"),
    ({"lora_alpha": float("nan")}, None, "lora_alpha is 'nan'"),
    ({"lora_alpha": float("inf")}, None, "lora_alpha is 'inf'"),
    ({"lora_alpha": 1e300}, None, "lora_alpha is '1e\\+300'"),
    ({"lora_alpha": 10**400}, None, "lora_alpha is '10000"),
    ({"r": "2"}, None, "r is '2'; use a whole number"),
    ({"r": 0}, None, "r is '0'; use a whole number"),
    ({"rank_pattern": [4]}, None, "rank_pattern is"),
    ({"rank_pattern": {"(": 4}}, None, "rank_pattern key is '\\('"),
    ({"rank_pattern": {"([a-z._0-9]+)+!": 4}}, None, "no repeated groups"),
    ({"alpha_pattern": "all"}, None, "alpha_pattern is 'all'"),
    ({"alpha_pattern": {"q_proj": None}}, None, "alpha_pattern"),
    ({"target_modules": ["q_proj", "v_proj"]}, None, "has no factors of v_proj"),
    ({"base_model_name_or_path": "org/other-7B"}, None, "trained on 'org/other-7B'; this server"),
    ({"r": 3}, None, "should have rank 3; its factors have 2"),
    ({}, {PATH.format(0, "A"): A}, "has only lora_A"),
    ({}, {PATH.format(0, "A"): A * np.nan, PATH.format(0, "B"): B}, "holds NaN"),
    ({}, {PATH.format(0, "A"): A + 1e30, PATH.format(0, "B"): B}, "beyond 1e\\+06"),
    ({}, {PATH.format(0, "A"): A[:0], PATH.format(0, "B"): B[:, :0]}, "of another model"),
    ({}, {PATH.format("9" * 5000, "A"): A}, "is not a LoRA factor"),
    (
        {},
        {name: A if side == "A" else B for side in "AB" for name in _twice(PATH.format(0, side))},
        "is there twice, by two names",
    ),
    ({}, {PATH.format(9, "A"): A, PATH.format(9, "B"): B}, "adapts layer 9"),
    ({}, {PATH.format(0, "A"): A[:, :40], PATH.format(0, "B"): B}, "the LoRA is of another model"),
    ({}, {"base_model.model.lm_head.lora_A.weight": A}, "set engine.lora_on_head"),
    ({}, {"base_model.model.model.embed_tokens.lora_embedding_A": A}, "is not a LoRA factor"),
]


@pytest.mark.parametrize(("config", "tensors", "message"), REFUSED, ids=lambda x: str(x)[:30])
def test_what_cannot_be_served_is_refused_by_name(tmp_path, config, tensors, message):
    write_peft(tmp_path, config=config, tensors=tensors)
    with pytest.raises((InvalidAdapter, IncompatibleAdapter), match=message):
        read_peft(tmp_path, SIZES, max_rank=2, base_names=BASES)


@pytest.mark.parametrize("name", ["org/Some-Model", "/data/some-model/", "", None])
def test_a_lora_may_call_its_base_by_any_of_its_names(tmp_path, name):
    write_peft(tmp_path, config={"base_model_name_or_path": name})
    assert read_peft(tmp_path, SIZES, max_rank=2, base_names=BASES).rank == 2


def test_missing_and_half_written_files(tmp_path):
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json does not exist"):
        read_peft(tmp_path, SIZES, max_rank=2)
    write_peft(tmp_path)
    with pytest.raises(IncompatibleAdapter, match="rank 2; this server's slots hold 1"):
        read_peft(tmp_path, SIZES, max_rank=1)
    weights = tmp_path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 5, 100, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(InvalidAdapter, match="damaged or half-written"):
            read_peft(tmp_path, SIZES, max_rank=2)
    weights.unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidAdapter, match="safe_serialization"):
        read_peft(tmp_path, SIZES, max_rank=2)
    with pytest.raises(InvalidAdapter, match="cannot be read"):
        read_peft(tmp_path / ("x" * 10_000), SIZES, max_rank=2)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidAdapter, match="is not JSON"):
        read_peft(tmp_path, SIZES, max_rank=2)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(InvalidAdapter, match="is not JSON"):
        read_peft(tmp_path, SIZES, max_rank=2)
