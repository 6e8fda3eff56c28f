"""A contact sheet: pictures side by side, one row for each prompt, each column with its heading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

_INK, _PAPER = (40, 44, 52), (255, 255, 255)
_GAP, _LINE = 12, 24


def contact_sheet(
    headings: Sequence[str],
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    side: int = 256,
) -> Image.Image:
    """
    Lay pictures out as a table.

    Pictures are enlarged without smoothing, so that what is seen is their own pixels.

    Args:
        headings: One for each column; a line break in it is kept.
        rows: A caption, such as the prompt, and a picture for each column.
        side: Width and height of each cell in pixels; pictures are fitted into it.

    Returns:
        An RGB picture.

    Raises:
        ValueError: A row has another number of pictures than there are headings.
    """
    head = _GAP + _LINE * max(heading.count("\n") + 1 for heading in headings)
    deep = side + _LINE + 2 * _GAP
    wide = _GAP + (side + _GAP) * len(headings)
    sheet = Image.new("RGB", (wide, head + deep * len(rows)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(17), ImageFont.load_default(15)
    for column, heading in enumerate(headings):
        pen.text((_GAP + column * (side + _GAP), _GAP), heading, _INK, bold)
    for number, (caption, pictures) in enumerate(rows):
        top = head + number * deep
        pen.text((_GAP, top + _GAP // 2), caption, _INK, plain)
        for column, (_, picture) in enumerate(zip(headings, pictures, strict=True)):
            scale = side / max(picture.size)
            size = (round(picture.width * scale), round(picture.height * scale))
            shown = picture.convert("RGB").resize(size, Image.Resampling.NEAREST)
            sheet.paste(shown, (_GAP + column * (side + _GAP), top + _LINE + _GAP // 2))
    return sheet
