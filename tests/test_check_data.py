"""The data doctor finds every kind of fault, says where and what to do, and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import BrokenExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from base import image_files
from base.base_dataset import Entry
from data_loader.voc import VOC, VOC_CLASSES
from scripts.check_data import DATA_SETS, check_tree, main
from scripts.doctor import pictures, steps
from scripts.doctor.findings import FAULTS, Finding, collect, report
from scripts.doctor.lists import read_lists
from scripts.doctor.pictures import read_pictures
from scripts.doctor.steps import incomplete, published_faults
from tests.helpers import DATA, PROJECT, ade_presence, write_config
from tests.trees import write_ade
from utils.errors import UserError
from utils.parse_config import ConfigParser

SIZE = (64, 48)  # of the toy images
TRAIN_LIST, VAL_LIST = (f"ImageSets/Segmentation/{name}.txt" for name in ("train_aug", "val"))
NOT_COMPARED = "no comparison with the published lists"
Plant = Callable[[Entry], object]


@pytest.fixture
def tree(toy_root, tmp_path) -> Path:
    """A data set that a test may damage."""
    return Path(shutil.copytree(toy_root, tmp_path / "tree"))


def traces(root: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of everything in a tree."""
    stats = ((path, path.lstat()) for path in sorted(root.rglob("*")))
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats}


