"""What the commands share: client options, output, errors told in one line."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from sona.client import Client

_Command = TypeVar("_Command", bound=Callable[..., Any])


def client_options(command: _Command) -> _Command:
    """Adds --address, --api-key, --timeout and --json; the command gets `client` and `as_json`."""

    @click.option(
        "--address", envvar="SONA_ADDRESS", default="127.0.0.1:50051", show_default=True,
        help="gRPC address of a running server.",
    )  # fmt: skip
    @click.option("--api-key", envvar="SONA_API_KEY", help="The caller's key.")
    @click.option(
        "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), default=120.0,
        show_default=True, help="Seconds; a request that cannot be answered in time is refused.",
    )  # fmt: skip
    @click.option("--json", "as_json", is_flag=True, help="Print JSON, one document per reply.")
    @functools.wraps(command)
    def wrapped(
        *args: Any, address: str, api_key: str | None, timeout_s: float, **kwargs: Any
    ) -> Any:
        with refusals_told(address), _connected(address, api_key, timeout_s) as client:
            return command(*args, client=client, **kwargs)

    return wrapped  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def refusals_told(address: str) -> Iterator[None]:
    """A refused call becomes one line on stderr and exit status 1."""
    import grpc

    from sona.client import explain

    try:
        yield
    except grpc.RpcError as error:
        text = explain(error)
        if "failed to connect" in text:  # gRPC's own words; a server's refusal has others
            text = f"no server answers at {address}; start one with: sona serve"
        raise click.ClickException(text) from None


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """An error of ours while starting becomes one line on stderr and exit status 1."""
    from adapters.errors import AdapterError
    from engine.errors import EngineError
    from sona.errors import SonaError

    try:
        yield
    except (EngineError, AdapterError, SonaError) as error:
        raise click.ClickException(str(error)) from error


def show_json(message: "Message") -> None:
    """A reply as JSON, with the field names of the proto files."""
    from google.protobuf.json_format import MessageToDict

    table = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    click.echo(json.dumps(table, ensure_ascii=False))


def parse_scope(context: click.Context, option: click.Parameter, value: str | None) -> str:
    """Empty where it was not given."""
    return value or ""


@contextlib.contextmanager
def _connected(address: str, api_key: str | None, timeout_s: float) -> "Iterator[Client]":
    from sona.client import Client

    with Client(address, api_key=api_key, timeout_s=timeout_s) as client:
        yield client
