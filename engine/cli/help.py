"""Help in two columns that fit a terminal of 80: one section for each group of options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.core import TyperCommand

if TYPE_CHECKING:
    import click

_NAMES_WIDTH = 26
"""Columns for the names of options; longer ones get a line of their own."""


class Sections(TyperCommand):
    """A command whose help shows its options under their panels' headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections, in the order in which their options are declared."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for each in self.get_params(ctx):
            if (row := each.get_help_record(ctx)) is not None:
                names, words = row
                # click shows a switch that can only be turned off as " / --no-...".
                sections.setdefault(_heading(each), []).append((names.lstrip(" /"), words))
        for heading, rows in sections.items():
            with formatter.section(heading):
                formatter.write_dl(rows, col_max=_NAMES_WIDTH)


def _heading(parameter: click.Parameter) -> str:
    if parameter.param_type_name == "argument":
        return "Arguments"
    return getattr(parameter, "rich_help_panel", None) or "Options"