def check(
    root: Path, data_set: str = "voc", config: Path | None = None, maps: Path | None = None
) -> dict[str, Finding]:
    """What is wrong → finding; the tree stays as it is."""
    before = traces(root)
    argv = ["--data_dir", str(root), *(["-c", str(config)] if config else [])]
    argv += ["--saliency_dir", str(maps)] if maps else []
    parsed = ConfigParser.from_args("train", f"configs/config_{data_set}.json", argv=argv)
    findings = check_tree(DATA_SETS[data_set], parsed, steps=config is not None)
    assert traces(root) == before
    found = {finding.what: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def edit_config(path: Path, **changes: object) -> Path:
    """Set keys of data_loader.args; a dot is written as two underscores."""
    config = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        block = config["data_loader"]["args"]
        for parent in parents:
            block = block.setdefault(parent, {})
        block[leaf] = value
    path.write_text(json.dumps(config))
    return path


def entries_of(root: Path, split: str = "train") -> list[Entry]:
    return VOC(split, str(root)).entries


# ------------------------------------------------------------------------------------- a good tree
def test_a_good_tree(toy_root, tmp_path, capsys):
    before = traces(toy_root)
    assert main(["voc", "--config", str(write_config(tmp_path / "toy.json", toy_root))]) == 0
    assert traces(toy_root) == before
    assert [path.name for path in tmp_path.iterdir()] == ["toy.json"]
    text = capsys.readouterr().out
    assert f"{toy_root}: 48 training images, 24 validation images, 20 classes" in text
    assert "task 15-5, overlap, 8 images per iteration and process:\n  step 0: " in text
    assert "the classes are the config's own" in text
    assert text.endswith("verdict: 0 errors, 0 warnings, 1 note: this tree can be trained on\n")


def test_the_environment_names_the_root(toy_root, monkeypatch, capsys):
    monkeypatch.setenv("DKD_VOC_ROOT", str(toy_root))
    assert main(["voc"]) == 0
    text = capsys.readouterr().out
    assert "48 training images instead of 10,582, 24 validation images instead of 1,449" in text
    assert "step" not in text.replace("no step uses", "")


def test_reading_in_processes_gives_the_same(toy_root, monkeypatch):
    readers = {split: VOC(split, str(toy_root)) for split in ("train", "val")}
    alone = read_pictures(readers)
    monkeypatch.setattr(pictures, "CHUNK", 9)
    assert read_pictures(readers) == alone
    assert {split: len(inspections) for split, inspections in alone.items()} == {
        "train": 48,
        "val": 24,
    }
    for split, inspections in alone.items():
        for entry, seen in zip(readers[split].entries, inspections, strict=True):
            assert set(seen.ids) == set(np.unique(np.asarray(Image.open(entry.mask)))) - {255}
            assert seen.digest == hashlib.sha256(entry.image.read_bytes()).hexdigest()


def test_a_reading_process_that_dies_is_one_sentence(toy_root, monkeypatch):
    class Broken(contextlib.ExitStack):
        def map(self, *_):
            raise BrokenExecutor

    monkeypatch.setattr(pictures, "CHUNK", 9)
    monkeypatch.setattr(pictures, "ProcessPoolExecutor", lambda *_: Broken())
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(UserError, match="died after 0 of 72 images"):
        main(["voc", "--data_dir", str(toy_root)])


def test_the_reading_processes_do_without_torch():
    code = "import sys, scripts.check_data; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


# ------------------------------------------------------------------------------- images and masks
def at(what: str, damage: Callable[[Path], object]) -> Plant:
    """Damage the file of an "image" or a "mask"."""
    return lambda entry: damage(getattr(entry, what))


def change(what: str, edit: Callable[[Image.Image], Image.Image], kind: str) -> Plant:
    """Edit and save the picture of an "image" or a "mask" as a PNG or JPEG, whatever its suffix."""
    return at(what, lambda path: edit(Image.open(path)).save(path, kind))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def inflate(path: Path) -> None:
    """Let the header of a PNG claim 60,000 × 60,000 pixels."""
    png = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + png[24:29]
    path.write_bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link(path: Path) -> None:
    """Move a file or folder of the root out of it and leave a symbolic link."""
    elsewhere = path.parents[2] / f"outside_{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def label(value: int) -> Plant:
    """Give one pixel of the mask another label id."""

    def edit(mask: Image.Image) -> Image.Image:
        mask.putpixel((0, 0), value)
        return mask

    return change("mask", edit, "PNG")


def upside_down(path: Path) -> None:
    """Store an image turned by 180 degrees, with the orientation that says so."""
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(path).transpose(Image.Transpose.ROTATE_180).save(path, "JPEG", exif=exif)


def animate(path: Path) -> None:
    """Make two frames of an image."""
    image = Image.open(path).convert("RGB")
    image.save(path, "WEBP", save_all=True, append_images=[Image.new("RGB", image.size)])


def turned(picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.ROTATE_90)


# name: what is planted, severity, what is found, words of its place, words of the advice
FILE_FAULTS: dict[str, tuple[Plant, str, str, str, str]] = {
    "no image": (
        *(at("image", Path.unlink), "error", "training image does not exist"),
        *("image {image}", "extract JPEGImages/ from VOCtrainval_11-May-2012.tar"),
    ),
    "no mask": (
        *(at("mask", Path.unlink), "error", "training mask does not exist"),
        *(
            "mask {mask}",
            "put SegmentationClassAug (the augmented masks, from the Semantic Boundaries",
        ),
    ),
    "truncated image": (
        *(at("image", cut), "error", "training image cannot be read"),
        *("image {image} cannot be read: ", "replace the file, which is damaged"),
    ),
    "truncated mask": (
        *(at("mask", cut), "error", "training mask cannot be read"),
        *("mask {mask} cannot be read: ", "replace the file, which is damaged"),
    ),
    "text": (
        *(at("mask", lambda path: path.write_text("no picture")), "error"),
        *(
            "training mask cannot be read",
            "mask {mask} cannot be read: cannot identify",
            "replace the file",
        ),
    ),
    "empty": (
        *(at("image", lambda path: path.write_bytes(b"")), "error"),
        *(
            "training image cannot be read",
            "image {image} cannot be read: cannot identify",
            "replace the file",
        ),
    ),
    "folder": (
        *(at("image", lambda path: (path.unlink(), path.mkdir())), "error"),
        *(
            "training image cannot be read",
            "image {image} cannot be read: it is no regular file",
            "replace the file",
        ),
    ),
    "pipe": (
        *(at("image", pipe), "error", "training image cannot be read"),
        *("image {image} cannot be read: it is no regular file", "replace the file"),
    ),
    "bomb": (
        *(at("mask", inflate), "error", "training mask that is too large to be read"),
        *("mask {mask} cannot be read: Image size (3600000000 pixels) exceeds limit", "scale it"),
    ),
    "colour": (
        *(change("mask", lambda mask: mask.convert("RGB"), "PNG"), "error"),
        *("training mask is no index mask", "mask {mask} has the mode RGB", "map each colour"),
    ),
    "transparent": (
        *(change("mask", lambda mask: mask.convert("RGBA"), "PNG"), "error"),
        *("training mask is no index mask", "mask {mask} has the mode RGBA", "palette or grey"),
    ),
    "16 bit mask": (
        *(change("mask", lambda mask: Image.new("I;16", SIZE, 255), "PNG"), "error"),
        *("label id out of range in a training mask", "mask {mask} holds the label id 255; valid"),
        "correct the mask",
    ),
    "JPEG mask": (
        *(change("mask", lambda mask: mask.convert("L"), "JPEG"), "error"),
        *("training mask is a JPEG", "mask {mask}", "as a PNG"),
    ),
    "id 21": (
        *(label(21), "error", "label id out of range in a training mask"),
        *(
            "mask {mask} holds the label id 21; valid are 0..20 and 255 (void)",
            "data_loader.args.class_names",
        ),
    ),
    "id 254": (
        *(label(254), "error", "label id out of range in a training mask"),
        *("mask {mask} holds the label id 254; valid are 0..20 and 255 (void)", "correct the mask"),
    ),
    "sizes": (
        *(change("image", turned, "JPEG"), "error", "training image and mask differ in size"),
        *("image {image} is 48×64 pixels, but its mask {mask} is 64×48", "EXIF orientation"),
    ),
    "link": (
        *(at("image", link), "error"),
        "training file that a symbolic link puts outside the root; it was not opened",
        *("image {image} is a link to ", "pass --follow_links"),
    ),
    "grey": (
        *(change("image", lambda image: image.convert("L"), "JPEG"), "note"),
        *("training image is greyscale", "{image}", "nothing; it becomes RGB"),
    ),
    "cmyk": (
        *(change("image", lambda image: image.convert("CMYK"), "JPEG"), "note"),
        *("training image is not RGB", "{image} has the mode CMYK", "nothing; it becomes RGB"),
    ),
    "16 bit image": (
        *(change("image", lambda image: Image.new("I;16", SIZE, 40000), "PNG"), "note"),
        *("training image with 16 bits per channel", "{image}", "65,535 becomes 0 to 255"),
    ),
    "14 bit image": (
        *(change("image", lambda image: Image.new("I;16", SIZE, 16383), "PNG"), "warning"),
        *("training image of 16 bits that uses 14 of them at most", "{image}", "scale all images"),
    ),
    "12 bit image": (
        *(change("image", lambda image: Image.new("I;16", SIZE, 4095), "PNG"), "error"),
        "training image whose depth cannot be read faithfully",
        *("image {image} has 16 bits, but uses at most 12", "4,095 for 12 bits"),
    ),
    "float image": (
        *(change("image", lambda image: Image.new("F", SIZE, 0.5), "TIFF"), "error"),
        "training image whose depth cannot be read faithfully",
        *("image {image} holds floats that do not say what is white", "nothing in the file says"),
    ),
    "LAB image": (
        *(change("image", lambda image: Image.new("LAB", SIZE), "TIFF"), "error"),
        "training image of colours that cannot be read faithfully",
        *("image {image} has the mode LAB", "as RGB of 8 bits"),
    ),
    "turned image": (
        *(at("image", lambda path: upside_down(path)), "note"),
        *("training image with an EXIF orientation", "{image} has the EXIF orientation 3"),
        "as viewers show it",
    ),
    "frames": (
        *(at("image", lambda path: animate(path)), "note"),
        *("training image of several frames", "{image}", "the first one is read"),
    ),
    "void": (
        *(change("mask", lambda mask: Image.new("L", SIZE, 255), "PNG"), "warning"),
        *("training mask with void, but without a class", "{mask}", "the label id of its class"),
    ),
    "background": (
        *(change("mask", lambda mask: Image.new("L", SIZE), "PNG"), "note"),
        *("training mask with nothing but background", "{mask}", "no step uses"),
    ),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_faulty_file(tree, fault):
    plant, severity, what, place, advice = FILE_FAULTS[fault]
    entry = entries_of(tree)[7]
    plant(entry)
    found = check(tree)
    assert set(found) == {NOT_COMPARED, what}
    finding = found[what]
    assert (finding.severity, len(finding.where)) == (severity, 1)
    expected = place.format(image=entry.image, mask=entry.mask)
    assert finding.where[0].startswith(f"{tree / TRAIN_LIST}, line 8: {expected}")
    assert advice in finding.advice


def test_a_validation_mask_comes_from_elsewhere(tree):
    entry = entries_of(tree, "val")[3]
    entry.mask.unlink()
    finding = check(tree)["validation mask does not exist"]
    assert finding.where == (f"{tree / VAL_LIST}, line 4: mask {entry.mask} does not exist.",)
    assert finding.advice.startswith("extract SegmentationClass/ from VOCtrainval")


def test_an_enormous_image(tree, monkeypatch):
    entry = entries_of(tree)[7]
    Image.new("RGB", (80, 60)).save(entry.image)
    Image.new("L", (80, 60), 3).save(entry.mask)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48)  # Pillow refuses twice as many
    finding = check(tree)["training image or mask is enormous"]
    assert (finding.severity, len(finding.where)) == ("warning", 2)
    assert finding.where[0].endswith(f"{entry.image} is 80×60")
    monkeypatch.setattr(image_files, "LARGEST_FILE", 500)
    assert "it has 1," in check(tree)["validation image cannot be read"].where[0]


def test_a_folder_that_is_a_link(tree, tmp_path):
    link(tree / "JPEGImages")
    what = "{} file that a symbolic link puts outside the root{}"
    found = check(tree)
    for word, count in (("training", 48), ("validation", 24)):
        finding = found[what.format(word, "; it was not opened")]
        assert (finding.severity, len(finding.where)) == ("error", count)
    config = edit_config(write_config(tmp_path / "toy.json", tree), follow_links=True)
    found = check(tree, config=config)
    assert {finding.severity for finding in found.values()} == {"note"}
    for word, count in (("training", 48), ("validation", 24)):
        assert len(found[what.format(word, "")].where) == count


def test_every_fault_of_a_tree_is_found(tree, capsys):
    expected = {
        NOT_COMPARED,
        "malformed line of the training list",
        "image or mask that no list names",
    }
    entries, numbers = entries_of(tree), {}
    for number, (entry, fault) in enumerate(zip(entries, FILE_FAULTS.values(), strict=False), 1):
        plant, _, what, *_ = fault
        plant(entry)
        numbers.setdefault(what, []).append(number)
    lines = (tree / TRAIN_LIST).read_text().splitlines()
    lines[30] = "one two three"
    lines[31] = f"/../{tree.name}/../../x.jpg {lines[31].split()[1]}"
    lines[32] = lines[33]
    lines[34] = "/".join(("", "JPEGImages", entries_of(tree, "val")[0].image.name)) + " "
    lines[34] += lines[34].replace("JPEGImages", "SegmentationClass").replace("jpg", "png")
    (tree / TRAIN_LIST).write_text("\n".join(lines))
    numbers |= {
        "malformed line of the training list": [31],
        "training path that leaves the root; its file was not opened": [32],
        "id that stands twice in the training list": [34],
        "training image that is a validation image, too": [35],
    }
    found = check(tree)
    assert set(found) == expected | set(numbers)
    for what, where in numbers.items():
        heads = [place.split(": ")[0] for place in found[what].where]
        assert heads == [f"{tree / TRAIN_LIST}, line {number}" for number in where]

    shown, everything = ([*args, "--data_dir", str(tree)] for args in (["voc"], ["voc", "--all"]))
    assert (main(shown), main(everything)) == (1, 1)
    short, long = capsys.readouterr().out.split("verdict: ")[:2]
    text = "error: 2 × training mask is no index mask\n    "
    assert text in short
    assert text in long
    assert len(found["image or mask that no list names"].where) == 7
    assert "    … and 2 more; --all lists them" in short
    assert "more; --all" not in long
    order = [line.split(":")[0] for line in short.splitlines() if line[:1].isalpha()]
    assert order == sorted(order, key=("error", "warning", "note").index)


def test_masks_of_background_and_void_alone_are_an_error(tree):
    """Of a split; single ones are a warning."""
    for entry in entries_of(tree, "val"):
        Image.new("L", SIZE, 255).save(entry.mask)
    entry = entries_of(tree)[3]
    Image.fromarray(np.eye(*SIZE[::-1], dtype=np.uint8) * 255).save(entry.mask)
    found = check(tree)
    finding = found["no validation mask with a class, but such with void"]
    assert (finding.severity, len(finding.where)) == ("error", 24)
    assert "write the label id of its class, such as 1; 255" in finding.advice
    finding = found["training mask with void, but without a class"]
    assert (finding.severity, finding.where) == ("warning", (f"{entry.where}: {entry.mask}",))


# ----------------------------------------------------------------------------------- saliency maps
@pytest.fixture
def maps(toy_root, tmp_path) -> Path:
    """Maps of the toy's training images, beside what a test may damage."""
    folder = tmp_path / "maps"
    folder.mkdir()
    for entry in entries_of(toy_root):
        mask = np.asarray(Image.open(entry.mask))
        Image.fromarray(np.where(mask > 0, np.uint8(255), np.uint8(0))).save(
            folder / f"{entry.id}.png"
        )
    return folder


def test_good_saliency_maps(toy_root, tmp_path, maps, capsys):
    assert set(check(toy_root, maps=maps)) == {NOT_COMPARED}
    assert main(["voc", "--data_dir", str(toy_root), "--saliency_dir", str(maps)]) == 0
    config = write_config(tmp_path / "toy.json", toy_root)
    edit_config(config, saliency_dir=str(maps))
    (maps / "toy_000000.png").unlink()
    assert main(["voc", "--config", str(config)]) == 1, "the config's key"
    assert "error: training image without a saliency map\n" in capsys.readouterr().out


def test_faulty_saliency_maps(toy_root, maps, monkeypatch):
    """All of them are told, each with its line; also when processes read them."""
    lines = {number: maps / f"{entries_of(toy_root)[number - 1].id}.png" for number in range(1, 20)}
    lines[2].unlink()
    lines[3].unlink()
    cut(lines[5])
    lines[6].write_text("no picture")
    Image.new("RGB", SIZE).save(lines[8])
    Image.new("L", SIZE[::-1], 1).save(lines[9])
    for number in (11, 12, 13):
        Image.new("1", SIZE).save(lines[number])
    expected = {
        "training image without a saliency map": (
            "error",
            [2, 3],
            "saliency map {} does not exist",
        ),
        "saliency map cannot be read": ("error", [5, 6], "saliency map {} cannot be read: "),
        "saliency map is no grey PNG": ("error", [8], "saliency map {} is a PNG of the mode RGB;"),
        "saliency map and image differ in size": ("error", [9], "image "),
        "saliency map that is 0 everywhere": ("warning", [11, 12, 13], "{}"),
    }
    for chunk in (pictures.CHUNK, 9):
        monkeypatch.setattr(pictures, "CHUNK", chunk)
        found = check(toy_root, maps=maps)
        assert set(found) == {NOT_COMPARED, *expected}
        for what, (severity, numbers, words) in expected.items():
            assert found[what].severity == severity
            for number, place in zip(numbers, found[what].where, strict=True):
                start = f"{toy_root / TRAIN_LIST}, line {number}: {words.format(lines[number])}"
                assert place.startswith(start)


def test_files_among_the_maps_that_are_of_no_image(toy_root, maps):
    (maps / "toy_000003.png").rename(maps / "toy_000003.jpg")
    for name in ("._toy_000001.png", "other.png", "notes.txt"):
        (maps / name).write_bytes((maps / "toy_000001.png").read_bytes())
    found = check(toy_root, maps=maps)
    assert set(found) == {
        NOT_COMPARED,
        "training image without a saliency map",
        "file among the saliency maps that is of no training image",
    }
    extra = found["file among the saliency maps that is of no training image"].where
    assert extra == tuple(
        f"{maps / name}" for name in ("other.png", "toy_000003.jpg", "._toy_000001.png")
    )


def test_a_damaged_image_hides_no_fault_of_its_map(tree, maps):
    entry = entries_of(tree)[7]
    entry.image.unlink()
    (maps / f"{entry.id}.png").write_text("no picture")
    found = check(tree, maps=maps)
    assert set(found) == {
        NOT_COMPARED,
        "training image does not exist",
        "saliency map cannot be read",
    }


def test_no_folder_of_saliency_maps(toy_root, tmp_path):
    found = check(toy_root, maps=tmp_path / "nowhere")
    assert set(found) == {NOT_COMPARED, "folder of saliency maps does not exist"}
    (place,) = found["folder of saliency maps does not exist"].where
    assert f"the folder {tmp_path}/nowhere does not exist; name one that holds a map" in place


# ------------------------------------------------------------------------------------------- lists
def rewrite(path: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], object]:
    def plant(root: Path) -> None:
        lines = change((root / path).read_text().splitlines())
        (root / path).write_text("".join(f"{line}\n" for line in lines))

    return plant


