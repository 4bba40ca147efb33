"""Which files of a folder are images, and the pixels that a network sees of one."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from base import image_files
from base.image_files import FORMATS, decode, exif_orientation, list_folder, to_rgb
from data_loader.saliency import SaliencyMaps
from data_loader.voc import VOC
from scripts.predicting.images import FORMATS as MORE_FORMATS
from tests.trees import write_voc
from utils.errors import UserError

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 8, 3), dtype=np.uint8)
# Orientation → what viewers make of the stored pixels [H, W, …]
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def pixels(path: Path) -> np.ndarray:
    image = to_rgb(decode(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def refused(path: Path) -> tuple[str, str]:
    """The kind of a fault and its sentence."""
    with pytest.raises(UserError) as caught:
        to_rgb(decode(path))
    return caught.value.kind, str(caught.value)


def png(pixels: np.ndarray, colour: int) -> bytes:
    """A PNG of 16 bits with the colour type 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --------------------------------------------------------------------------------- 8 bits, as ever
# Modes that the formats can hold. Pillow 10.1 cannot read its own TIFF of YCbCr.
HOLDS = {
    "JPEG": ("RGB", "L", "CMYK", "YCbCr"),
    "PNG": ("RGB", "L", "1", "P", "RGBA", "LA"),
    "BMP": ("RGB", "L", "1", "P"),
    "GIF": ("RGB", "L", "1", "P", "RGBA", "LA"),
    "TIFF": ("RGB", "L", "1", "P", "RGBA", "LA", "CMYK"),
    "WEBP": ("RGB", "L", "P", "RGBA"),
}


@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind, modes in HOLDS.items() for mode in modes]
)
def test_pixels_of_8_bits_are_what_pillow_makes_of_them(tmp_path, kind, mode):
    image = Image.fromarray(COLOURS).convert(mode)
    image.save(tmp_path / "a", kind)
    plain = Image.open(tmp_path / "a").convert("RGB")
    assert np.array_equal(pixels(tmp_path / "a"), plain)


