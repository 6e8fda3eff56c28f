"""Errors of the library in the command's own words: options in place of fields and values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from holdfast.engine.cli.options import FLAGS, KINDS

if TYPE_CHECKING:
    import click

_MADE = re.compile(r"(?:^|(?<=: ))\w+ cannot be made as asked: ")
_KIND = re.compile(rf"(?:^|(?<=: ))(?:{'|'.join(kind.__name__ for kind in KINDS)}): ")
_PAIR = re.compile(r"(?<!\S)([a-z]+(?:_[a-z]+)+)/([a-z]+(?:_[a-z]+)+)(?![\w/.])")
_VALUE = re.compile(r"`{0,2}\b([a-z]+(?:_[a-z]+)*)=('[^']*'|\"[^\"]*\"|\w+(?:[.+-]\w+)*)`{0,2}")
_WORD = re.compile(r"(?<![-\w./])([a-z]+(?:_[a-z]+)+)(?![-\w=(]|[./]\w)")
_FIELD = re.compile(r"(?:^|(?<=[;:] ))([a-z]+(?:_[a-z]+)*)(?:\.\w+)*(?=: )")
_MANY = "unexpected extra argument"


def in_options(text: str) -> str:
    """Return an error's text with options in place of fields: ``--no-strict``, ``--steps 20``."""
    text = _KIND.sub("", _MADE.sub("", text))
    text = _PAIR.sub(lambda pair: f"{_flag(pair[1])}/{_flag(pair[2])}", _VALUE.sub(_set, text))
    return _WORD.sub(_named, _FIELD.sub(_named, text))


def _set(found: re.Match[str]) -> str:
    name, value = found[1], found[2].strip("'\"")
    if name not in FLAGS:
        return found[0]
    flag = FLAGS[name]
    if value == "None":
        return f"no {flag}"
    switches = {"True": flag, "False": f"--no-{flag[2:]}"}
    return switches.get(value, f"{flag} {value}")


def _named(found: re.Match[str]) -> str:
    return _flag(found[1])


def _flag(name: str) -> str:
    return FLAGS.get(name, name)


def of_usage(error: click.ClickException) -> str:
    """Return what click says of a command line; of a prompt without quotes, what to do."""
    text = error.format_message()
    context = getattr(error, "ctx", None)
    prompt = None if context is None else context.params.get("prompt")
    if _MANY not in text or prompt is None:
        return text
    extra = text.partition("(")[2].rpartition(")")[0]
    return f'{text}. A prompt of several words needs quotes: "{prompt} {extra}"'