@pytest.mark.parametrize(
    ("plant", "what", "place", "advice"),
    [
        (
            lambda root: (root / TRAIN_LIST).unlink(),
            "training list cannot be read",
            f"list file {{root}}/{TRAIN_LIST} does not exist",
            "put it there: 10,582 lines '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png' or bare",
        ),
        (
            lambda root: (root / VAL_LIST).write_bytes(b"\xff\xfea"),
            "validation list cannot be read",
            f"list file {{root}}/{VAL_LIST} fails: ",
            "put it there: 1,449 bare ids",
        ),
        (
            rewrite(VAL_LIST, lambda lines: ["", "  "]),
            "validation list is empty",
            "{root}",
            "put it there: 1,449 bare ids",
        ),
        (
            rewrite(TRAIN_LIST, lambda lines: [*lines, lines[4]]),
            "id that stands twice in the training list",
            f"{{root}}/{TRAIN_LIST}, line 49: image toy_000004 stands in the list twice, first at ",
            "delete one of the two",
        ),
        (
            rewrite(VAL_LIST, lambda lines: [*lines, "toy_000004.jpg SegmentationClass"]),
            "validation mask cannot be read",
            f"{{root}}/{VAL_LIST}, line 25: mask {{root}}/SegmentationClass cannot be read: it ",
            "replace the file",
        ),
        (
            rewrite(TRAIN_LIST, lambda lines: [*lines, f"/{'x' * 300}.jpg a\0b"]),
            "training mask cannot be read",
            f"{{root}}/{TRAIN_LIST}, line 49: mask {{root}}/a\0b cannot be read: embedded",
            "replace the file",
        ),
    ],
    ids=["missing", "binary", "empty", "twice", "folder", "impossible"],
)
def test_a_faulty_list(tree, plant, what, place, advice):
    plant(tree)
    finding = check(tree)[what]
    assert finding.severity == "error"
    assert finding.where[0].startswith(place.format(root=tree))
    assert advice in finding.advice


