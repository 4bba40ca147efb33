"""Pictures of label maps: the palette, overlays, legends, sheets."""

import numpy as np
import pytest
from PIL import Image

from utils.pictures import (
    GAP,
    above,
    colour,
    label_image,
    legend,
    occurring,
    overlay,
    palette_image,
    sheet,
    voc_palette,
)


def test_first_and_last_colours_of_voc():
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128)}
    known[255] = (224, 224, 192)
    assert {label: colour(label) for label in known} == known
    palette = voc_palette()
    assert len(palette) == 768
    assert palette[45:48] == [192, 128, 128]


def test_the_palette_begins_anew_after_256_ids():
    image = palette_image(np.array([[1, 257]], np.uint16)).convert("RGB")
    assert image.getpixel((0, 0)) == image.getpixel((1, 0)) == (128, 0, 0)
    assert colour(257) == (128, 0, 0)


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint8, "P"), (np.uint16, "I;16")])
def test_pixels_of_a_label_image_are_the_ids(tmp_path, dtype, mode):
    labels = np.array([[0, 7, 255], [20, np.iinfo(dtype).max, 1]], dtype)
    label_image(labels).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == mode
        assert np.array_equal(np.asarray(image), labels)


def test_an_overlay_colours_all_but_bare_pixels():
    photo = Image.new("RGB", (2, 1), (100, 100, 100))
    covered = overlay(photo, np.array([[0, 1]], np.uint8))
    assert covered.getpixel((0, 0)) == (100, 100, 100)
    assert covered.getpixel((1, 0)) == pytest.approx((117, 40, 40), abs=1)
    assert overlay(photo, np.array([[1, 1]], np.uint8), bare=1).tobytes() == photo.tobytes()


def test_a_legend_names_what_occurs():
    names = {1: "disc", 2: "star", 300: "ring"}
    maps = np.array([[0, 300]], np.uint16), np.array([[1, 255]], np.uint8)
    assert occurring(names, *maps) == {1: "disc", 300: "ring"}
    image = legend(occurring(names, *maps), 400)
    colours = {value for _, value in image.getcolors(1 << 16)}
    assert {colour(1), colour(300)} <= colours
    assert colour(2) not in colours


def test_a_legend_takes_the_room_that_it_needs():
    names = dict.fromkeys(range(1, 9), "a name of some length")
    wide, narrow = legend(names, 2000), legend(names, 10)
    assert wide.size[0] == 2000
    assert narrow.height == 8 * wide.height
    assert 10 < narrow.width < 400
    assert legend({}, 100).size == (100, 0)


def test_a_picture_stands_above_a_wider_caption():
    both = above(Image.new("RGB", (2, 3), "red"), Image.new("RGB", (5, 4), "blue"))
    assert both.size == (5, 7)
    places = [(0, 0), (4, 0), (4, 6)]
    assert [both.getpixel(place) for place in places] == [
        *((255, 0, 0), (255, 255, 255), (0, 0, 255))
    ]


def test_tiles_of_a_sheet_stand_in_rows_and_columns():
    wide, tall = Image.new("RGB", (80, 40), "red"), Image.new("RGB", (20, 40), "blue")
    image = sheet(("one", "two"), [[wide, wide], [tall, wide]], {}, side=160)
    head = 26
    assert image.size == (GAP + 2 * (160 + GAP), head + (80 + GAP) + (160 + GAP))
    assert image.getpixel((GAP, head)) == (255, 0, 0)
    second = head + 80 + GAP
    assert image.getpixel((GAP + 80, second)) == (0, 0, 255), "in the middle of its column"
    assert image.getpixel((GAP, second)) == (255, 255, 255)
    assert image.getpixel((GAP + 160 + GAP, second)) == (255, 0, 0)


def test_label_maps_in_a_sheet_are_not_blurred():
    labels = np.array([[1, 2], [2, 1]], np.uint8)
    image = sheet(("a",), [[palette_image(labels)]], {}, side=101).crop((GAP, 26, 107, 127))
    assert {value for _, value in image.getcolors()} == {colour(1), colour(2)}


def test_a_heading_too_wide_for_its_column_goes_on_below():
    tile = Image.new("RGB", (60, 60))
    short, long = (sheet((words,), [[tile]], {}, 60) for words in ("DKD", "a method, step 1"))
    assert long.height == short.height + 18
    assert long.width == short.width
