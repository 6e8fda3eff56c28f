from __future__ import annotations

import dataclasses

import pytest

from holdfast.states import (
    CHART,
    Chart,
    ChartError,
    HoldfastError,
    IllegalTransition,
    Mode,
    Row,
    State,
    Trigger,
)

REFUSED = {
    "a mistyped destination": (
        [*CHART.rows, Row(Trigger.UNLOAD, State.UNLOADED, "unlaoded")],
        "'unlaoded' is not a member of State; is <State.UNLOADED: 'unloaded'> meant?",
    ),
    "a mistyped source": (
        [*CHART.rows, Row(Trigger.UNLOAD, "compiled-txt2image", State.UNLOADED)],
        "'compiled-txt2image' is not a member of State; is <State.COMPILED_TXT2IMG",
    ),
    "a mistyped trigger": (
        [*CHART.rows, Row("recompil", State.COMPILED_TXT2IMG, State.RECOMPILING_TXT2IMG)],
        "'recompil' is not a member of Trigger; is <Trigger.RECOMPILE: 'recompile'> meant?",
    ),
    "a state that resembles none": (
        [*CHART.rows, Row(Trigger.UNLOAD, "zzz", State.UNLOADED)],
        "'zzz' is not a member of State",
    ),
    "the parent of the recompiles as a state": (
        [*CHART.rows, Row(Trigger.RECOMPILE, State.COMPILED_TXT2IMG, "recompiling")],
        "'recompiling' is not a member of State",
    ),
    "a row twice": (
        [*CHART.rows, CHART.rows[0]],
        f"{CHART.rows[0].trigger} from {CHART.rows[0].source} stands on 2 rows",
    ),
    "two destinations for one move": (
        [*CHART.rows, Row(Trigger.UNLOAD, State.COMPILED_TXT2IMG, State.COMPILED_IMG2IMG)],
        "unload from compiled-txt2img stands on 2 rows",
    ),
    "a state that nothing leads to": (
        [row for row in CHART.rows if row.dest is not State.COMPILED_IMG2IMG],
        "compiled-img2img is out of reach",
    ),
    "a state that nothing leads out of": (
        [row for row in CHART.rows if row.source is not State.RECOMPILING_TXT2IMG],
        "recompiling.txt2img is a trap",
    ),
    "a trigger without a row": (
        [row for row in CHART.rows if row.trigger is not Trigger.RECOMPILE_ROLLED_BACK],
        "recompile-rolled-back has no row",
    ),
    "a recompile that ends in another mode": (
        [
            *CHART.rows,
            Row(Trigger.SWITCH_IMG2IMG, State.RECOMPILING_TXT2IMG, State.COMPILED_IMG2IMG),
        ],
        "a recompile ends where it began, or unloaded",
    ),
    "a recompile that turns into that of another mode": (
        [
            *CHART.rows,
            Row(Trigger.SWITCH_IMG2IMG, State.RECOMPILING_TXT2IMG, State.RECOMPILING_IMG2IMG),
        ],
        "a recompile ends where it began, or unloaded",
    ),
    "a recompile entered from another mode": (
        [
            *CHART.rows,
            Row(Trigger.SWITCH_IMG2IMG, State.COMPILED_TXT2IMG, State.RECOMPILING_IMG2IMG),
        ],
        "recompiling.img2img would claim an origin that it does not have",
    ),
    "a recompile entered from nowhere": (
        [*CHART.rows, Row(Trigger.RECOMPILE, State.UNLOADED, State.RECOMPILING_TXT2IMG)],
        "recompiling.txt2img would claim an origin that it does not have",
    ),
    "a recompile that can only be given up": (
        [
            row
            for row in CHART.rows
            if row[1:] != (State.RECOMPILING_IMG2IMG, State.COMPILED_IMG2IMG)
        ],
        "recompiling.img2img cannot return to compiled-img2img",
    ),
    "a recompile that a trigger ends for one mode only": (
        [row for row in CHART.rows if row[:2] != (Trigger.RECOMPILED, State.RECOMPILING_IMG2IMG)],
        "recompiled ends the recompiles of some modes only",
    ),
    "a recompile whose end names a mode": (
        [*CHART.rows, Row(Trigger.LOAD_TXT2IMG, State.RECOMPILING_TXT2IMG, State.COMPILED_TXT2IMG)],
        "load-txt2img ends the recompiles of some modes only",
    ),
    "a switch that leads to another mode than it names": (
        [
            Row(Trigger.SWITCH_IMG2IMG, row.source, row.dest)
            if row.trigger is Trigger.SWITCH_TXT2IMG
            else row
            for row in CHART.rows
        ],
        "switch-img2img: compiled-img2img -> compiled-txt2img: the trigger names img2img",
    ),
}