def test_a_faulty_line_hides_no_other(tree):
    """The rules for the lines after it are the reader's."""
    entries = {split: entries_of(tree, split) for split in ("train", "val")}
    for path in (TRAIN_LIST, VAL_LIST):
        rewrite(path, lambda lines: ["a b c", *lines[:9], "/a.jpg", "", *lines[9:]])(tree)
    readers, findings = read_lists(VOC, tree, None, follow_links=False)
    for split, word, path in (("train", "training", TRAIN_LIST), ("val", "validation", VAL_LIST)):
        (finding,) = (f for f in findings if f.what == f"malformed line of the {word} list")
        assert finding.where == (
            f"{tree / path}, line 1: 'a b c' is neither an id nor 'IMAGE_PATH MASK_PATH'.",
            f"{tree / path}, line 11: '/a.jpg' is neither an id nor 'IMAGE_PATH MASK_PATH'.",
        )
        assert [replace(entry, where="") for entry in readers[split].entries] == [
            replace(entry, where="") for entry in entries[split]
        ]
        assert readers[split].entries[20].where.endswith("line 24")


def test_images_of_both_lists(tree):
    train, val = entries_of(tree), entries_of(tree, "val")
    shutil.copy(val[2].image, train[5].image)
    rewrite(VAL_LIST, lambda lines: [*lines, train[6].id])(tree)
    shutil.copy(train[6].mask, tree / "SegmentationClass")
    found = check(tree)
    assert set(found) == {
        NOT_COMPARED,
        "training image that is a validation image, too",
        "training image with the content of a validation image",
    }
    assert [finding.where for finding in found.values()][:2] == [
        (f"{train[6].where}: {train[6].id}, also at {tree / VAL_LIST}, line 25",),
        (f"{train[5].where}: {train[5].image} equals {val[2].where}: {val[2].image}",),
    ]


