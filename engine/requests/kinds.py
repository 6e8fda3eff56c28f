"""Every kind of request, and how one is read from JSON."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.requests.detail import Detail
from holdfast.engine.requests.hires import Hires
from holdfast.engine.requests.img2img import Img2Img
from holdfast.engine.requests.inpaint import Inpaint
from holdfast.engine.requests.txt2img import Txt2Img
from holdfast.engine.requests.values import JSON, fields_of_json, read_as, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Request = Txt2Img | Img2Img | Inpaint | Hires | Detail


KINDS: Mapping[str, type[Request]] = MappingProxyType({
    "txt2img": Txt2Img,
    "img2img": Img2Img,
    "inpaint": Inpaint,
    "hires": Hires,
    "detail": Detail,
})  # fmt: skip


def request_from_json(text: str | bytes) -> Request:
    """
    Read what a request's `to_json` wrote, of any kind, told apart by its ``kind``.

    Pictures are taken by value alone, as data URLs or in base64; no file is opened. For what
    strangers send, `request_from_untrusted_json` also bounds the cost.

    Raises:
        InvalidRequest: The text is not JSON or not a request.
    """
    fields = fields_of_json(text, "A request")
    with read_as(JSON):
        return kind_of(fields)(**fields)


def alone(request: Request, seeds: Sequence[int], index: int) -> Request:
    """Return the request of image `index` of a batch that was made with these seeds, alone."""
    changes: dict[str, Any] = {"seed": seeds[index], "batch": 1}
    if isinstance(request, Hires) and request.first_pass is not None:
        changes["first_pass"] = (request.first_pass[index],)
    return request.but(**changes)


def kind_of(fields: Mapping[str, Any]) -> type[Request]:
    """
    Return the class of the request that these fields are of.

    Raises:
        InvalidRequest: They name no kind, or one that there is not.
    """
    kind = fields.get("kind")
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind]
    msg = f"A request cannot be read: its kind is {shown(kind)}; give one of {', '.join(KINDS)}."
    raise InvalidRequest(msg)
