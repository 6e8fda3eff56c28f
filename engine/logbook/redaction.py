"""
What tells of a person or a machine, taken out of a log's events and of other texts.

Whatever the text, the time that this takes grows with its length alone.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any

from holdfast.engine.logbook.events import COMMON, EVENTS, PROMPT_KEYS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

PROMPT, SECRET = "<prompt>", "<secret>"
_SCOPE_KEYS = frozenset({"request_id", "pass", "mode", "pid", "left_out"})
_WORD_KEYS = frozenset({  # each holds one of Holdfast's own words, which a prompt may hold too
    "event", "level", "component", "mode", "state", "source", "dest", "origin", "trigger", "legal",
    "scheduler", "kind", "space", "upscaler", "policy", "input", "pipeline", "device",
    "device_asked", "precision", "cache", "engine_id", "timestamp", "request_id",
})  # fmt: skip
_SECRET_KEY = re.compile(
    r"(?:token|secret|passw(?:or)?d|passphrase|api_?key|access_?key|private_?key|authorization"
    r"|credentials?|cookie|signature|session_?id|client_address)$",
    re.IGNORECASE,
)
_SECRETS = (
    (re.compile(r"\bdata:[\w/+.-]{1,80};base64,[\w+/=-]+"), "<data>"),
    (re.compile(r"(?i)\b((?:proxy-)?authorization|(?:set-)?cookie)(['\"]?\s*[:=])[^\n]+"),
     rf"\1\2 {SECRET}"),
    (re.compile(
        r"(?i)(?<![\w-])([\w-]{0,40}(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key"
        r"|credentials?|signature|session[_-]?id))(['\"]?\s*[:=]\s*)(['\"]?)[^\s'\",;&<]+"),
     rf"\1\2\3{SECRET}"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{4,}"), rf"\1 {SECRET}"),
    (re.compile(  # as hubs, code hosts, clouds and chats begin theirs
        r"\b(?:hf_|gh[opsu]_|github_pat_|glpat-|sk-|xox[a-z]-|AKIA|eyJ)[\w.-]{8,}"), SECRET),
    (re.compile(r"<[^<>\n]{1,400} at 0x[0-9a-fA-F]+>"), "<object>"),
)  # fmt: skip
_URL = re.compile(r"(?i)(?<![a-z0-9+.-])([a-z][a-z0-9+.-]{1,15})://((?:[^\s'\"<>]|<secret>)*)")
_QUOTED = re.compile(r"""(?<!\w)(?:'[^'\n]*'|"[^"\n]*")""")
_BEGIN = r"[A-Za-z]:[\\/]|\\\\|~[\w.-]{0,64}[\\/]|\.{0,2}[\\/](?=\S)"
_PATH = re.compile(
    rf"(?:(?P<sure>(?<![\w/.~\\<])(?:{_BEGIN}))"
    r"|(?<![\w/.~\\<+@-])[\w.+@-]+[\\/](?=[\w.+@-]))"
    r"(?:[^\n\t\r'\"<>|*?;,():]|:(?!\s|$))*"
)
_WHOLE_PATH = re.compile(rf"(?:{_BEGIN}).*|~", re.DOTALL)
_ENDING = re.compile(r"\.[A-Za-z]\w{0,11}$")
_ONE_WORD = r"\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"  # scripts that put no space between words
_WORD = re.compile(rf"[{_ONE_WORD}]|[^\W{_ONE_WORD}]+")
_RUN = 3
"""Words in a row, of a prompt or a name, that are recognised wherever they stand."""
_SHORTEST_REST, _LONGEST_REST = 3, 40