def test_files_that_no_list_names(tree):
    rewrite(TRAIN_LIST, lambda lines: lines[1:])(tree)
    (tree / "JPEGImages" / "notes.txt").touch()
    hidden = [tree / f"JPEGImages/{name}" for name in (".DS_Store", "._toy_000000.jpg")]
    for path in hidden:
        path.touch()
    found = check(tree)
    assert found["hidden file, or one of another system, beside images or masks"].where == tuple(
        map(str, hidden)
    )
    finding = found["image or mask that no list names"]
    assert finding.severity == "note"
    assert finding.where == tuple(
        f"{tree / name}"
        for name in ("JPEGImages/toy_000000.jpg", "SegmentationClassAug/toy_000000.png")
    )


# ----------------------------------------------------------------------------------- another layout
@pytest.fixture
def ade(tmp_path) -> Path:
    return write_ade(tmp_path / "ade")


def test_an_ade_tree(ade, capsys):
    found = check(ade, "ade")
    assert {finding.severity for finding in found.values()} == {"warning", "note"}
    assert found["training image is greyscale"].where == (
        f"{ade}/images/training, file 2: {ade}/images/training/ADE_training_2.jpg",
    )
    absent = found["class without a pixel in any training mask"]
    assert absent.where[0] == "4 (thing 4)"
    assert len(absent.where) == 150 - 4
    assert len(found["training image with the content of a validation image"].where) == 3
    assert main(["ade", "--data_dir", str(ade)]) == 0
    assert f"{ade}: 3 training images, 3 validation images, 150 classes" in capsys.readouterr().out


