"""Every public error of every package has a status, and the table can be trusted."""

import importlib
import importlib.util
import pickle

import grpc
import pytest

from sona.errors import InvalidField
from sona.rpc import status

PACKAGES = ("engine", "adapters", "reasoning_bank", "sona")


def _public_errors():
    for package in PACKAGES:
        name = f"{package}.errors"
        if importlib.util.find_spec(name) is None:
            continue  # a package that cannot fail yet
        for value in vars(importlib.import_module(name)).values():
            is_error = isinstance(value, type) and issubclass(value, Exception)
            if is_error and value.__module__ == name:
                yield value


PUBLIC_ERRORS = tuple(_public_errors())


def example(kind: type[Exception]) -> Exception:
    return kind("sampling.top_p", "text") if kind is InvalidField else kind("text")


def test_finds_the_errors_of_three_packages_at_least():
    assert {kind.__module__ for kind in PUBLIC_ERRORS} >= {
        "engine.errors",
        "adapters.errors",
        "sona.errors",
    }


@pytest.mark.parametrize("kind", PUBLIC_ERRORS, ids=lambda kind: kind.__qualname__)
def test_every_public_error_has_its_own_status(kind):
    assert kind in status.STATUS, f"add {kind.__qualname__} to sona.rpc.status.STATUS"


def test_no_entry_is_hidden_by_a_broader_one_above_it():
    above: list[type[Exception]] = []
    for kind in status.STATUS:
        hiding = [other for other in above if issubclass(kind, other)]
        assert not hiding, f"{kind.__name__} stands below {hiding[0].__name__}"
        above.append(kind)


@pytest.mark.parametrize("kind", PUBLIC_ERRORS, ids=lambda kind: kind.__qualname__)
def test_every_public_error_survives_pickling(kind):
    back = pickle.loads(pickle.dumps(example(kind)))
    assert type(back) is kind
    assert str(back) == "text"


def test_an_error_nobody_knows_is_ours():
    assert status.status_of(ZeroDivisionError("1/0")) is grpc.StatusCode.INTERNAL
    assert status.public_message(ZeroDivisionError("1/0")) == "internal error"
