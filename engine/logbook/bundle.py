"""
``holdfast bundle``: everything that a bug report needs in one file, and nothing that it does not.

Prompts, paths, access tokens, what the host added to events, and the names of LoRAs, of the user
and of the machine are taken out before anything is written.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib.metadata
import platform
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from holdfast.engine.logbook.reading import Entry, log_lines, read
from holdfast.engine.logbook.redaction import Redaction
from holdfast.engine.logbook.writing import line, printable
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SHORTEST_NAME = 3
_DOCTOR = ("-c", "from holdfast.engine.cli import main; main()", "doctor")
_DOCTOR_SECONDS = 120


def own_names() -> dict[str, str]:
    """Return the names of this user and this machine, each with its mark."""
    names = {socket.gethostname(): "<host>", platform.node(): "<host>"}
    with contextlib.suppress(OSError, KeyError):  # no such user in this system's records
        names[getpass.getuser()] = "<user>"
    return {name: mark for name, mark in names.items() if len(name) >= _SHORTEST_NAME}


def write_bundle(
    output: Path, log: Path, redaction: Redaction, texts: Mapping[str, str]
) -> list[str]:
    """
    Write a bug report's bundle.

    Lines of the log that are no events of an engine are left out: nobody knows what is in them.

    Args:
        output: The zip file.
        log: A log of JSON lines.
        redaction: Used on the log and on `texts`.
        texts: Further members by name.

    Returns:
        What was put in, one line for each member.

    Raises:
        OSError: The log cannot be read or the bundle cannot be written.
    """
    for event in _events(log):
        redaction.learn(event)
    kept = 0
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as bundle:
        with bundle.open("log.jsonl", "w") as member:
            for event in _events(log):
                member.write(line(redaction.event(event)))
                kept += 1
        for name, text in texts.items():
            bundle.writestr(name, redaction.text(text))
        sizes = {info.filename: info.file_size for info in bundle.infolist()}
    told = {name: f"{name}, {size} bytes" for name, size in sizes.items()}
    told["log.jsonl"] += f": {kept} events"
    return list(told.values())


def bundle(
    log: Annotated[Path, typer.Argument(help="The log of JSON lines.", dir_okay=False)],
    *,
    output: Annotated[Path, typer.Option("-o", "--output")] = Path("holdfast-bundle.zip"),
    prompts: Annotated[bool, typer.Option("--with-prompts", help="Leave prompts in.")] = False,
    names: Annotated[
        bool, typer.Option("--with-names", help="Leave the names of user and machine in.")
    ] = False,
) -> None:
    """Put a redacted log, the doctor's report, versions, settings and chart in one file."""
    redaction = Redaction({} if names else own_names(), keep_prompts=prompts)
    texts = {
        "doctor.txt": _doctor(),
        "versions.json": msgspec.json.encode(_versions()).decode(),
        "chart.mmd": mermaid(),
    }
    try:
        texts["settings.json"] = msgspec.json.encode(_settings(log, redaction)).decode()
        told = write_bundle(output, log, redaction, texts)
    except OSError as error:
        typer.echo(f"holdfast bundle: {error}", err=True)
        raise typer.Exit(2) from error
    for each in told:
        typer.echo(each)
    left = [word for word, kept in (("prompts", prompts), ("names", names)) if kept]
    typer.echo(f"{output}: without paths, and with {' and '.join(left) or 'no prompt and no name'}")


def _events(log: Path) -> Iterator[dict[str, Any]]:
    return (item.event for item in read(log_lines(log)) if isinstance(item, Entry))


def _settings(log: Path, redaction: Redaction) -> dict[str, Any]:
    """Return the settings of each engine of a log, as they last were."""
    settings: dict[str, dict[str, Any]] = {}
    for event in _events(log):
        if event["event"] == "engine.opened":
            settings[event["engine_id"]] = _mapping(event.get("settings"))
        elif event["event"] == "settings.changed":
            changed = _mapping(event.get("changes"))
            new = {
                name: both[-1] for name, both in changed.items() if isinstance(both, list) and both
            }
            settings.setdefault(event["engine_id"], {}).update(new)
    return {engine: redaction.value(each) for engine, each in settings.items()}


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, dict) else {}


def _versions() -> dict[str, Any]:
    found: Iterable[importlib.metadata.Distribution] = importlib.metadata.distributions()
    packages = {each.metadata["Name"]: each.version for each in found}
    return {
        "python": sys.version,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": dict(sorted(packages.items())),
    }


def _doctor() -> str:
    """Run the doctor in a process of its own: what it looks at may be what crashes."""
    try:
        ran = subprocess.run(  # noqa: S603 - this interpreter, fixed words
            [sys.executable, *_DOCTOR],
            capture_output=True, text=True, errors="replace", timeout=_DOCTOR_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"the doctor did not answer within {_DOCTOR_SECONDS} s"
    report = ran.stdout + ran.stderr
    ended = "" if ran.returncode == 0 else f"the doctor ended with {ran.returncode}\n"
    return "\n".join(printable(each) for each in (ended + report).splitlines()) + "\n"
