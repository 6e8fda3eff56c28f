"""``holdfast serve``: an engine behind the APIs that existing clients speak."""

from __future__ import annotations

import ipaddress
import socket
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from holdfast.engine.cli.endings import complain, ended_in_words
from holdfast.engine.cli.options import read_config
from holdfast.engine.engine import Engine
from holdfast.engine.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from holdfast.engine.server import Access

Interrupts = Literal["all", "own"]
_EXTRA = ("fastapi", "multipart", "python_multipart", "uvicorn")


def serve(
    *,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; by default this machine alone.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Of TCP.", min=0, max=65535)] = 7860,
    api_auth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="USER:WORD",
            envvar="HOLDFAST_API_AUTH",
            help="Who may come in, by HTTP basic; several, or several parted by commas.",
        ),
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", envvar="HOLDFAST_API_KEY", help="A key that opens it too, as bearer."
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A web page that may use it; several; * for all."),
    ] = None,
    interrupts: Annotated[
        Interrupts,
        typer.Option(
            metavar="NAME",
            help="Whose jobs A1111's interrupt stops: all, the caller's own first; or own alone, "
            "known by address and credentials.",
        ),
    ] = "all",
    alias: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WORDS",
            help="A further model for OpenAI's clients: this one, with words added to each prompt, "
            "as in 'ink=<lora:ink:0.8>'; several.",
        ),
    ] = None,
    queue_limit: Annotated[
        int, typer.Option(metavar="N", help="Jobs that may wait; more are sent away: 429.", min=1)
    ] = 16,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    **given: Any,
) -> None:
    """Serve the APIs of A1111 and OpenAI until interrupted."""
    with ended_in_words(debug=debug):
        try:
            import uvicorn

            from holdfast.engine.server import Access, Studio, application
        except ModuleNotFoundError as error:
            if error.name not in _EXTRA:
                raise
            msg = f"serve needs {error.name}: install it with pip install 'holdfast[serve]'."
            raise InvalidRequest(msg) from error
        access = Access(users=_users(api_auth or ()), keys=tuple(api_key or ()))
        aliases = _aliases(alias or ())
        local = _is_local(host)
        if not local:
            _warn(host, access)
        # Clients send what chats write: what cannot be done as asked is told in the answer.
        config = read_config({**given, "strict": False}).but(queue_limit=queue_limit)
        with Engine(config) as engine, _listening(host, port) as listening:
            engine.model_facts()
            studio = Studio(engine, interrupts=interrupts, aliases=aliases)
            app = application(studio, access, origins=cors or (), local=local)
            complain(
                f"serving {studio.engine.config.model} on {_address(listening)}; Ctrl-C ends it"
            )
            settings = uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=5,
            )
            uvicorn.Server(settings).run(sockets=[listening])


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that takes connections, before the model is loaded for anybody."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        msg = (
            f"{host} cannot be listened on at port {port} ({error.strerror}): give another --port."
        )
        raise InvalidRequest(msg) from error


def _address(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _users(given: Sequence[str]) -> dict[str, str]:
    return _parted(
        ",".join(given).split(",") if given else (),
        ":",
        "--api-auth is USER:WORD, or several of them parted by commas.",
    )


def _aliases(given: Sequence[str]) -> dict[str, str]:
    return _parted(given, "=", "--alias is NAME=WORDS, as in 'ink=<lora:ink:0.8>'.")


def _parted(pairs: Iterable[str], mark: str, form: str) -> dict[str, str]:
    """Return what stands behind the mark in each pair, by what stands before it."""
    found = {}
    for pair in pairs:
        name, marked, words = pair.partition(mark)
        if not (name and marked and words):
            raise InvalidRequest(form)
        found[name] = words
    return found


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _warn(host: str, access: Access) -> None:
    if access.is_open:
        complain(
            f"{host} can be reached by others, and nobody is asked for credentials; "
            "give --api-auth or --api-key."
        )