def test_what_lies_beside_the_images_of_an_ade_tree(ade):
    before = check(ade, "ade")
    folder = ade / "images/training"
    for path in [*folder.iterdir(), *(ade / "annotations/training").iterdir()]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\26\7")
    (folder / "Thumbs.db").touch()
    (folder / "ADE_training_4.heic").touch()
    (folder / "more").mkdir()
    found = check(ade, "ade")
    left_out = found.pop("file in the folder of training images that has the ending of none")
    hidden = found.pop("hidden file, or one of another system, beside images or masks")
    assert (left_out.severity, hidden.severity) == ("warning", "note")
    assert left_out.where == (f"{folder}/ADE_training_4.heic", f"{folder}/more")
    assert len(hidden.where) == 3 + 3 + 1
    assert found == before, "nothing else is said of them"


def test_faults_of_an_ade_tree(ade):
    (ade / "annotations/training/ADE_training_3.png").unlink()
    shutil.rmtree(ade / "images/validation")
    names = (ade / "objectInfo150.txt").read_text().splitlines()
    (ade / "objectInfo150.txt").write_text("\n".join(names[:100]))
    Image.new("L", (9, 6), 151).save(ade / "annotations/training/ADE_training_1.png")
    shutil.copy(ade / "annotations/training/ADE_training_2.png", ade / "annotations/training/x.png")
    found = check(ade, "ade")
    errors = {what: found[what] for what in found if found[what].severity == "error"}
    places = {
        "faulty list of class names": f"{ade}/objectInfo150.txt has 99 classes instead of 150",
        "validation list cannot be read": f"the image folder {ade}/images/validation does not",
        "training mask does not exist": f"{ade}/images/training, file 3: mask {ade}/annotations/",
        "label id out of range in a training mask": f"{ade}/images/training, file 1: ",
    }
    assert set(errors) == set(places)
    for what, finding in errors.items():
        assert finding.where[0].startswith(places[what])
        assert "ADEChallengeData2016.zip" in finding.advice or "correct the mask" in finding.advice
    extra = found["image or mask that no list names"].where
    assert extra == (f"{ade}/annotations/training/x.png",)


@pytest.mark.parametrize("file", ["objectInfo150.txt", "annotations", "images", ""])
def test_half_a_tree_is_no_crash(ade, capsys, file):
    path = ade / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(["ade", "--data_dir", str(ade)]) == 1
    text = capsys.readouterr().out
    assert "ADEChallengeData2016.zip" in text
    assert "this tree cannot be trained on yet" in text


def test_a_file_name_that_is_no_text(ade, capsys):
    name = os.fsencode(ade / "images/training") + b"/caf\xe9\n.jpg"
    shutil.copy(ade / "images/training/ADE_training_1.jpg", name)
    assert main(["ade", "--data_dir", str(ade)]) == 1
    text = capsys.readouterr().out
    assert "warning: training file whose name is no UTF-8 text\n" in text
    assert r"caf\udce9\n" in text


