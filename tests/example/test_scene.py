"""Pictures as people have them are read as a viewer shows them, or refused by name; windows."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.text_detection.batches import CodedScenes, random_crop
from examples.text_detection.errors import UserError
from examples.text_detection.grid import Grid
from examples.text_detection.scene import ILLEGIBLE, Scene, picture_size, read_picture

RAMP = np.tile(np.linspace(0, 1, 64), (48, 1))
GREYS = np.rint(RAMP * 255).astype(np.uint8)


def colours() -> np.ndarray:
    """(48, 64, 3), asymmetric in every direction."""
    return np.dstack([GREYS, GREYS[:, ::-1], np.tile(np.arange(48, dtype=np.uint8)[:, None], 64)])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture(tmp_path: Path, orientation: int) -> None:
    shown = colours()
    back = [lambda p: p, np.fliplr, lambda p: np.rot90(p, 2), np.flipud]
    # How the sensor lay: the first four keep the sides, the others change them.
    quarter = [lambda p: p.swapaxes(0, 1), lambda p: np.rot90(p, 1)]
    quarter += [lambda p: np.rot90(p, 2).swapaxes(0, 1), lambda p: np.rot90(p, 3)]
    stored = np.ascontiguousarray([*back, *quarter][orientation - 1](shown))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "a.png"), shown)
    assert picture_size(tmp_path / "a.png") == (64, 48)


def not_finite() -> np.ndarray:
    values = RAMP.copy()
    values[0, :] = np.nan
    values[1, :] = np.inf
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("values", "suffix"),
    [
        (np.rint(RAMP * 65535).astype(np.uint16), "png"),
        (np.rint(RAMP * 65535).astype(np.uint16), "tif"),
        (np.rint(RAMP * 65535).astype(np.int32), "tif"),
        (np.rint(RAMP * 1e9 - 5e8).astype(np.int32), "tif"),
        (RAMP.astype(np.float32), "tif"),
        ((255 * RAMP).astype(np.float32), "tif"),
        ((65535 * RAMP).astype(np.float32), "tif"),
        ((2e30 * RAMP - 1e30).astype(np.float32), "tif"),
        (not_finite(), "tif"),
    ],
)
def test_grey_of_more_than_8_bits_keeps_its_shades(
    tmp_path: Path, values: np.ndarray, suffix: str
) -> None:
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    read = read_picture(tmp_path / f"a.{suffix}")
    assert np.abs(read[2:] - np.repeat(GREYS[2:, :, None], 3, axis=2).astype(int)).max() <= 1


def test_a_dark_picture_of_16_bits_stays_dark(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 2570, np.uint16)).save(tmp_path / "a.png")
    assert (read_picture(tmp_path / "a.png") == 10).all()


def test_a_grey_of_one_value_is_read(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), -3.5, np.float32)).save(tmp_path / "a.tif")
    assert (read_picture(tmp_path / "a.tif") == 0).all()


def transparent(mode: str) -> Image.Image:
    """Black, opaque in the left half."""
    picture = Image.fromarray(np.zeros((48, 64), np.uint8))
    mask = Image.fromarray(
        np.where(np.arange(64) < 32, 255, 0).astype(np.uint8)[None].repeat(48, 0)
    )
    picture = picture.convert("RGB")
    picture.putalpha(mask)
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(tmp_path: Path, mode: str) -> None:
    transparent(mode).save(tmp_path / "a.png")
    read = read_picture(tmp_path / "a.png")
    assert (read[:, :32] == 0).all()
    assert (read[:, 32:] == 255).all()


def test_a_transparent_colour_is_white(tmp_path: Path) -> None:
    Image.fromarray(GREYS).save(tmp_path / "a.png", transparency=0)
    read = read_picture(tmp_path / "a.png")
    assert (read[GREYS == 0] == 255).all()
    assert (read[GREYS > 0] == GREYS[GREYS > 0][:, None]).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "off"),
    [
        ("1", "png", 128),
        ("L", "png", 0),
        ("P", "png", 0),
        ("CMYK", "tif", 1),
        ("CMYK", "jpg", 6),
        ("YCbCr", "jpg", 6),
    ],
)
def test_other_kinds_of_colour(tmp_path: Path, mode: str, suffix: str, off: int) -> None:
    picture = Image.fromarray(GREYS).convert("RGB")
    picture = picture.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE)
    picture.save(tmp_path / f"a.{suffix}")
    read = read_picture(tmp_path / f"a.{suffix}").astype(int)
    assert np.abs(read - GREYS[..., None]).max() <= off
    assert Image.open(tmp_path / f"a.{suffix}").mode in (mode, "RGB")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge(side: int) -> bytes:
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def cut_off(suffix: str, tmp_path: Path) -> bytes:
    Image.fromarray(colours()).save(tmp_path / f"whole.{suffix}")
    contents = (tmp_path / f"whole.{suffix}").read_bytes()
    return contents[: len(contents) // 2]


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp", "webp"])
def test_a_picture_that_is_cut_off_is_named(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").write_bytes(cut_off(suffix, tmp_path))
    with pytest.raises(UserError, match=rf"cannot read .*a\.{suffix}: \w"):
        read_picture(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (huge(20000), "cannot read the picture .*400000000 pixels"),
        (huge(10000), "cannot read the picture .*"),  # under the limit, but empty
        (b"no picture", "cannot read .*: it is no picture"),
        (b"", "cannot read .*: it is no picture"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_cannot_be_read_is_named(tmp_path: Path, contents: bytes, message: str) -> None:
    (tmp_path / "a.png").write_bytes(contents)
    with pytest.raises(UserError, match=message):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_the_size_is_that_of_the_picture_that_is_read(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / name, exif=exif)
    assert read_picture(tmp_path / name).shape == (64, 48, 3)
    assert picture_size(tmp_path / name) == (48, 64)
    (tmp_path / name).write_bytes(b"spoilt")
    with pytest.raises(UserError, match="cannot read"):
        picture_size(tmp_path / name)


def test_no_picture_and_a_folder_are_named(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "a.png", "there is no picture"), (tmp_path, "cannot read")):
        with pytest.raises(UserError, match=message):
            read_picture(path)


def scene(width: int, height: int, *middles: tuple[float, float]) -> Scene:
    """Words of 20 x 10 pixels; each pixel of the picture tells where it is."""
    picture = np.dstack(np.broadcast_arrays(np.arange(width) % 256, np.arange(height)[:, None], 7))
    box = np.float32([[-10, -5], [10, -5], [10, 5], [-10, 5]])
    quads = np.float32([box + middle for middle in middles]).reshape(-1, 4, 2)
    words = tuple(str(number) for number in range(len(middles)))
    return Scene(picture.astype(np.uint8), quads, words)


def test_a_window_has_the_words_in_it() -> None:
    window = scene(200, 100, (50, 50), (81, 60), (150, 50)).cropped(40, 30, 32)
    assert window.picture.shape == (32, 32, 3)
    assert window.picture[0, 0].tolist() == [40, 30, 7]
    assert window.words == ("0", "1")
    assert window.quads.mean(axis=1).tolist() == [[10, 20], [41, 30]]


def test_a_window_over_the_border_goes_on_with_it() -> None:
    window = scene(60, 40, (30, 20)).cropped(-10, -20, 80)
    assert window.picture[0, 0].tolist() == window.picture[20, 10].tolist() == [0, 0, 7]
    assert window.picture[79, 79].tolist() == window.picture[59, 69].tolist() == [59, 39, 7]
    assert window.quads.mean(axis=1).tolist() == [[40, 40]]


def test_a_word_that_the_picture_cuts_is_illegible_in_a_larger_window() -> None:
    whole = scene(60, 40, (30, 20), (55, 20))
    window = whole.cropped(0, 0, 96)
    assert window.words == ("0", ILLEGIBLE)
    grid = Grid()
    assert (grid.readable(whole.quads, 60, 40) & whole.legible).tolist() == [True, False]
    assert (grid.readable(window.quads, 96, 96) & window.legible).tolist() == [True, False]


@pytest.mark.parametrize("size", [(640, 360), (40, 30), (64, 64), (300, 20)])
def test_random_windows_reach_from_the_training_size_to_the_whole(size: tuple[int, int]) -> None:
    whole = scene(*size, (12, 8))
    random = np.random.default_rng(0)
    windows = [random_crop(whole, 64, random) for _ in range(300)]
    sides = [window.picture.shape[0] for window in windows]
    longest = max(64, min(max(size), 2 * min(size)))
    assert min(sides) >= 64
    assert max(sides) <= longest
    assert max(sides) > 0.9 * longest
    middles = [window.quads.mean(axis=1) for window in windows]
    inside = [
        len(m) and (m[0] >= 0).all() and (m[0] <= s).all()
        for m, s in zip(middles, sides, strict=True)
    ]
    assert np.mean(inside) > 0.45


def test_a_crop_depends_on_the_seed_and_the_key_alone() -> None:
    coded = CodedScenes(
        [scene(400, 300, (50, 50)), scene(400, 300, (300, 200))], Grid(16, 64, 64), 5
    )
    first, again, next_epoch = coded[1], coded[1], coded[3]
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[0], next_epoch[0])
    assert first[0].shape == (3, 64, 64)
