"""LoRAs over gRPC: loaded, asked for, mixed, replaced under a request, unloaded, refused."""

import asyncio
import json

import grpc
import pytest
from safetensors.numpy import save_file
from support.checkpoints import make_checkpoint
from support.loras import random_lora
from support.server import client_of, configured, running_server

from sona.v1 import feedback_pb2, learning_pb2

GREEDY = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
ASK = "hello there, how are you"


def write_lora(directory, config, seed):
    """A random LoRA as peft would have saved it."""
    table = random_lora(config, seed=seed)
    tensors = {}
    for module in table.a:
        part = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
        for layer in range(config["num_hidden_layers"]):
            path = f"base_model.model.model.layers.{layer}.{part}.{module}"
            tensors[f"{path}.lora_A.weight"] = table.a[module][layer]
            tensors[f"{path}.lora_B.weight"] = table.b[module][layer].T.copy()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": table.rank, "lora_alpha": table.rank}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


async def said(client, adapter, **options):
    reply = await client.generate(ASK, adapter=adapter, **{**GREEDY, **options})
    versions = [(one.name, one.version) for one in reply.adapter_versions]
    return list(reply.choices[0].token_ids), versions, reply


async def refusal(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return caught.value.code(), str(caught.value.details())


@pytest.mark.timeout(300)
async def test_the_life_of_a_lora(tmp_path):
    config, _ = make_checkpoint(tmp_path / "model", "qwen3")
    paths = [str(write_lora(tmp_path / f"lora{i}", config, seed=i)) for i in range(3)]
    settings = configured(
        tmp_path / "data", model=tmp_path / "model",
        engine={"max_num_seqs": 4, "max_loras": 3, "max_learned_slots": 8, "num_pages": 300},
    )  # fmt: skip
    async with running_server(settings) as addresses, client_of(addresses) as client:
        base, nothing, _ = await said(client, "none")
        assert nothing == []
        loaded = await client.load_adapter("style", paths[0])
        assert (loaded.name, loaded.version, loaded.rank) == ("style", 1, 4)
        assert loaded.kind == learning_pb2.ADAPTER_KIND_LORA
        await client.load_adapter("legal", paths[1])
        style, versions, reply = await said(client, "style")
        assert style != base
        assert versions == [("style", 1)]

        # Feedback on it is kept, and not learned for the base model.
        sent = await client.feedback(reply.request_id, correction="something else")
        kept = await client.get_feedback(sent.feedback_id)
        assert kept.state == feedback_pb2.FEEDBACK_STATE_ACCEPTED
        assert (await said(client, ""))[0] == base

        mixed, versions, _ = await said(client, "style:0.5+legal@1:-0.25+own")
        assert versions == [("style", 1), ("legal", 1)]
        assert mixed not in (base, style)
        scored = await client.score(ASK, "xyz", adapter="style")
        plain = await client.score(ASK, "xyz", adapter="none")
        assert [one.logprob for one in scored.logprobs] != [one.logprob for one in plain.logprobs]
        assert [one.name for one in scored.adapter_versions] == ["style"]

        # Replaced while a request is under way: that one keeps what it began with.
        long = {"max_tokens": 300}
        whole, _, _ = await said(client, "style", **long)
        stream = client.stream(ASK, adapter="style", **{**GREEDY, **long})
        tokens, shaped, replaced = [], None, None
        async for event in stream:
            if event.HasField("delta"):
                if not tokens:
                    replaced = await client.load_adapter("style", paths[2])
                tokens += event.delta.token_ids
            if event.HasField("final"):
                shaped = [(one.name, one.version) for one in event.final.adapter_versions]
        assert replaced is not None and replaced.version == 2
        assert (shaped, tokens) == ([("style", 1)], whole)
        newer, versions, _ = await said(client, "style")
        assert versions == [("style", 2)]
        assert newer not in (base, style)

        listed = await client.adapters()
        assert [(one.name, one.version) for one in listed] == [("legal", 1), ("style", 2)]
        found = await client.adapter("legal")
        assert (found.adapter, list(found.revisions)) == (listed[0], [])
        await client.unload_adapter("legal")
        code, details = await refusal(client.adapter("legal"))
        assert (code, "no LoRA 'legal' is loaded" in details) == (grpc.StatusCode.NOT_FOUND, True)
        code, details = await refusal(client.generate(ASK, adapter="legal", **GREEDY))
        assert (code, "no LoRA 'legal' is loaded" in details) == (grpc.StatusCode.NOT_FOUND, True)
        code, details = await refusal(client.generate(ASK, adapter="style@1", **GREEDY))
        assert (code, "has version 2 loaded, not 1" in details) == (grpc.StatusCode.NOT_FOUND, True)
        code, details = await refusal(client.load_adapter("x", str(tmp_path / "nowhere")))
        assert (code, "does not exist" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)
        for bad in ("style:x", "+style", "style@1@2", "pattern-1+pattern-2", "pattern-1:0.5"):
            code, details = await refusal(client.generate(ASK, adapter=bad, **GREEDY))
            assert code == grpc.StatusCode.INVALID_ARGUMENT, (bad, details)

        twenty = await asyncio.gather(*(said(client, name) for name in ["style", "none"] * 10))
        assert all(one[0] == (newer, base)[at % 2] for at, one in enumerate(twenty))

    async with running_server(settings) as addresses, client_of(addresses) as client:
        again, versions, _ = await said(client, "style")  # loaded, not asked for again
        assert (again, versions) == (newer, [("style", 2)])


async def test_without_slots_and_without_the_role_nothing_is_loaded(tmp_path):
    make_checkpoint(tmp_path / "model", "llama")
    settings = configured(
        tmp_path / "data", model=tmp_path / "model", students=("ann",),
        engine={"max_num_seqs": 2, "max_learned_slots": 4, "num_pages": 100},
    )  # fmt: skip
    async with running_server(settings) as addresses, client_of(addresses, "ann") as client:
        code, details = await refusal(client.load_adapter("x", "/"))
        assert (code, "operator" in details) == (grpc.StatusCode.PERMISSION_DENIED, True)
    settings = configured(
        tmp_path / "data2", model=tmp_path / "model",
        engine={"max_num_seqs": 2, "max_learned_slots": 4, "num_pages": 100},
    )  # fmt: skip
    async with running_server(settings) as addresses, client_of(addresses) as client:
        code, details = await refusal(client.load_adapter("x", "/"))
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "--max-loras" in details