# ---------------------------------------------------------------------------------- published lists
@pytest.fixture
def complete(toy_root, monkeypatch) -> dict[str, dict]:
    """The toy data as if they were complete and their lists the published ones."""
    monkeypatch.setattr(VOC, "complete", {"train": 48, "val": 24})
    tables = {}
    for split in ("train", "val"):
        masks = [np.asarray(Image.open(entry.mask)) for entry in entries_of(toy_root, split)]
        table = np.stack([np.isin(np.arange(256), mask) for mask in masks])
        tables[split] = entries_of(toy_root, split), table
    lists = {}
    for step, new in enumerate(([*range(1, 16)], [*range(16, 21)])):
        for kind, ids in {"train": new, "val": new, "test": range(1, new[-1] + 1)}.items():
            entries, table = tables["train" if kind == "train" else "val"]
            names = [e.id for e, row in zip(entries, table[:, list(ids)], strict=True) if row.any()]
            digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
            lists[f"voc/overlap_15-5_{kind}_{step:02d}"] = {"count": len(names), "sha256": digest}
    monkeypatch.setattr(steps, "published_lists", lambda: lists)
    return lists


def test_the_published_lists_of_complete_data(toy_root, complete):
    complete["voc/overlap_none_train_00"] = complete["ade/x"] = {"count": 1, "sha256": ""}
    summary = "6 of 6 are equal, count and hash; of no task here: overlap_none_train_00"
    assert {what: finding.where for what, finding in check(toy_root).items()} == {
        "comparison with the published lists": (summary,)
    }


def test_lists_that_are_not_the_published_ones(toy_root, complete):
    complete["voc/overlap_15-5_train_01"]["count"] = 7
    complete["voc/overlap_15-5_test_01"]["sha256"] = "0"
    found = check(toy_root)
    assert found["comparison with the published lists"].where[0].startswith("4 of 6 are equal")
    finding = found["list is not the published one"]
    assert finding.severity == "warning"
    assert finding.where[0].startswith("overlap_15-5_test_01: 24 by the masks, 24 published")
    assert finding.where[1].startswith("overlap_15-5_train_01: ")
    assert len(finding.where) == 2


def test_no_comparison_of_own_classes_or_faulty_data(tree, complete, tmp_path):
    own = check(tree, config=write_config(tmp_path / "toy.json", tree))
    assert own[NOT_COMPARED].where == ("the classes are the config's own",)
    entries_of(tree)[7].image.unlink()
    assert check(tree)[NOT_COMPARED].where == ("there are errors",)


def test_the_true_voc_masks_give_all_published_lists():
    stored = np.load(DATA / "voc_presence.npz", allow_pickle=False)
    known, readers, presence = DATA_SETS["voc"], {}, {}
    for split in ("train", "val"):
        names = stored[f"{split}_ids"].tolist()
        readers[split] = SimpleNamespace(entries=[Entry(n, n, Path(), Path(), "") for n in names])
        presence[split] = np.zeros((len(names), 256), bool)
        presence[split][:, :21] = np.unpackbits(stored[split], axis=1)[:, :21]
        presence[split][:, 255] = stored[f"{split}255"]
    assert incomplete(known, readers) == ""
    (only,) = published_faults(known, readers, presence, VOC_CLASSES)
    assert only == ("compared", "111 of 111 are equal, count and hash")


def test_the_true_ade_masks_give_all_published_lists():
    known, readers, presence = DATA_SETS["ade"], {}, {}
    for split, (ids, table) in ade_presence().items():
        readers[split] = SimpleNamespace(entries=[Entry(n, n, Path(), Path(), "") for n in ids])
        presence[split] = table
    assert incomplete(known, readers) == ""
    (only,) = published_faults(known, readers, presence, [str(n) for n in range(151)])
    assert only == ("compared", "69 of 69 are equal, count and hash")
    del readers["train"].entries[2174]  # one of the images that hold no class of the step
    presence["train"] = np.delete(presence["train"], 2174, axis=0)
    found = list(published_faults(known, readers, presence, [str(n) for n in range(151)]))
    assert ("differs", "overlap_100-50_train_00: 20,192 by the masks, 20,210 published") in found


# -------------------------------------------------------------------------------- classes and steps
def hide(root: Path, split: str, label_id: int) -> None:
    """Take a class out of the masks of a split."""
    for entry in entries_of(root, split):
        mask = np.asarray(Image.open(entry.mask))
        Image.fromarray(np.where(mask == label_id, np.uint8(0), mask)).save(entry.mask)


def test_classes_without_a_pixel(tree):
    hide(tree, "train", 3)
    hide(tree, "val", 20)
    found = check(tree)
    for what, place in {
        "class without a pixel in any training mask": "3 (bird)",
        "class without a pixel in any validation mask": "20 (tvmonitor)",
    }.items():
        assert (found[what].severity, found[what].where) == ("warning", (place,))


