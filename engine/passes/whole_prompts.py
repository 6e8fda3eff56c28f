"""Prompts that a text encoder reads whole and as they stand, as language models do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from holdfast.engine.errors import InvalidRequest, ModelSourceError

if TYPE_CHECKING:
    from holdfast.engine.models.model import Model
    from holdfast.engine.passes.one_pass import PassSpec
    from holdfast.engine.prompts.syntax import Moment, Span


def check_plain(spec: PassSpec, steps: tuple[Moment, ...]) -> None:
    """
    Make sure that the prompts of a pass ask for nothing that such a text encoder cannot do.

    Raises:
        InvalidRequest: A prompt has weights, parts or a schedule, or the pass has a setting that
            works on the layers or on the answers to one prompt among several.
    """
    reading = spec.reading
    for branch in (*reading.prompt.branches, reading.negative):
        said = {branch.at(moment) for moment in steps}
        spans = [span for each in said for span in each]
        if len(said) > 1 or any(span.text is None or span.weight != 1 for span in spans):
            msg = (
                "The prompt has weights, BREAK or a schedule, but this model's text encoder reads "
                "it whole, as a sentence. Say it in words, or open the engine with "
                "prompt_syntax='plain' to have it read as it stands."
            )
            raise InvalidRequest(msg)
    settings = {"clip_skip": spec.clip_skip, "guidance_rescale": spec.guidance_rescale}
    given = [name for name, value in settings.items() if value]
    if given or len(reading.prompt.branches) > 1 or reading.prompt.branches[0].share != 1:
        what = " and ".join(given) or "AND"
        msg = f"{what} cannot be used with a model of this family. Leave it out."
        raise InvalidRequest(msg)


def text_of(spans: tuple[Span, ...]) -> str:
    """Return what a plain prompt says."""
    return "".join(span.text or "" for span in spans)


def unread(text: str, model: Model) -> str:
    """
    Return the end of a prompt that no text encoder would see; empty where it is seen whole.

    Raises:
        ModelSourceError: A tokenizer cannot be read.
    """
    import tokenizers

    ends = []
    for name, limit in model.family.prompt_limits(model.token_limits).items():
        file = model.parts / name / "tokenizer.json"
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:
            msg = f"{file} cannot be read ({error}). Download or export the model again."
            raise ModelSourceError(msg) from error
        tokenizer.no_truncation()  # which a file may ask for, as it was last used
        tokenizer.no_padding()
        places = tokenizer.encode(text, add_special_tokens=False).offsets
        ends.append(text[places[limit][0] :].strip() if len(places) > limit else "")
    return max(ends, key=len, default="")
