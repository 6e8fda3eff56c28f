"""Where images go: checked before anything is drawn, nothing overwritten unasked, nothing lost."""

from __future__ import annotations

import itertools
import json
import string
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

import typer

from holdfast.engine.errors import InvalidRequest
from holdfast.engine.results.saving import Metadata, format_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from PIL.Image import Image

    from holdfast.engine.requests.kinds import Request
    from holdfast.engine.results.result import Result

DEFAULT = "out.png"
STDOUT = "-"


class Outputs:
    """
    The files that a command writes, one after the other.

    Args:
        pattern: A path; with ``{n}`` (the image's number, from 1) or ``{seed}`` in it one for each
            image, as in ``"{n:03}-{seed}.png"``. None: `DEFAULT`, or its next number that is free.
        force: Whether files that are there are replaced.

    Raises:
        InvalidRequest: The pattern cannot be filled in.
    """

    def __init__(self, pattern: str | None, *, force: bool = False) -> None:
        self._pattern = pattern or DEFAULT
        self._asked = pattern is not None
        self._force = force
        self._taken: set[Path] = set()
        try:
            self._pattern.format(n=1, seed=0)
            fields = {name for _, name, _, _ in string.Formatter().parse(self._pattern)}
        except (ValueError, LookupError, AttributeError) as error:
            msg = (
                f"The file name {pattern} cannot be filled in ({error}): it may hold {{n}} and "
                "{seed}, as in '{n:03}-{seed}.png'; write {{ and }} for braces."
            )
            raise InvalidRequest(msg) from error
        self._seeded = "seed" in fields

    def check(self, seeds: Iterable[int | None]) -> None:
        """
        Refuse what could not be written, before minutes are spent on what goes into it.

        Args:
            seeds: Of every image, in order; None where it is drawn by lot.

        Raises:
            InvalidRequest: A folder is not there or cannot be written to, or a file is there.
        """
        for seed in seeds:
            file = next(self._free(seed or 0))
            self._taken.add(file)
            _check_writable(file)
            known = seed is not None or not self._seeded
            if self._asked and known and not self._force and file.exists():
                msg = f"{file} is there already: add --force to replace it, or name another file."
                raise InvalidRequest(msg)
        self._taken.clear()

    def next(self, seed: int) -> Path:
        """Return where the next image goes: without force, a file that is not there."""
        file = next(each for each in self._free(seed) if self._force or not each.exists())
        self._taken.add(file)
        return file

    def _free(self, seed: int) -> Iterator[Path]:
        """Yield the names of the next image: its own, then numbered ones, that none has yet."""
        own = Path(self._pattern.format(n=len(self._taken) + 1, seed=seed)).expanduser()
        later = (own.with_stem(f"{own.stem}-{number}") for number in itertools.count(2))
        return (each for each in itertools.chain([own], later) if each not in self._taken)


def _check_writable(file: Path) -> None:
    format_of(file)
    if not file.parent.is_dir():
        msg = f"The image was to go to {file}, but there is no folder {file.parent}: make it."
        raise InvalidRequest(msg)
    if file.is_dir():
        msg = f"The image was to go to {file}, but that is a folder: name a file in it."
        raise InvalidRequest(msg)
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name[:200]):
            pass
    except OSError as error:
        msg = f"The image was to go to {file}, but nothing can be written there: {error}."
        raise InvalidRequest(msg) from error


class Leaving:
    """
    What a command leaves behind: images in files or on standard output, and a line on each.

    Args:
        output: Where images go, as `Outputs` has it; ``"-"``: standard output.
        first_pass: Where first passes go, the same way; None: nowhere.
        force: Whether files that are there are replaced.
        metadata: What images tell of how they were made, as `Result.save` has it.
        as_json: Whether lines are JSON objects.
    """

    def __init__(
        self,
        output: str | None,
        first_pass: str | None,
        *,
        force: bool,
        metadata: str,
        as_json: bool,
    ) -> None:
        if metadata not in get_args(Metadata):
            msg = f"--metadata is one of {', '.join(get_args(Metadata))}, not {metadata!r}."
            raise InvalidRequest(msg)
        self._stdout = output == STDOUT
        if self._stdout and as_json:
            msg = "The image and --json cannot both go to standard output: name a file with -o."
            raise InvalidRequest(msg)
        self._images = None if self._stdout else Outputs(output, force=force)
        self._firsts = None if first_pass is None else Outputs(first_pass, force=force)
        self._metadata = cast("Metadata", metadata)
        self._as_json = as_json

    def check(self, requests: Iterable[Request]) -> None:
        """
        Refuse what could not be written, before minutes are spent on what goes into it.

        Raises:
            InvalidRequest: A file cannot be written, or is there.
        """
        seeds = [
            None if request.seed is None else request.seed + index
            for request in requests
            for index in range(request.batch)
        ]
        if self._stdout and len(seeds) > 1:
            msg = f"{len(seeds)} images cannot go to standard output: name files with -o."
            raise InvalidRequest(msg)
        for outputs in filter(None, (self._images, self._firsts)):
            outputs.check(seeds)

    def images(self, result: Result) -> None:
        """
        Write every image of a result, and tell of it.

        Raises:
            InvalidRequest: One cannot be written; the text says where it was put instead.
        """
        for index, seed in enumerate(result.seeds):
            one = replace(
                result,
                images=(result.images[index],),
                seeds=(seed,),
                infotexts=(result.infotexts[index],),
            )
            file = None if self._images is None else self._images.next(seed)
            if file is None:
                sys.stdout.buffer.write(one.png(metadata=self._metadata))
                sys.stdout.buffer.flush()
            else:
                _save(one, file, self._metadata)
            image = one.images[0]
            self._tell(file, f"{image.width}x{image.height}, seed {seed}", image, seed=seed)

    def first_passes(self, images: Sequence[Image], seeds: Sequence[int]) -> None:
        """Write first passes as they are, and tell of them."""
        if self._firsts is not None:
            for image, seed in zip(images, seeds, strict=False):
                file = self._firsts.next(seed)
                image.save(file, format_of(file).name)
                self._tell(file, f"first pass, {image.width}x{image.height}", image)

    def _tell(self, file: Path | None, words: str, image: Image, **facts: int) -> None:
        if self._as_json:
            about = {"file": str(file), "width": image.width, "height": image.height, **facts}
            typer.echo(json.dumps(about))
        else:
            typer.echo(f"{file or 'standard output'}: {words}", err=file is None)


def _save(result: Result, file: Path, metadata: Metadata) -> None:
    """Write an image; where that fails, to a temporary folder, for it took minutes to make."""
    try:
        result.save(file, metadata=metadata)
    except InvalidRequest as error:
        rescued = Path(tempfile.mkdtemp(prefix="holdfast-")) / file.name
        result.save(rescued, metadata=metadata)
        msg = f"{error} It is at {rescued}."
        raise InvalidRequest(msg) from error
