"""200 generated JSON schemas: an answer that stops by itself is valid, whatever the model says."""

import asyncio
import json
import random
import string

import jsonschema
import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.engines import final, running_engine

from engine.api import Constraint, FinishReason, Job, SamplingParams

SCHEMAS = 200


def any_schema(rng, depth=0):
    """A schema of the kinds that people write for answers."""
    kinds = ["integer", "number", "string", "boolean", "enum", "const", "date", "null"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (2 if depth < 3 else 0))
    match kind:
        case "integer":
            low = rng.randint(-50, 50)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 200)}
        case "string":
            least = rng.randint(0, 3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 6)}
        case "enum":
            return {"enum": [rng.choice(["red", "é", 7, None, True, "a b"]), rng.randint(0, 9)]}
        case "const":
            return {"const": rng.choice(["fixed", 12, False])}
        case "date":
            return {"type": "string", "pattern": "^[0-9]{4}-[01][0-9]$"}
        case "object":
            names = ["".join(rng.sample(string.ascii_lowercase, 4)) for _ in range(3)]
            fields = {name: any_schema(rng, depth + 1) for name in names}
            required = rng.sample(names, rng.randint(1, 3))
            return {"type": "object", "properties": fields, "required": required,
                    "additionalProperties": False}  # fmt: skip
        case "array":
            least = rng.randint(0, 2)
            return {"type": "array", "items": any_schema(rng, depth + 1), "minItems": least,
                    "maxItems": least + rng.randint(0, 2)}  # fmt: skip
        case "anyOf":
            return {"anyOf": [any_schema(rng, depth + 1) for _ in range(2)]}
        case _:
            return {"type": kind}


@pytest.mark.timeout(600)
async def test_every_answer_that_stops_by_itself_is_valid(tmp_path):
    make_checkpoint(tmp_path, "llama")
    schemas = [any_schema(random.Random(seed)) for seed in range(SCHEMAS)]
    async with running_engine(tmp_path, max_num_seqs=8, num_pages=300) as engine:

        async def ask(index):
            sampling = SamplingParams(temperature=1.0, seed=index, max_tokens=300)
            ids = np.random.default_rng(index).integers(0, 256, 10).tolist()
            form = Constraint("json_schema", json.dumps(schemas[index]))
            job = Job(
                request_id=str(index), prompt_ids=tuple(ids), sampling=sampling, constraint=form
            )
            return await final(engine, job)

        seats = asyncio.Semaphore(16)

        async def seated(index):
            async with seats:
                return await ask(index)

        answers = await asyncio.gather(*(seated(index) for index in range(SCHEMAS)))
    truncated = [one for one in answers if one.finish_reason is FinishReason.LENGTH]
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.finish_reason is FinishReason.STOP:
            jsonschema.validate(json.loads(answer.text), schema)
    print(f"{len(truncated)} of {SCHEMAS} were cut at max_tokens")
    assert len(truncated) < SCHEMAS // 5
