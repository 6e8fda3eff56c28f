"""The timeline drawn as one SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import drawsvg

from holdfast.engine.logbook.story import seconds, size
from holdfast.engine.logbook.timeline import TooMuch
from holdfast.engine.logbook.write import printable
from holdfast.states import Mode, State

if TYPE_CHECKING:
    import datetime as dt
    from collections.abc import Iterable, Sequence

    from holdfast.engine.logbook.timeline import Bar, Lanes

LABELS, PLOT, ROW, BAR, INSTANT, MEMORY, AXIS = 150, 1200, 24, 18, 2, 64, 26
LETTER, MARGIN = 6, 5
"""Pixels that a label takes: for each letter, and on either side."""
_BASELINE = 13
_TICKS, _FINE, _LAST_LABEL = 10, 5, 0.97
# Colours by meaning, told apart by lightness too; the dark ones for a reader whose system is dark.
_STYLE = """
svg.log { --ink: #1b1f24; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --dim: #d1d5db;
  --a: #3b74c9; --b: #16877a; --busy: #d9820f; --bad: #c62f3b; --held: #cfe0f5; --wait: #e7dcf5;
  font: 12px system-ui, sans-serif; background: var(--paper); }
@media (prefers-color-scheme: dark) { svg.log { --ink: #e6e8eb; --soft: #9aa3af; --line: #2b3038;
  --paper: #15181d; --dim: #3d434c; --a: #4f8be0; --b: #28a394; --busy: #e09a3a; --bad: #ef6a72;
  --held: #24364f; --wait: #3a2f52; } }
svg.log text { fill: var(--ink); } svg.log .soft { fill: var(--soft); }
svg.log .engine { font-weight: 600; }
svg.log .tick { fill: var(--line); } svg.log .fine { visibility: hidden; }
svg.log.near .fine { visibility: visible; }
svg.log .edge { fill: var(--paper); }
.bar rect { fill: var(--dim); stroke: var(--dim); stroke-width: 1; }
.step rect, .told rect { fill: var(--soft); stroke: none; } .bar { cursor: default; }
.bar text { pointer-events: none; }
.txt2img rect { fill: var(--a); stroke: var(--a); }
.img2img rect { fill: var(--b); stroke: var(--b); }
.held rect { fill: var(--held); stroke: var(--held); }
.waiting rect { fill: var(--wait); stroke: var(--wait); }
.request rect { fill: none; stroke: var(--soft); }
.work rect, .recompiling rect { fill: var(--busy); stroke: var(--busy); }
.error rect, .failed rect { fill: var(--bad); stroke: var(--bad); }
.warning rect, .cancelled rect { fill: var(--paper); stroke: var(--bad); stroke-dasharray: 3 2; }
.cut rect { stroke: var(--bad); stroke-width: 2; stroke-dasharray: 6 3; }
svg.log .txt2img text, svg.log .img2img text, svg.log .failed text { fill: #fff; }
svg.log .work text, svg.log .recompiling text { fill: #1b1f24; }
svg.log .tight { visibility: hidden; }
.sample rect { fill: transparent; stroke: none; }
.memory { fill: var(--held); stroke: var(--a); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
"""


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
        bars = [bar for each in engines for row in each.bars.values() for bar in row]
        self._begin = min(bar.begin for bar in bars)
        end = max(bar.end for bar in bars)
        self._span = max((end - self._begin).total_seconds(), 1e-3)
        self._engines = engines
        self._with_steps = with_steps
        self._y = float(AXIS)
        self._plot = _Nested(x=LABELS, y=0, width=PLOT, class_="plot", overflow="hidden")
        self._labels = drawsvg.Group(class_="labels")

    def draw(self) -> str:
        for lanes in self._engines:
            self._lanes(lanes)
        height = self._y + 8
        whole = drawsvg.Drawing(LABELS + PLOT, height, class_="log", role="img")
        whole.append_css(_STYLE)
        for tick in self._ticks(height):
            self._plot.children.insert(0, tick)
        self._plot.args["height"] = height
        whole.append(self._plot)
        self._labels.children.insert(0, drawsvg.Rectangle(0, 0, LABELS, height, class_="edge"))
        since = drawsvg.Text(
            f"{self._begin:%Y-%m-%d %H:%M:%S}", 11, x=8, y=_BASELINE, class_="soft"
        )
        self._labels.append(since)
        whole.append(self._labels)
        return str(whole.as_svg())

    def _lanes(self, lanes: Lanes) -> None:
        self._label(lanes.engine_id, "engine")
        for name, bars in lanes.rows():
            if bars and bars[0].kind == "step" and not self._with_steps:
                continue
            self._label(name, "soft")
            for bar in bars:
                self._plot.append(self._bar(bar))
            self._y += ROW
        if lanes.memory:
            self._memory(lanes)
        self._y += ROW / 2

    def _label(self, name: str, style: str) -> None:
        short = printable(name)
        short = short if len(short) <= _LABEL_CHARS else f"{short[: _LABEL_CHARS - 1]}…"
        self._labels.append(drawsvg.Text(short, 12, x=8, y=self._y + _BASELINE, class_=style))
        if style == "engine":
            self._y += ROW

    def _bar(self, bar: Bar) -> drawsvg.Group:
        left = self._share(bar.begin)
        group = drawsvg.Group(class_=f"bar {_classes(bar.kind)}", data_line=bar.line)
        group.append_title(bar.details)
        if bar.end == bar.begin:
            group.append(drawsvg.Rectangle(left, self._y, INSTANT, BAR))
            return group
        share = (bar.end - bar.begin).total_seconds() / self._span
        width = f"{share:.4%}"
        group.append(drawsvg.Rectangle(left, self._y, width, BAR, rx=2))
        tight = "tight" if share * PLOT < LETTER * len(bar.label) + 2 * MARGIN else ""
        y = self._y + _BASELINE
        group.append(drawsvg.Text(bar.label, 11, x=left, y=y, dx=MARGIN, class_=tight))
        return group

    def _memory(self, lanes: Lanes) -> None:
        most = max(rss for _, rss in lanes.memory)
        self._label("memory", "soft")
        top = drawsvg.Text(size(most), 11, x=8, y=self._y + 2 * _BASELINE, class_="soft")
        self._labels.append(top)
        bars = (bar.end for row in lanes.bars.values() for bar in row)
        ended = max(bars, default=lanes.memory[-1][0])
        begun = [self._position(at) for at, _ in lanes.memory]
        path = drawsvg.Path(class_="memory").M(begun[0] * 1000, 100)
        area = _Nested(
            x=0, y=self._y, width="100%", height=MEMORY, viewBox="0 0 1000 100",
            preserveAspectRatio="none",
        )  # fmt: skip
        area.append(path)
        self._plot.append(area)
        until = [*begun[1:], max(self._position(ended), begun[-1])]
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

    def _ticks(self, height: float) -> Iterable[drawsvg.DrawingElement]:
        step = _nice(self._span / _TICKS) / _FINE
        for number in range(int(self._span / step) + 1):
            left = f"{number * step / self._span * 100:.4f}%"
            style = "" if number % _FINE == 0 else " fine"
            yield drawsvg.Rectangle(left, AXIS - 6, 1, height, class_=f"tick{style}")
            if number * step < _LAST_LABEL * self._span:
                label = seconds(number * step)
                yield drawsvg.Text(label, 11, x=left, y=_BASELINE, dx=3, class_=f"soft{style}")

    def _share(self, at: dt.datetime) -> str:
        return f"{self._position(at):.4%}"

    def _position(self, at: dt.datetime) -> float:
        """Return where on the plot a moment is, from 0 to 1."""
        return (at - self._begin).total_seconds() / self._span


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
    if prefix.startswith(("component.", "export")):
        own = "work"
    return f"{own} {ending if ending in ('failed', 'cancelled', 'cut') else ''}".strip()


def _nice(value: float) -> float:
    """Return the 1, 2 or 5 times a power of ten that is not below `value`."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * lead for lead in (1, 2, 5, 10) if power * lead >= value)
