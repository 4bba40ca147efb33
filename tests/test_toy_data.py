"""The synthetic data set: VOC layout, valid masks, determinism, and care with existing folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scripts.toy_data.shapes import CLASS_NAMES
from scripts.toy_data.tree import make_toy_voc
from utils.errors import UserError
from utils.pictures import voc_palette

SCRIPT = Path(__file__).parents[1] / "scripts" / "make_toy_voc.py"
TRAIN, VAL, SIZE = 40, 20, (64, 48)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("toy") / "voc"
    make_toy_voc(out, TRAIN, VAL, SIZE, seed=1)
    return out


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def lines(root: Path, name: str) -> list[str]:
    return (root / "ImageSets" / "Segmentation" / f"{name}.txt").read_text().splitlines()


def ids_of(path: Path) -> set[int]:
    return set(np.unique(np.asarray(Image.open(path))).tolist())


def test_layout(made: Path) -> None:
    train, val = lines(made, "train_aug"), lines(made, "val")
    assert (len(train), len(set(val))) == (TRAIN, VAL)
    assert train[3] == "/JPEGImages/toy_000003.jpg /SegmentationClassAug/toy_000003.png"
    assert val[0] == f"toy_{TRAIN:06d}"
    pairs = [tuple(made / part[1:] for part in line.split()) for line in train]
    pairs += [(made / f"JPEGImages/{v}.jpg", made / f"SegmentationClass/{v}.png") for v in val]
    for image_path, mask_path in pairs:
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", SIZE)
            assert (mask.format, mask.mode, mask.size) == ("PNG", "P", SIZE)
            assert mask.getpalette() == voc_palette()
    count = {
        folder.name: len(list(folder.iterdir())) for folder in made.iterdir() if folder.is_dir()
    }
    assert count["JPEGImages"] == TRAIN + VAL
    assert (count["SegmentationClassAug"], count["SegmentationClass"]) == (TRAIN, VAL)
    assert not list(made.parent.glob(".*")), "the temporary folder is gone"


def test_classes(made: Path) -> None:
    assert json.loads((made / "class_names.json").read_text()) == CLASS_NAMES
    assert CLASS_NAMES[0] == "background"
    assert len(set(CLASS_NAMES)) == 21
    for folder in ("SegmentationClassAug", "SegmentationClass"):
        present = set().union(*(ids_of(path) for path in (made / folder).iterdir()))
        assert present == {*range(21), 255}


def test_void_parts_every_object_from_its_surroundings(made: Path) -> None:
    for path in (made / "SegmentationClassAug").iterdir():
        mask = np.asarray(Image.open(path)).astype(int)
        for a, b in ((mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1])):
            assert np.all((a == b) | (a == 255) | (b == 255)), path.name


def test_each_image_shows_the_class_it_was_made_for(made: Path) -> None:
    for index in range(TRAIN):
        mask = np.asarray(Image.open(made / f"SegmentationClassAug/toy_{index:06d}.png"))
        assert np.mean(mask == index % 20 + 1) > 0.01, index


def test_seed_decides_everything(made: Path, tmp_path: Path) -> None:
    make_toy_voc(tmp_path / "same", TRAIN, VAL, SIZE, seed=1)
    assert contents(tmp_path / "same") == contents(made)
    make_toy_voc(tmp_path / "more", 3, 2, SIZE, seed=1)
    make_toy_voc(tmp_path / "other", 3, 2, SIZE, seed=2)
    more, other = contents(tmp_path / "more"), contents(tmp_path / "other")
    first = "JPEGImages/toy_000000.jpg"
    assert more[first] == contents(made)[first], "an image does not depend on how many there are"
    assert more.keys() == other.keys()
    assert not any(more[name] == other[name] for name in more if name.endswith(("jpg", "png")))


def test_second_call_does_nothing(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    make_toy_voc(made, TRAIN, VAL, SIZE, seed=1)
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().out


def test_other_content_is_refused_and_kept(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="other parameters"):
        make_toy_voc(made, TRAIN, VAL, SIZE, seed=2)
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(UserError, match="not a folder made by this script"):
        make_toy_voc(tmp_path, 2, 1, SIZE, seed=1)
    with pytest.raises(UserError, match="not a folder made by this script"):
        make_toy_voc(tmp_path / "letter.txt", 2, 1, SIZE, seed=1)
    assert contents(tmp_path) == {"letter.txt": b"dear reader"}


def test_bad_numbers(tmp_path: Path) -> None:
    for train, val, size in ((0, 1, SIZE), (1, -1, SIZE), (1, 1, (64, 8))):
        with pytest.raises(UserError, match="must be at least"):
            make_toy_voc(tmp_path / "voc", train, val, size, seed=1)
    assert not list(tmp_path.iterdir())


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", "new/voc", "--train", "2", "--val", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "new/voc/JPEGImages/toy_000002.jpg") as image:
        assert image.size == (128, 96)
    bad = subprocess.run([*command, "--size", "big"], capture_output=True, text=True)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1
    assert "WIDTHxHEIGHT" in bad.stderr