def test_rgb_is_handed_on_without_a_copy(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    picture = decode(tmp_path / "a.png")
    assert to_rgb(picture) is picture.image
    assert np.array_equal(picture.image, COLOURS)


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 250, 25))], ids=["index", "table"])
def test_transparency_is_left_out_without_a_warning(tmp_path, transparency):
    image = Image.fromarray(COLOURS).quantize(10)
    image.save(tmp_path / "a.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(pixels(tmp_path / "a.png"), image.convert("RGB"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_frames_the_first_is_read(tmp_path, kind):
    frames = [Image.new("RGB", (8, 5), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "a", kind, save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a") == 255).all()


# ------------------------------------------------------------------------------------- orientation
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_read_upright(tmp_path, kind, orientation):
    lossless = {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(COLOURS)
    image.save(tmp_path / "stored", kind, **lossless)
    image.save(tmp_path / "a", kind, exif=exif(orientation), **lossless)
    stored = np.asarray(Image.open(tmp_path / "stored").convert("RGB"))
    assert np.array_equal(pixels(tmp_path / "a"), TURNS[orientation](stored))
    picture = decode(tmp_path / "a")
    assert (picture.orientation, picture.swapped) == (orientation, orientation > 4)


@pytest.mark.parametrize("mode", ["I;16", "L", "P", "1"])
def test_every_mode_is_turned(tmp_path, mode):
    grey = RNG.integers(0, 60000, (5, 8)).astype(np.uint16)
    image = Image.fromarray(grey if mode == "I;16" else (grey >> 8).astype(np.uint8)).convert(mode)
    image.save(tmp_path / "a.png", exif=exif(6))
    turned = decode(tmp_path / "a.png").image
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(("kind", "form"), [(1, "B"), (3, "H"), (4, "I")])
def test_orientations_in_either_byte_order_and_any_width(order, kind, form):
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    other = struct.pack(f"{order}HHII", 0x0100, 4, 1, 99)
    value = struct.pack(f"{order}{form}", 6).ljust(4, b"\0")
    tags = other + struct.pack(f"{order}HHI", 0x0112, kind, 1) + value
    data = mark + struct.pack(f"{order}I", 10) + b"\0\0" + struct.pack(f"{order}H", 2) + tags
    for start in (b"", b"Exif\0\0", b"Exif\0\0Exif\0\0"):
        assert exif_orientation(start + data) == 6
        for length in range(len(data)):
            assert exif_orientation(start + data[:length]) in (1, 6), "cut off"
    damaged = bytearray(data)
    for place in range(len(data)):
        for byte in (0, 255):
            damaged[place], kept = byte, data[place]
            assert 1 <= exif_orientation(bytes(damaged)) <= 8
            damaged[place] = kept


@pytest.mark.parametrize("data", [b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0nothing at all", b"no"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_none(tmp_path, kind, data):
    Image.fromarray(COLOURS).save(tmp_path / "a", kind, exif=data)
    assert decode(tmp_path / "a").orientation == 1
    assert pixels(tmp_path / "a").shape == (5, 8, 3)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_orientation_that_does_not_exist_is_none(tmp_path, orientation):
    for kind in ("JPEG", "TIFF"):
        Image.fromarray(COLOURS).save(tmp_path / "a", kind, exif=exif(orientation))
        assert (decode(tmp_path / "a").orientation, pixels(tmp_path / "a").shape) == (1, (5, 8, 3))


# -------------------------------------------------- images, masks and saliency maps of a data set
@pytest.fixture
def root(tmp_path) -> Path:
    """Two training images whose masks and maps are drawn on what viewers show."""
    root = write_voc(tmp_path / "voc", {"a": [1], "b": [2]})
    (root / "maps").mkdir()
    for name in "ab":
        image, mask, saliency = files(root, name)
        Image.fromarray(COLOURS).save(image, "PNG")
        Image.fromarray(labels()).save(mask)
        Image.fromarray(labels()).save(saliency)
    return root


def labels() -> np.ndarray:
    return (COLOURS[..., 0] % 5).astype(np.uint8)


def files(root: Path, name: str) -> tuple[Path, Path, Path]:
    return (
        root / f"JPEGImages/{name}.jpg",
        root / f"SegmentationClassAug/{name}.png",
        root / f"maps/{name}.png",
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_masks_and_maps_are_turned_alike(root, orientation):
    back = {6: 8, 8: 6}.get(orientation, orientation)
    for path in files(root, "b"):
        stored = np.ascontiguousarray(TURNS[back](np.asarray(Image.open(path))))
        Image.fromarray(stored).save(path, "PNG", exif=exif(orientation))
    raw = VOC("train", str(root))
    for index in (0, 1):
        image, mask = raw.load(index)
        assert np.array_equal(image, COLOURS)
        assert np.array_equal(mask, labels())
        saliency = SaliencyMaps(str(root / "maps")).read(raw, raw.entries[index], image.size)
        assert np.array_equal(saliency, labels() > 0)


@pytest.mark.parametrize("what", ["image", "mask"])
def test_sizes_that_would_fit_without_the_orientation_are_told(root, what):
    image, mask, _ = files(root, "b")
    path = {"image": image, "mask": mask}[what]
    Image.open(path).save(path, "PNG", exif=exif(6))
    with pytest.raises(UserError) as caught:
        VOC("train", str(root)).load(1)
    sizes = ("5×8", "8×5") if what == "image" else ("8×5", "5×8")
    assert str(caught.value) == (
        f"{root}/ImageSets/Segmentation/train_aug.txt, line 2: image {image} is {sizes[0]} pixels, "
        f"but its mask {mask} is {sizes[1]}; the {what} has the EXIF orientation 6, which is "
        "applied, and without which both would fit: where the mask was drawn on the pixels as they "
        f"are stored, delete that tag from the {what}, else make the mask anew."
    )
    assert caught.value.kind == "sizes"


# ------------------------------------------------------------------------------------------ 16 bits
EVERY = np.arange(65536, dtype=np.uint16).reshape(256, 256)


def test_grey_of_16_bits_is_scaled_and_rounded(tmp_path):
    expected = np.stack([np.round(EVERY / 257).astype(np.uint8)] * 3, axis=2)
    assert (expected[0, 128, 0], expected[0, 129, 0], expected[255, 255, 0]) == (0, 1, 255)
    big = Image.frombytes("I;16B", (256, 256), EVERY.astype(">u2").tobytes())
    for name, image in {"a.png": Image.fromarray(EVERY), "a.tif": Image.fromarray(EVERY)}.items():
        image.save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name), expected), name
    big.save(tmp_path / "big.tif")
    assert Image.open(tmp_path / "big.tif").mode == "I;16B"
    assert np.array_equal(pixels(tmp_path / "big.tif"), expected)


def test_a_png_of_16_bits_may_come_in_32(tmp_path):
    """As older versions of Pillow open it."""
    picture = image_files.Picture(Image.fromarray(EVERY.astype(np.int32)), "PNG", deep=True)
    assert np.array_equal(np.asarray(to_rgb(picture))[..., 1], np.round(EVERY / 257))


@pytest.mark.parametrize(("colour", "bands"), [(2, 3), (4, 2), (6, 4)])
def test_of_colours_of_16_bits_the_upper_8_are_kept(tmp_path, colour, bands):
    values = RNG.integers(0, 65536, (5, 8, bands)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png(values, colour))
    shown = values[..., :3] if bands > 2 else np.repeat(values[..., :1], 3, axis=2)
    assert np.array_equal(pixels(tmp_path / "a.png"), shown >> 8)


@pytest.mark.parametrize("bits", [1, 8, 10, 12])
def test_sensors_of_12_bits_are_refused(tmp_path, bits):
    values = np.full((5, 8, 4), (1 << bits) - 1, np.uint16)
    values[..., 3] = 65535
    used = max(8, bits)
    words = f"has 16 bits, but uses at most {used} of them and would be nearly black; scale it to 8"
    (tmp_path / "a.png").write_bytes(png(values[..., 0], 0))
    Image.fromarray(values[..., 0]).save(tmp_path / "a.tif")
    for name in ("a.png", "a.tif"):
        kind, sentence = refused(tmp_path / name)
        assert kind == "depth"
        assert sentence.startswith(words)
    for colour, bands in ((2, [0, 1, 2]), (4, [0, 3]), (6, [0, 1, 2, 3])):
        (tmp_path / "a.png").write_bytes(png(values[..., bands], colour))
        assert refused(tmp_path / "a.png") == (kind, sentence)


@pytest.mark.parametrize("value", [0, 4096, 20000])
def test_black_and_brighter_images_of_16_bits_are_read(tmp_path, value):
    Image.new("I;16", (8, 5), value).save(tmp_path / "a.png")
    assert (pixels(tmp_path / "a.png") == round(value / 257)).all()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.fromarray(np.full((5, 8), 0.7, np.float32)), "holds floats that do not say what is"),
        (Image.fromarray(np.full((5, 8), 70000, np.int32)), "holds integers that do not say what"),
        (Image.new("LAB", (8, 5)), "has the mode LAB, of which there is no faithful RGB; save it"),
    ],
    ids=["float", "32 bit", "LAB"],
)
def test_what_has_no_faithful_rgb_is_refused(tmp_path, image, words):
    image.save(tmp_path / "a.tif")
    kind, sentence = refused(tmp_path / "a.tif")
    assert kind == ("mode" if image.mode == "LAB" else "depth")
    assert sentence.startswith(words)


def test_signed_integers_are_refused(tmp_path):
    values = np.full((4, 8), 1000, "<i2")
    tags = [(256, 8), (257, 4), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, 4)]
    tags += [(279, values.nbytes), (339, 2)]  # signed
    directory = struct.pack("<H", len(tags))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    start = struct.pack("<2sHI", b"II", 42, 8 + values.nbytes)
    (tmp_path / "a.tif").write_bytes(start + values.tobytes() + directory + bytes(4))
    assert Image.open(tmp_path / "a.tif").mode == "I"
    assert refused(tmp_path / "a.tif")[0] == "depth"


# -------------------------------------------------------------------------------------- unreadable
def test_faults_of_a_file(tmp_path):
    assert refused(tmp_path / "none.png") == ("missing", "does not exist")
    (tmp_path / "a.png").write_text("no picture")
    kind, sentence = refused(tmp_path / "a.png")
    assert (kind, sentence[:35]) == ("damaged", "cannot be read: cannot identify ima")
    assert refused(tmp_path) == ("damaged", "cannot be read: it is no regular file")
    os.mkfifo(tmp_path / "pipe.png")
    assert refused(tmp_path / "pipe.png") == ("damaged", "cannot be read: it is no regular file")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.ppm")
    assert refused(tmp_path / "a.ppm")[0] == "damaged", "no format of a data set"
    assert decode(tmp_path / "a.ppm", MORE_FORMATS).format == "PPM"
    assert set(FORMATS) < set(MORE_FORMATS)


def test_an_image_too_large_for_the_memory_is_told_with_its_size(tmp_path, monkeypatch):
    def no_memory(*_):
        raise MemoryError

    Image.new("RGB", (8, 5)).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile.ImageFile, "load", no_memory)
    words = "of 8×5 pixels is too large for the memory; scale it down or cut it into parts"
    assert refused(tmp_path / "a.png") == ("too large", words)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_damage_anywhere_is_one_sentence(tmp_path, kind):
    """Whatever Pillow raises: a picture or a fault of a kind, and nothing else."""
    file = io.BytesIO()
    tags = {} if kind in ("GIF", "BMP") else {"exif": exif(6)}
    Image.fromarray(COLOURS).save(file, kind, **tags)
    data, kinds = file.getvalue(), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in range(0, len(data), max(1, len(data) // 40)):
            damaged = bytearray(data)
            damaged[place] ^= 0xFF
            (tmp_path / "a").write_bytes(damaged)
            try:
                assert to_rgb(decode(tmp_path / "a")).mode == "RGB"
            except UserError as fault:
                kinds.add(fault.kind)
    assert kinds <= {"damaged", "too large", "depth", "mode"}


# ---------------------------------------------------------------------------------------- folders
def test_a_folder_is_listed_by_what_its_files_are(tmp_path):
    images = ["a.JPG", "b.jpeg", "b.png", "c.Tif", "d.webp"]
    hidden = [".DS_Store", "._a.JPG", "Thumbs.db", "desktop.ini", ".hidden.png"]
    for name in (*images, *hidden, "notes.txt", "e.heic", "README"):
        (tmp_path / name).touch()
    for name in ("__MACOSX", "@eaDir", ".git", "more", "more.jpg"):
        (tmp_path / name).mkdir()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    listed = list_folder(tmp_path)
    assert listed.images == [*images, "gone.jpg"], "a link that leads nowhere is told on reading"
    assert listed.hidden == sorted([*hidden, "__MACOSX", "@eaDir", ".git"])
    assert listed.others == ["README", "e.heic", "notes.txt"]
    assert listed.folders == ["more", "more.jpg"]
    assert listed.left_out == (
        "8 hidden, 3 with an ending of no image (.heic, .txt, none), 2 in the form of folders"
    )
    assert list_folder(tmp_path / "more").left_out == ""