class Redaction:
    """
    Takes out of texts and events what tells of a person or a machine, and every access token.

    A path becomes ``<path 1f0c33aa>`` with its ending, a LoRA's name ``<lora 1f0c33aa>``: the same
    one always the same. Of a prompt its words go too, wherever some of them are quoted.

    Args:
        names: Texts to take out wherever they stand, each with what stands in its place.
        keep_prompts: Leave prompts in.
    """

    def __init__(self, names: Mapping[str, str], *, keep_prompts: bool = False) -> None:
        self._keep_prompts = keep_prompts
        self._phrases: dict[tuple[str, ...], str] = {}
        self._words: set[str] = set()
        self._rests: set[str] = set()
        for name, mark in names.items():
            self._learn(name, mark)

    def learn(self, event: Mapping[str, Any]) -> None:
        """Take the prompts and the LoRAs' names of an event out of every text from now on."""
        for use in _texts(event.get("lora")):
            name = use.rpartition("@")[0]
            self._learn(name, _mark("lora", name))
        for prompt in () if self._keep_prompts else _texts([event.get(key) for key in PROMPT_KEYS]):
            words = self._learn(prompt, PROMPT)
            self._words.update(words)
            for word in (each[:_LONGEST_REST] for each in words):
                ends = range(_SHORTEST_REST, len(word) + 1)
                self._rests.update(piece for end in ends for piece in (word[:end], word[-end:]))

    def event(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Return an event without what its host added, and without secrets, paths and prompts."""
        spec = EVENTS.get(event["event"])
        known = {*COMMON, *_SCOPE_KEYS, *((*spec.keys, *spec.optional) if spec else ())}
        kept = {key: value for key, value in event.items() if key in known}
        if event["event"] == "subscriber.failed":  # whatever the host's own code says of itself
            kept |= {key: _leading_name(str(kept.get(key))) for key in ("subscriber", "error")}
        return {key: self._keyed(key, value) for key, value in kept.items()}

    def value(self, value: Any) -> Any:
        """Return a JSON value without secrets, paths and prompts."""
        if isinstance(value, str):
            return _path_mark(value) if _WHOLE_PATH.fullmatch(value) else self.text(value)
        if isinstance(value, list):
            return [self.value(each) for each in value]
        if isinstance(value, dict):
            return {self.text(key): self._keyed(key, each) for key, each in value.items()}
        return value

    def text(self, text: str) -> str:
        """Return a text without secrets, paths, prompts and names."""
        text = self._public(text)
        text = _QUOTED.sub(lambda found: self._quotation(found[0]), text)
        return self._without_phrases(text)

    def _keyed(self, key: str, value: Any) -> Any:
        if key in PROMPT_KEYS and value and not self._keep_prompts:
            return PROMPT
        if _SECRET_KEY.search(key) and value is not None:
            return SECRET
        if key == "lora" and isinstance(value, list):
            return [self._lora(each) if isinstance(each, str) else self.value(each)
                    for each in value]  # fmt: skip
        if key in _WORD_KEYS and isinstance(value, str):
            return _path_mark(value) if _WHOLE_PATH.fullmatch(value) else self._public(value)
        return self.value(value)

    def _lora(self, use: str) -> str:
        name, at, weight = use.rpartition("@")
        return f"{_mark('lora', name)}@{weight}" if at else self.text(use)

    def _public(self, text: str) -> str:
        for pattern, mark in _SECRETS:
            text = pattern.sub(mark, text)
        text = _QUOTED.sub(lambda found: _quoted_path(found[0]), text)
        parts, done = [], 0
        for address in _URL.finditer(text):
            before = _PATH.sub(_public_path, text[done : address.start()])
            parts += [before, _public_address(address)]
            done = address.end()
        return "".join([*parts, _PATH.sub(_public_path, text[done:])])

    def _learn(self, text: str, mark: str) -> Sequence[str]:
        words = [word.casefold() for word in _WORD.findall(text)]
        runs = zip(*(words[begin:] for begin in range(_RUN)), strict=False)
        for run in runs if len(words) > _RUN else [tuple(words)]:
            self._phrases.setdefault(run, mark)
        return words

    def _quotation(self, quoted: str) -> str:
        """Replace what is quoted if a part of it is of a prompt: it may be cut at any letter."""
        words = [word.casefold() for word in _WORD.findall(quoted)]
        if len(words) == 1:
            cut = words[0] in self._rests
        else:
            cut = (
                len(words) <= _RUN + 1
                and any(  # longer ones have a whole run between the cuts
                    self._rests.intersection(whole) and all(map(self._is_known, whole))
                    for whole in (words, words[1:], words[:-1], words[1:-1])
                )
            )
        if cut or any(mark == PROMPT for _, _, mark in self._found(words)):
            return f"{quoted[0]}{PROMPT}{quoted[-1]}"
        return quoted

    def _is_known(self, word: str) -> bool:
        return word in self._words or word in self._rests

    def _without_phrases(self, text: str) -> str:
        places = list(_WORD.finditer(text))
        parts, done = [], 0
        for first, last, mark in self._found([place[0].casefold() for place in places]):
            begin, end = places[first].start(), places[last].end()
            if begin >= done:
                parts += [text[done:begin], mark]
            done = max(done, end)
        return "".join([*parts, text[done:]])

    def _found(self, words: Sequence[str]) -> Iterator[tuple[int, int, str]]:
        """Give each known phrase among the words: its first and last word, and its mark."""
        if not self._phrases:
            return
        for first in range(len(words)):
            for length in range(min(_RUN, len(words) - first), 0, -1):
                mark = self._phrases.get(tuple(words[first : first + length]))
                if mark is not None:
                    yield first, first + length - 1, mark
                    break


def _texts(values: object) -> Iterator[str]:
    """Give the texts among some values that have a word in them."""
    if isinstance(values, list):
        yield from (each for each in values if isinstance(each, str) and _WORD.search(each))


def _mark(kind: str, text: str) -> str:
    digest = hashlib.blake2b(text.encode(errors="replace"), digest_size=4).hexdigest()
    return f"<{kind} {digest}>"


def _path_mark(path: str) -> str:
    ending = _ENDING.search(path[-16:])
    return _mark("path", path) + (ending[0] if ending else "")


def _public_address(found: re.Match[str]) -> str:
    scheme, rest = found[1], found[2]
    if scheme.lower() == "file":
        return _path_mark(found[0])
    place, _, _ = rest.partition("?")[0].partition("#")
    host, slash, path = place.partition("/")
    user, at, host = host.rpartition("@")
    secret = f"?{SECRET}" if len(place) < len(rest) else ""
    return f"{scheme}://{SECRET if user else ''}{at}{host}{slash}{path}{secret}"


def _quoted_path(quoted: str) -> str:
    """Replace what is quoted if it is a path, spaces and all."""
    inner = quoted[1:-1]
    relative = re.search(r"[\\/]", inner) and _ENDING.search(inner[-16:]) and "://" not in inner
    if relative or inner.startswith("file:") or (inner and _WHOLE_PATH.fullmatch(inner)):
        return f"{quoted[0]}{_path_mark(inner)}{quoted[-1]}"
    return quoted


def _public_path(found: re.Match[str]) -> str:
    """
    Replace a path that stands in a text without quotes.

    It may have spaces in it: it goes on to the last word that looks like a part of it.
    """
    words = found[0].split(" ")
    signs = any if found["sure"] else all
    last = max(
        place
        for place, word in enumerate(words)
        if place == 0 or signs((re.search(r"[\\/]", word), _ENDING.search(word[-16:])))
    )
    path = " ".join(words[: last + 1]).rstrip(".")
    rest = found[0][len(path) :]
    parts = re.split(r"[\\/]", path)
    if found["sure"] or "\\" in path or len(parts) > 2 or _ENDING.search(path[-16:]):  # noqa: PLR2004 - a hub's id has two parts
        return _path_mark(path) + rest
    return found[0]


def _leading_name(text: str) -> str:
    """Return what a ``repr`` begins with: the class, and nothing of what it holds."""
    name = re.match(r"<?((?:bound method |function |built-in method )?[\w.]{1,80})", text)
    return name[1] if name else "?"
