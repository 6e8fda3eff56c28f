"""The renderer draws what a description says, and the checker reads it back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from holdfast.engine.demo.checker import judge, overlap, read
from holdfast.engine.demo.parts import words_in
from holdfast.engine.demo.scenes import COLOURS, SHAPES, Description, describe, draw, phrase, place


def _some(count: int, *, figures: int, held_out: bool = False) -> list[Description]:
    rng = np.random.default_rng(count)
    return [describe(rng, figures=figures, held_out=held_out) for _ in range(count)]


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("figures", [1, 2])
def test_drawn_scenes_are_read_back(size: int, figures: int):
    """The checker reads at least 99 % of drawn scenes as all that was asked."""
    rng = np.random.default_rng(1)
    right = [
        all(judge(each, read(draw(place(each, rng), size))).values())
        for each in _some(100, figures=figures)
    ]
    assert np.mean(right) >= 0.99


def test_shuffled_prompts_are_read_as_wrong():
    """Against another scene's prompt each fact is right about as often as by chance."""
    rng = np.random.default_rng(2)
    described = _some(300, figures=1)
    readings = [read(draw(place(each, rng), 64)) for each in described]
    verdicts = [
        judge(asked, reading)
        for asked, reading in zip(described[1:] + described[:1], readings, strict=True)
    ]
    share = {fact: np.mean([verdict[fact] for verdict in verdicts]) for fact in verdicts[0]}
    assert share["background"] < 1 / len(COLOURS) + 0.06
    assert share["colour"] < 1 / len(COLOURS) + 0.06
    assert share["shape"] < 1 / len(SHAPES) + 0.06
    assert np.mean([all(verdict.values()) for verdict in verdicts]) < 0.02


def test_outlines_are_told_from_filled_figures():
    """Outlined scenes are read as outlined in at least 97 %, filled ones in none."""
    rng = np.random.default_rng(3)
    described = _some(100, figures=1)
    filled = [read(draw(place(each, rng), 64)) for each in described]
    bare = [read(draw(place(replace(each, outlined=True), rng), 64)) for each in described]
    assert not any(figure.outlined for reading in filled for figure in reading.figures)
    assert np.mean([all(f.outlined for f in reading.figures) for reading in bare]) >= 0.97


@pytest.mark.parametrize("size", [64, 96, 128])
def test_the_checker_sees_stripes(size: int):
    """
    Striped scenes are read as striped, plain ones never, and figures alike in both.

    Where a figure's dark rim crosses a black stripe it is not told from it.
    """
    rng = np.random.default_rng(9)
    overlaps = []
    for count in (1, 2) * 60:
        description = describe(rng, figures=count)
        scene = place(description, rng)
        plain, striped = (read(draw(replace(scene, striped=way), size)) for way in (False, True))
        assert (plain.striped, striped.striped) == (False, True)
        assert plain.background == striped.background == description.background
        overlaps.append(overlap(plain.mask, striped.mask))
    assert np.quantile(overlaps, 0.05) > 0.8
    assert np.median(overlaps) > 0.95


def test_the_same_seed_draws_the_same_scene():
    """A description, its words and its layout follow from the seed alone."""
    once, again = (np.random.default_rng(5) for _ in range(2))
    one, other = describe(once, figures=2), describe(again, figures=2)
    assert (one, phrase(one, once), place(one, once)) == (
        other,
        phrase(other, again),
        place(other, again),
    )


def test_held_out_combinations_never_train():
    """What is drawn for training holds no combination that is kept for testing."""
    seen = {(i.shape, i.colour, d.background) for d in _some(2000, figures=1) for i in d.items}
    kept = _some(100, figures=1, held_out=True)
    assert not seen & {(i.shape, i.colour, d.background) for d in kept for i in d.items}


def test_the_larger_picture_holds_finer_detail():
    """At 128 pixels an outline and a weave shade a figure that at 64 is one flat colour."""
    rng = np.random.default_rng(6)
    for described in _some(20, figures=1):
        scene = place(described, rng)
        flat = {}
        for size in (64, 128):
            picture = draw(scene, size)
            pure = (np.asarray(picture) == COLOURS[described.items[0].colour]).all(axis=-1)
            flat[size] = pure[read(picture).mask].mean()
        assert flat[64] > 0.5 > flat[128]


def test_both_sizes_show_the_same_figures():
    """A scene's figures cover the same part of the picture at every size."""
    rng = np.random.default_rng(7)
    for described in _some(20, figures=2):
        scene = place(described, rng)
        small, large = draw(scene, 64), draw(scene, 128)
        enlarged = read(small.resize(large.size)).mask
        assert overlap(enlarged, read(large).mask) > 0.93


def test_every_word_of_the_grammar_is_one_token():
    """No word that a prompt can hold falls apart in the model's tokenizer."""
    from transformers import CLIPTokenizer

    from holdfast.engine.demo import model_folder

    tokens = CLIPTokenizer.from_pretrained(model_folder() / "tokenizer")
    rng = np.random.default_rng(8)
    prompts = [phrase(each, rng) for each in _some(300, figures=2)]
    for word in words_in(prompts):
        assert len(tokens(word).input_ids) == 3, word
