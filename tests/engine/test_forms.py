"""Forms: 200 generated schemas, every one kept to; what costs too much; what fits nothing."""

import asyncio
import json
import random
import string
import time

import jsonschema
import numpy as np
import pytest
from support.checkpoints import make_checkpoint
from support.engines import final, running_engine

from engine.api import Constraint, FinishReason, Job, SamplingParams
from engine.constraints import Grammars
from engine.errors import FormFailed, InvalidJob
from engine.text import Tokenizer

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


def allowed(matcher):
    """Which of 300 tokens may come next: 256 bytes, then what is special."""
    words = np.zeros(10, np.int32)
    matcher.fill(words)
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_checkpoint(directory, "llama")
    return Tokenizer.load(directory, vocab_size=300)


@pytest.fixture
def grammars(tokenizer):
    return Grammars(tokenizer, vocab_size=300, max_len=512)


@pytest.fixture
def id_of(tokenizer):
    return lambda letter: tokenizer.encode_continuation(letter)[0]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "a{1000000}", "forces .* tokens at once; a context holds 512"),
        ("regex", "(((a{1000}){1000}){1000})", "forces .* tokens at once"),
        ("regex", r"[^\s\S]", "no text fits it"),
        ("grammar", "start: start", "no text fits it"),
        ("grammar", "start: a\na: b\nb: a", "no text fits it"),
        ("json_schema", '{"$ref": "#"}', "no text fits it"),
        ("json_schema", "[" * 60_000, "cannot be read"),
        (
            "json_schema",
            '{"type": "integer", "multipleOf": 999983}',
            "has multipleOf 999983; their least common",
        ),
        (
            "json_schema",
            '{"allOf": [{"multipleOf": 199}, {"multipleOf": 197.0}, {"multipleOf": 1.93}]}',
            "may be 10000 at most",
        ),
        ("grammar", 'start: %json {"type": "integer", "multipleOf": 1e6}', "has multipleOf 1e6"),
        ("json_schema", '{"multipleOf": 1e-999999}', "has multipleOf 1e-999999"),
        ("choice", "5", "a list of texts is needed"),
        ("choice", "[]", "a list of texts is needed"),
    ],
    ids=lambda each: each[:20],
)
def test_a_form_that_costs_too_much_or_fits_nothing_is_refused_at_once(
    grammars, kind, text, message
):
    started = time.perf_counter()
    with pytest.raises(InvalidJob, match=message) as refused:
        grammars.compile(Constraint(kind, text))
    assert time.perf_counter() - started < 5.0  # unbounded, the worst of them take minutes
    assert len(str(refused.value)) < 500  # the grammar is not told again


def test_a_form_that_turns_out_too_costly_fails_by_name(grammars, id_of):
    matcher = grammars.compile(Constraint("regex", "(a|b)a{1000000}"))
    assert allowed(matcher) == {id_of("a"), id_of("b")}
    matcher.accept(id_of("b"))
    with pytest.raises(FormFailed, match="cannot be followed any further"):
        for token_id in (*matcher.forced(), id_of("a")):
            matcher.accept(token_id)
    with pytest.raises(FormFailed):  # an end that the form does not allow
        grammars.compile(Constraint("regex", "ab")).accept(256)


def test_every_choice_can_be_said_and_no_other_text(grammars, tokenizer):
    choices = [
        "a b",
        "né 🌍",
        "line\nbreak",
        "(x|y)",
        "[a]{2}",
        "\\d",
        "x",
        "x",
        "xx",
        '"q"',
        "#-&",
    ]
    matcher = grammars.compile(Constraint("choice", json.dumps(choices)))
    said, unfinished = set(), [(matcher, [])]
    while unfinished:
        at, ids = unfinished.pop()
        if 256 in allowed(at) or at.is_complete:
            said.add(tokenizer.decode(ids))
        for token_id in allowed(at) & set(range(256)):
            after = at.copy()
            after.accept(token_id)
            unfinished.append((after, [*ids, token_id]))
    assert said == set(choices)


def test_a_known_form_is_not_compiled_again_and_its_answers_do_not_meet(grammars, id_of):
    form = Constraint("regex", "ab|cd")
    first = grammars.compile(form)
    first.accept(id_of("a"))
    assert allowed(grammars.compile(form)) == {id_of("a"), id_of("c")}
    assert allowed(first) == {id_of("b")}
