"""The timeline drawn as one SVG."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import drawsvg

from holdfast.engine.logbook.axis import Axis
from holdfast.engine.logbook.sentences import seconds, size
from holdfast.engine.logbook.timeline import TooMuch
from holdfast.engine.logbook.writing import printable
from holdfast.states import Mode, State

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from holdfast.engine.logbook.timeline import Bar, Lanes

LABELS, PLOT, ROW, BAR, INSTANT, MEMORY, AXIS = 150, 1200, 24, 18, 2, 64, 22
_MANY, _THINNEST = 10, 2.0
"""Rows of a lane from which on they share the height of so many, and what each has at least."""
LETTER, MARGIN = 6, 5
"""Pixels that a label takes: for each letter, and on either side."""
_BASELINE = 13
_MODES = "".join(
    f".{mode} rect {{ fill: var(--{colour}); stroke: var(--{colour}); }}\n"
    f"svg.log .{mode} text {{ fill: #fff; }}\n"
    for mode, colour in zip(Mode, cycle("abc"), strict=False)
)
_TICKS, _FINE, _LAST_LABEL, _APART, _MARK = 10, 5, 0.97, 0.06, 6
# Colours by meaning, told apart by lightness too; the dark ones for a reader whose system is dark.
_STYLE = """
svg.log { --ink: #1b1f24; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --dim: #d1d5db;
  --a: #3b74c9; --b: #16877a; --c: #8a4fb8; --busy: #d9820f; --bad: #c62f3b; --held: #cfe0f5;
  --wait: #e7dcf5; font: 12px system-ui, sans-serif; background: var(--paper); }
@media (prefers-color-scheme: dark) { svg.log { --ink: #e6e8eb; --soft: #9aa3af; --line: #2b3038;
  --paper: #15181d; --dim: #3d434c; --a: #4f8be0; --b: #28a394; --c: #a774d0; --busy: #e09a3a;
  --bad: #ef6a72; --held: #24364f; --wait: #3a2f52; } }
svg.log text { fill: var(--ink); } svg.log .soft { fill: var(--soft); }
svg.log .engine { font-weight: 600; }
svg.log .tick { fill: var(--line); } svg.log .fine { visibility: hidden; }
svg.log.near .fine { visibility: visible; }
svg.log .edge { fill: var(--paper); }
.bar rect { fill: var(--dim); stroke: var(--dim); stroke-width: 1; }
.step rect, .told rect { fill: var(--soft); stroke: none; } .bar { cursor: default; }
.bar text { pointer-events: none; }
.held rect { fill: var(--held); stroke: var(--held); }
.waiting rect { fill: var(--wait); stroke: var(--wait); }
.request rect { fill: none; stroke: var(--soft); }
.work rect, .recompiling rect { fill: var(--busy); stroke: var(--busy); }
.error rect, .failed rect { fill: var(--bad); stroke: var(--bad); }
.warning rect, .cancelled rect { fill: var(--paper); stroke: var(--bad); stroke-dasharray: 3 2; }
.cut rect { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 6 3; }
svg.log .failed text { fill: #fff; }
svg.log .work text, svg.log .recompiling text { fill: #1b1f24; }
svg.log .tight { visibility: hidden; }
.fold rect { fill: var(--line); stroke: none; }
.sample rect { fill: transparent; stroke: none; }
.memory { fill: var(--held); stroke: var(--a); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
"""


_LEGEND = {
    **{mode.value: mode.value for mode in Mode}, "work": "read, compiled, converted, imported",
    "held": "held", "waiting": "waits", "request": "request or job", "told": "event",
    "error": "failed", "warning": "cancelled, or a warning",
    "held cut": "cut off by the log's end", "fold": "idle, folded",
}  # fmt: skip


def legend() -> str:
    """Say in HTML what each colour of `svg` stands for."""
    return "".join(
        f'<li><svg class="log"><g class="{"" if style == "fold" else "bar "}{style}">'
        f'<rect x="1" y="1" width="20" height="10" rx="2"/></g></svg>{words}</li>'
        for style, words in _LEGEND.items()
    )


def svg(engines: Sequence[Lanes], limit: int = 10_000) -> str:
    """
    Draw a log as one SVG, 1350 pixels wide: light or dark as the reader's system is.

    Raises:
        TooMuch: There are more than `limit` bars even without the steps, or nothing at all.
    """
    count = sum(len(bars) for each in engines for bars in each.bars.values())
    steps = sum(len(each.bars["steps"]) for each in engines)
    if not count:
        raise TooMuch("there is nothing to draw: no event was left")
    if count - steps > limit:
        what = f"{count - steps} bars are more than the {limit} that a page can show"
        raise TooMuch(f"{what}; choose with --request, --engine or --since")
    rows = _Rows(engines, with_steps=count <= limit)
    return rows.draw()


class _Nested(drawsvg.DrawingParentElement):  # type: ignore[misc] # drawsvg publishes no types
    """An ``svg`` inside the drawing: percentages in it are shares of its width, however wide."""

    TAG_NAME = "svg"


class _Rows:
    def __init__(self, engines: Sequence[Lanes], *, with_steps: bool) -> None:
        self._engines = engines
        self._with_steps = with_steps
        self._y = 0.0
        self._plot = _Nested(x=LABELS, y=0, width=PLOT, class_="plot", overflow="hidden")
        self._labels = drawsvg.Group(class_="labels")

    def draw(self) -> str:
        for lanes in self._engines:
            self._lanes(lanes)
        height = self._y + 8
        whole = drawsvg.Drawing(LABELS + PLOT, height, class_="log", role="img")
        whole.append_css(_STYLE + _MODES)
        self._plot.args["height"] = height
        whole.append(self._plot)
        self._labels.children.insert(0, drawsvg.Rectangle(0, 0, LABELS, height, class_="edge"))
        whole.append(self._labels)
        return str(whole.as_svg())

    def _lanes(self, lanes: Lanes) -> None:
        axis = Axis([bar for row in lanes.bars.values() for bar in row])
        top, first = self._y, len(self._plot.children)
        self._label(lanes.engine_id, "engine")
        self._y += ROW
        self._label(f"{axis.begin:%Y-%m-%d %H:%M:%S}", "soft")
        self._y += ROW
        for name, rows in lanes.lanes():
            if name == "steps" and not self._with_steps:
                continue
            self._label(name, "soft")
            room = ROW if len(rows) <= _MANY else max(_MANY * ROW / len(rows), _THINNEST)
            for bars in rows:
                for bar in bars:
                    self._plot.append(self._bar(bar, axis, room))
                self._y += room
        if lanes.memory:
            self._memory(lanes, axis)
        behind = [*_folds(axis, top + ROW, self._y), *_ticks(axis, top + ROW, self._y)]
        self._plot.children[first:first] = behind
        self._y += ROW / 2

    def _label(self, name: str, style: str) -> None:
        short = printable(name)
        short = short if len(short) <= _LABEL_CHARS else f"{short[: _LABEL_CHARS - 1]}…"
        self._labels.append(drawsvg.Text(short, 12, x=8, y=self._y + _BASELINE, class_=style))

    def _bar(self, bar: Bar, axis: Axis, room: float) -> drawsvg.Group:
        left, height = f"{axis.share(bar.begin):.4%}", BAR * room / ROW
        group = drawsvg.Group(class_=f"bar {_classes(bar.kind)}", data_line=bar.line)
        group.append_title(bar.details)
        if bar.end == bar.begin:
            group.append(drawsvg.Rectangle(left, self._y, INSTANT, height))
            return group
        share = axis.share(bar.end) - axis.share(bar.begin)
        group.append(
            drawsvg.Rectangle(left, self._y, f"{share:.4%}", height, rx=min(2, height / 4))
        )
        if room == ROW:
            tight = "tight" if share * PLOT < LETTER * len(bar.label) + 2 * MARGIN else ""
            y = self._y + _BASELINE
            group.append(drawsvg.Text(bar.label, 11, x=left, y=y, dx=MARGIN, class_=tight))
        return group

    def _memory(self, lanes: Lanes, axis: Axis) -> None:
        most = max(rss for _, rss in lanes.memory)
        self._label("memory", "soft")
        top = drawsvg.Text(size(most), 11, x=8, y=self._y + 2 * _BASELINE, class_="soft")
        self._labels.append(top)
        bars = (bar.end for row in lanes.bars.values() for bar in row)
        ended = max(bars, default=lanes.memory[-1][0])
        begun = [axis.share(at) for at, _ in lanes.memory]
        path = drawsvg.Path(class_="memory").M(begun[0] * 1000, 100)
        area = _Nested(
            x=0, y=self._y, width="100%", height=MEMORY, viewBox="0 0 1000 100",
            preserveAspectRatio="none",
        )  # fmt: skip
        area.append(path)
        self._plot.append(area)
        until = [*begun[1:], max(axis.share(ended), begun[-1])]
        for (at, rss), left, right in zip(lanes.memory, begun, until, strict=True):
            level = 98 - 96 * rss / most
            path.L(left * 1000, level).L(right * 1000, level)
            sample = drawsvg.Group(class_="bar sample")
            sample.append_title(f"memory {size(rss)}\n{at:%H:%M:%S.%f}")
            wide = f"{max(right - left, 0):.4%}"
            sample.append(drawsvg.Rectangle(f"{left:.4%}", self._y, wide, MEMORY))
            self._plot.append(sample)
        path.L(until[-1] * 1000, 100).Z()
        self._y += MEMORY


def _ticks(axis: Axis, top: float, bottom: float) -> Iterator[drawsvg.DrawingElement]:
    """Draw round moments, in seconds since the engine's first event, behind its lanes."""
    free = 0.0
    for at, share, is_large in axis.ticks(_TICKS, _FINE):
        style = "" if is_large else " fine"
        begin = top + ROW - _MARK
        yield drawsvg.Rectangle(f"{share:.4%}", begin, 1, bottom - begin, class_=f"tick{style}")
        if is_large and free <= share < _LAST_LABEL:
            free = share + _APART
            label = drawsvg.Text(seconds(at), 11, x=f"{share:.4%}", y=top + _BASELINE, dx=3)
            label.args["class"] = "soft"
            yield label


def _folds(axis: Axis, top: float, bottom: float) -> Iterator[drawsvg.DrawingElement]:
    """Mark each idle stretch that is folded, with how long it was."""
    for piece in axis.pieces:
        if piece.is_fold:
            fold = drawsvg.Group(class_="bar fold")
            fold.append_title(f"idle for {seconds(piece.end - piece.begin)}, folded")
            wide = f"{piece.right - piece.left:.4%}"
            fold.append(drawsvg.Rectangle(f"{piece.left:.4%}", top, wide, bottom - top))
            yield fold


_LABEL_CHARS = 20
_STATE_CLASSES = {
    **{name: mode.value for mode in Mode for name in (mode.value, State.compiled(mode).value)},
    **{State.recompiling(mode).value: "recompiling" for mode in Mode},
}


def _classes(kind: str) -> str:
    """Return the style classes of a bar: only names from here, nothing that a log says."""
    prefix, _, ending = kind.partition(" ")
    known = ("held", "waiting", "request", "step", "told", "error", "warning")
    own = _STATE_CLASSES.get(prefix, prefix if prefix in known else "")
    if prefix.startswith(("component.", "export", "imports", "download")):
        own = "work"
    return f"{own} {ending if ending in ('failed', 'cancelled', 'cut') else ''}".strip()