@pytest.mark.parametrize(("rows", "fault"), REFUSED.values(), ids=REFUSED)
def test_an_untrue_chart_cannot_be_built(rows: list[Row], fault: str) -> None:
    """A chart with such a row, or without it, is refused with a text that names the fault."""
    with pytest.raises(ChartError) as refused:
        Chart(tuple(rows))
    assert fault in str(refused.value)
    assert isinstance(refused.value, ValueError)
    assert isinstance(refused.value, HoldfastError)


def test_every_fault_of_a_chart_is_told_at_once() -> None:
    """A chart with two faults is refused with both in the text."""
    rows = [row for row in CHART.rows if row.trigger is not Trigger.RECOMPILED]
    with pytest.raises(ChartError, match=r"(?s)unload from .* 2 rows.*recompiled has no row"):
        Chart((*rows, Row(Trigger.UNLOAD, State.COMPILED_TXT2IMG, State.UNLOADED)))


def test_the_chart_is_the_published_one() -> None:
    """The legal moves are those of the published lifecycle, and no other."""
    moves = {
        ("load-txt2img", "unloaded", "compiled-txt2img"),
        ("load-img2img", "unloaded", "compiled-img2img"),
        ("load-inpaint", "unloaded", "compiled-inpaint"),
        ("switch-txt2img", "compiled-img2img", "compiled-txt2img"),
        ("switch-txt2img", "compiled-inpaint", "compiled-txt2img"),
        ("switch-img2img", "compiled-txt2img", "compiled-img2img"),
        ("switch-img2img", "compiled-inpaint", "compiled-img2img"),
        ("switch-inpaint", "compiled-txt2img", "compiled-inpaint"),
        ("switch-inpaint", "compiled-img2img", "compiled-inpaint"),
        ("recompile", "compiled-txt2img", "recompiling.txt2img"),
        ("recompile", "compiled-img2img", "recompiling.img2img"),
        ("recompile", "compiled-inpaint", "recompiling.inpaint"),
        ("recompiled", "recompiling.txt2img", "compiled-txt2img"),
        ("recompiled", "recompiling.img2img", "compiled-img2img"),
        ("recompiled", "recompiling.inpaint", "compiled-inpaint"),
        ("recompile-rolled-back", "recompiling.txt2img", "compiled-txt2img"),
        ("recompile-rolled-back", "recompiling.img2img", "compiled-img2img"),
        ("recompile-rolled-back", "recompiling.inpaint", "compiled-inpaint"),
        ("recompile-abandoned", "recompiling.txt2img", "unloaded"),
        ("recompile-abandoned", "recompiling.img2img", "unloaded"),
        ("recompile-abandoned", "recompiling.inpaint", "unloaded"),
        ("unload", "recompiling.txt2img", "unloaded"),
        ("unload", "recompiling.img2img", "unloaded"),
        ("unload", "recompiling.inpaint", "unloaded"),
        ("unload", "compiled-txt2img", "unloaded"),
        ("unload", "compiled-img2img", "unloaded"),
        ("unload", "compiled-inpaint", "unloaded"),
    }
    assert set(CHART.rows) == moves
    assert len(CHART.rows) == len(moves)


@pytest.mark.parametrize("mode", Mode)
def test_a_recompile_leads_to_its_own_mode_or_to_unloaded(mode: Mode) -> None:
    """From recompiling.X the chart leads to compiled-X and to unloaded, and nowhere else."""
    state = State.recompiling(mode)
    ends = {CHART.dest(trigger, state) for trigger in CHART.legal(state)}
    assert ends == {State.compiled(mode), State.UNLOADED}


def test_no_trigger_of_a_recompile_names_a_mode() -> None:
    """Whatever is legal in one recompile is legal in every other, so firing it tells no mode."""
    assert len({CHART.legal(State.recompiling(mode)) for mode in Mode}) == 1


@pytest.mark.parametrize("mode", Mode)
def test_a_state_knows_its_mode(mode: Mode) -> None:
    """compiled-X and recompiling.X have the mode X; unloaded has none."""
    compiled, recompiling = State.compiled(mode), State.recompiling(mode)
    assert compiled.mode is recompiling.mode is mode
    assert (compiled.is_compiled, compiled.is_recompiling) == (True, False)
    assert (recompiling.is_compiled, recompiling.is_recompiling) == (False, True)
    assert State.UNLOADED.mode is None
    assert not State.UNLOADED.is_compiled
    assert not State.UNLOADED.is_recompiling


def test_the_chart_takes_the_strings_of_a_log() -> None:
    """Plain strings, as they stand in a log, are as good as members when the chart is asked."""
    assert CHART.dest("switch-img2img", "compiled-txt2img") is State.COMPILED_IMG2IMG
    assert CHART.legal("unloaded") == tuple(map(Trigger.load, Mode))


def test_what_is_on_no_row_has_no_destination() -> None:
    """Asking for the destination of an illegal move raises, naming what is possible."""
    with pytest.raises(IllegalTransition, match="Possible there: load-txt2img, load-img2img, "):
        CHART.dest("recompile", "unloaded")


def test_a_chart_cannot_be_changed() -> None:
    """A chart is frozen once it is checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        CHART.rows = ()
