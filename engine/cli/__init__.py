"""
The command line: ``holdfast``.

It needs the extra ``cli``; everything else of Holdfast works without. Ends with 0; with 2 where
what was asked for cannot be had (options, request, model or LoRA); with 1 where it failed; with 130
where it was interrupted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_EXTRA = ("click", "rich", "typer")


def main(arguments: Sequence[str] | None = None) -> int:
    """
    Run the command line.

    Args:
        arguments: Without the command's own name. None: those of this process.

    Returns:
        The exit code.
    """
    try:
        from holdfast.engine.cli.app import run
    except ModuleNotFoundError as error:
        if error.name not in _EXTRA:
            raise
        print(  # noqa: T201 - the command's own words, before there is a library to print them
            f"holdfast: the command line needs {error.name}, which is not installed.\n"
            "Install it with: pip install 'holdfast[cli]'",
            file=sys.stderr,
        )
        return 1
    return run(arguments)
