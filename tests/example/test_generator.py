"""Generated scenes: the same for the same seed, boxes that hold the words."""

from __future__ import annotations

import numpy as np
import pytest

from examples.text_detection import materials
from examples.text_detection.generator import GeneratedText, Style
from examples.text_detection.grid import Grid
from examples.text_detection.scene import Scene


def same(one: Scene, other: Scene) -> bool:
    return (
        np.array_equal(one.picture, other.picture)
        and np.array_equal(one.quads, other.quads)
        and one.words == other.words
    )


def test_a_scene_follows_from_its_seed_split_and_index() -> None:
    scenes = GeneratedText(10, seed=3)
    assert same(scenes[4], GeneratedText(5, seed=3)[4])
    assert not same(scenes[4], scenes[5])
    assert not same(scenes[4], GeneratedText(10, seed=4)[4])
    assert not same(scenes[4], GeneratedText(10, seed=3, split="held-out")[4])


def test_the_splits_share_neither_words_nor_photographs() -> None:
    assert not set(materials.words("train")) & set(materials.words("held-out"))
    train = {photograph.tobytes() for photograph in materials.photographs("train")}
    assert not train & {photograph.tobytes() for photograph in materials.photographs("held-out")}


def test_boxes_hold_the_ink_and_little_else() -> None:
    """Where a word is drawn the picture differs from the same picture without it."""
    plain = Style(words=(1, 1), cut=0, blur=(0, 0), noise=(0, 0), height=(20, 40))
    bare = Style(words=(0, 0), blur=(0, 0), noise=(0, 0))
    checked = 0
    for index in range(20):
        with_word, without = (GeneratedText(20, style=style)[index] for style in (plain, bare))
        if not len(with_word.quads):
            continue
        changed = np.abs(with_word.picture.astype(int) - without.picture).max(axis=2) > 40
        y, x = np.nonzero(changed)
        if not len(x):
            continue
        low, high = with_word.quads[0].min(axis=0), with_word.quads[0].max(axis=0)
        ink_low, ink_high = np.array([x.min(), y.min()]), np.array([x.max(), y.max()]) + 1
        assert (ink_low > low - 4).all()  # a shadow reaches a little further
        assert (ink_high < high + 4).all()
        checked += 1
    assert checked > 10


def test_sizes_and_angles_keep_to_the_style() -> None:
    style = Style(height=(15, 20), rotation=0.2, perspective=0, cut=0)
    scenes = GeneratedText(10, style=style)
    quads = np.concatenate([scenes[index].quads for index in range(10)])
    assert Grid().readable(quads, 256, 256).all()
    heights = np.linalg.norm(quads[:, 3] - quads[:, 0], axis=1)
    assert ((heights > 14.9) & (heights < 20.1)).all()


def test_every_font_writes_latin_letters() -> None:
    assert len(materials.fonts()) >= 20


def test_asking_past_the_end_is_an_index_error() -> None:
    with pytest.raises(IndexError, match="scene 3 of a set of 3"):
        GeneratedText(3)[3]