# what is changed in the config, severity, what is found, where
STEP_FAULTS: dict[str, tuple[dict, str, str, list[str]]] = {
    "batch": (
        *({"train__batch_size": 41}, "error", "step with fewer training images than a batch"),
        ["step 0: 40 of 41 images", "step 1: 8 of 41 images"],
    ),
    "nothing to test": (
        {"task": {"name": "own", "steps": [[20], [1]]}},
        *("error", "step without test images", ["step 0"]),
    ),
    "nothing to validate": (
        {"task": {"name": "own", "steps": [[1], [20]]}},
        *("warning", "step without validation images", ["step 1"]),
    ),
    "held out": (
        {"val__cross_val": True, "task": {"name": "own", "steps": [[1], [20]]}},
        *("error", "step with too few training images to hold a fifth out", ["step 1"]),
    ),
    "disjoint": (
        {"task": {"name": "own", "setting": "disjoint", "steps": [[1, 4], [2]]}},
        *("warning", "class that no training image of its step shows"),
        ["step 0: 4 (green dotted heart)"],
    ),
    "published": (
        {"class_names": None, "task": {"name": "15-5"}},
        *("error", "published list of a step cannot be used"),
        ["image list {lists}/voc/overlap_15-5_train_00.npy cannot be read: "],
    ),
}


@pytest.mark.parametrize("fault", STEP_FAULTS)
def test_a_faulty_step(tree, tmp_path, fault):
    """Of 48 training images, 40 show class 1 and 8 both 2 and 4; validation images show all three.

    A published list is damaged, which only concerns the data set's own classes.
    """
    for split, masks in {"train": 40 * [[1]] + 8 * [[2, 4]], "val": 24 * [[1, 2, 4]]}.items():
        for entry, ids in zip(entries_of(tree, split), masks, strict=True):
            Image.fromarray(np.resize(np.uint8(ids), SIZE[::-1])).save(entry.mask)
    config = write_config(tmp_path / "toy.json", tree, name="own", steps=[[1], [2, 4]])
    changes, severity, what, places = STEP_FAULTS[fault]
    edit_config(config, **changes)
    lists = tmp_path / "lists"
    (lists / "voc").mkdir(parents=True)
    (lists / "voc" / "overlap_15-5_train_00.npy").write_text("damaged")
    edit_config(config, task__idxs_path=str(lists))
    finding = check(tree, config=config)[what]
    assert (finding.severity, len(finding.where)) == (severity, len(places))
    for place, start in zip(finding.where, places, strict=True):
        assert place.startswith(start.format(lists=lists))


def test_what_the_loaders_refuse_is_told(toy_root, tmp_path):
    config = write_config(tmp_path / "toy.json", toy_root)
    found = check(toy_root, config=edit_config(config, train__args__transform=False))
    finding = found["the data loader refuses"]
    assert finding.severity == "error"
    assert "data_loader.args.train.args.transform is false" in finding.where[0]


# -------------------------------------------------------------------------------------------- usage
@pytest.mark.parametrize(
    ("argv", "changes", "message"),
    [
        (["voc", "--config", "none.json"], {}, "config file none.json does not exist"),
        (["ade", "--config", "{config}"], {"class_names": None}, "task.name is '15-5'"),
        (["voc", "--config", "{config}"], {"task__name": "15-2"}, "did you mean '15-5'"),
        (["voc", "--config", "{config}"], {"class_names": ["background"]}, "has 1 names"),
        (["voc", "--config", "{config}"], {"data": 1}, "unknown key 'data_loader.args.data'"),
        (["voc", "--data_dir", ""], {}, "--data_dir: data_loader.args.data_dir is"),
    ],
)
def test_wrong_usage_is_one_sentence(toy_root, tmp_path, argv, changes, message):
    config = edit_config(write_config(tmp_path / "toy.json", toy_root), **changes)
    with pytest.raises(UserError, match=message):
        main([word.format(config=config) for word in argv])


def test_exit_codes_of_the_script(tmp_path):
    script = [sys.executable, PROJECT / "scripts/check_data.py"]
    for argv, code, words in (
        (["voc", "--data_dir", tmp_path / "none"], 1, "VOCtrainval_11-May-2012.tar"),
        (["voc", "--config", "none.json"], 2, "error: config file none.json does not exist.\n"),
        (["coco"], 2, "invalid choice: 'coco'"),
    ):
        done = subprocess.run([*script, *argv], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("data_set", DATA_SETS)
def test_every_fault_has_its_words(data_set):
    known = DATA_SETS[data_set]
    faults = [fault for fault in FAULTS if hasattr(known, "parse") or fault != "line"]
    for split in ("train", "val"):
        findings = collect(known, [(fault, "a\x1b\ud800") for fault in faults], split)
        assert len(findings) == len(faults)
        text = report(findings, most=None)
        text.encode()
        assert "{" not in text
        assert "\x1b" not in text
        assert max(map(len, text.splitlines())) <= 100
