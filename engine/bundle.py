"""
``holdfast bundle``: everything that a bug report needs in one file, and nothing that it does not.

Prompts, paths, access tokens and the names of user and machine are taken out before anything is
written.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import importlib.metadata
import platform
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from holdfast.engine.events import PROMPT_KEYS
from holdfast.engine.logbook.read import Entry, log_lines, read
from holdfast.engine.logbook.write import line, printable
from holdfast.states import mermaid

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

_SECRET_KEY = re.compile(r"token$|secret|password|api_?key|authorization|credential", re.IGNORECASE)
_SECRET = re.compile(  # a hub's token, what authorizes a call, and the user in an address
    r"\bhf_\w{8,}|(?<=\bBearer )\S+|(?<=://)[^\s/@]+(?=@)", re.IGNORECASE
)
_PATH = re.compile(
    r"""(?<=['"])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^'"\n]+(?=['"])"""  # quoted: to the end of the quotes
    r"""|file:/+[^\s'"<>|]+|(?<![\w/.:~])(?:[A-Za-z]:[\\/]|\\\\|~?/)[^\s'"<>|*?,;()]+"""
)
_WHOLE_PATH = re.compile(r"(?:[A-Za-z]:[\\/]|\\\\|~|\.{0,2}/).+", re.DOTALL)
_SHORTEST_NAME = 3
_DOCTOR = ("-c", "from holdfast.engine.cli import main; main()", "doctor")
_DOCTOR_SECONDS = 120


class Redaction:
    """
    Takes out of texts and events what tells of a person or a machine, and every access token.

    A path becomes ``<path 1f0c>`` with its ending, the same path always the same.

    Args:
        secrets: Texts to take out wherever they stand, each with what stands in its place.
        keep_prompts: Leave prompts in.
    """

    def __init__(self, secrets: Mapping[str, str], *, keep_prompts: bool = False) -> None:
        self._secrets = dict(secrets)
        self._keep_prompts = keep_prompts

    def learn_prompts(self, event: Mapping[str, Any]) -> None:
        """Take the prompts of an event out of every text from now on."""
        if not self._keep_prompts:
            found = (event[key] for key in PROMPT_KEYS & event.keys())
            self._secrets |= {each: "<prompt>" for each in found if each and isinstance(each, str)}

    def text(self, text: str) -> str:
        """Return a text without secrets and paths."""
        for secret in sorted(self._secrets, key=len, reverse=True):
            word = rf"(?<!\w){re.escape(secret)}(?!\w)"
            text = re.sub(word, self._secrets[secret], text, flags=re.IGNORECASE)
        text = _SECRET.sub("<secret>", text)
        return _PATH.sub(lambda found: _path_mark(found[0]), text)

    def value(self, value: Any) -> Any:
        """Return a JSON value without secrets, paths and prompts."""
        if isinstance(value, str):
            return _path_mark(value) if _WHOLE_PATH.fullmatch(value) else self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {self.text(key): self._keyed(key, each) for key, each in value.items()}
        return value

    def _keyed(self, key: str, value: Any) -> Any:
        if key in PROMPT_KEYS and value and not self._keep_prompts:
            return "<prompt>"
        if _SECRET_KEY.search(key) and isinstance(value, str):
            return "<secret>"
        return self.value(value)


def own_names() -> dict[str, str]:
    """Return the names of this user, this machine and the home folder, each with its mark."""
    names = {str(Path.home()): "<home>", socket.gethostname(): "<host>", platform.node(): "<host>"}
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
        redaction.learn_prompts(event)
    kept = 0
    with zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as bundle:
        with bundle.open("log.jsonl", "w") as member:
            for event in _events(log):
                member.write(line(redaction.value(event)))
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
    config: Annotated[Path | None, typer.Option(help="Settings, as JSON, to put in too.")] = None,
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
        if config is not None:
            texts["config.json"] = _settings(config, redaction)
        told = write_bundle(output, log, redaction, texts)
    except (OSError, msgspec.DecodeError) as error:
        typer.echo(f"holdfast bundle: {error}", err=True)
        raise typer.Exit(2) from error
    for each in told:
        typer.echo(each)
    left = [word for word, kept in (("prompts", prompts), ("names", names)) if kept]
    typer.echo(f"{output}: without paths, and with {' and '.join(left) or 'no prompt and no name'}")


def _events(log: Path) -> Iterator[dict[str, Any]]:
    return (item.event for item in read(log_lines(log)) if isinstance(item, Entry))


def _path_mark(path: str) -> str:
    ending = re.search(r"\.\w{1,12}$", path)
    digest = hashlib.blake2b(path.encode(errors="replace"), digest_size=4).hexdigest()
    return f"<path {digest}>{ending[0] if ending else ''}"


def _settings(config: Path, redaction: Redaction) -> str:
    settings = msgspec.json.decode(config.read_bytes())
    return msgspec.json.encode(redaction.value(settings)).decode()


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
