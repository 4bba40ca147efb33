"""Raw data sets and their faults; labels, transforms, sampling and determinism of the loaders."""

from __future__ import annotations

import json
import multiprocessing
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as F

from base.base_dataset import BaseDataset
from base.entry_files import label_ids
from data_loader.ade import ADE
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.dataset import IncrementalDataset, OrderedShare, Sample, ShuffledBatches
from data_loader.transforms import (
    EvalTransform,
    TrainTransform,
    random_box,
    resized_crop,
    to_tensors,
)
from data_loader.voc import VOC
from scripts.toy_data.shapes import CLASS_NAMES
from tests.helpers import PROJECT
from tests.trees import GREY, HEIGHT, WIDTH, mask_of, wide_mask, write_ade, write_voc
from utils.errors import UserError, sentence
from utils.logger import log
from utils.pictures import voc_palette
from utils.ranks import Ranks
from utils.seeds import seed_from

BILINEAR, NEAREST = F.InterpolationMode.BILINEAR, F.InterpolationMode.NEAREST
NAMES = ("background", "one", "two", "three", "four")


class QuietRanks(Ranks):
    """One of several ranks, without the others: it waits for nobody."""

    def barrier(self) -> None:
        pass


def bundle(
    data_set: type[BaseDataset],
    root: Path,
    cache: Path,
    *,
    transform: bool = True,
    masked: int | None = None,
    batch_size: int = 4,
    cross_val: bool = False,
    ranks: tuple[int, int] = (0, 1),
    workers: int = 0,
    seed: int = 1,
    class_names: Sequence[str] | None = None,
    **task: object,
) -> IncrementalDataLoader:
    """The bundle of the shipped config with these changes, set up; `task`: its task block."""
    file = PROJECT / "configs" / f"config_{data_set.name}.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    args = config["data_loader"]["args"]
    args["task"] |= {"idxs_path": str(cache), **task}
    for kind in ("train", "val", "test"):
        args[kind]["args"] |= {"transform": transform, "transform_args": {"crop_size": 32}}
        if masked is not None:
            args[kind]["args"]["masking_value"] = masked
        args[kind]["batch_size"] = batch_size if kind == "train" else 1
    args["val"]["cross_val"] = cross_val
    args |= {"data_dir": str(root), "class_names": class_names, "num_workers": workers}
    rank, world = ranks
    ranks = QuietRanks(rank, world, torch.device("cpu"))
    loaders = IncrementalDataLoader(data_set, **args, seed=seed, ranks=ranks)
    loaders.setup("train", "val", "test")
    return loaders


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.image, b.image) and torch.equal(a.label, b.label) and a.name == b.name


# --------------------------------------------------------------------------------- raw data on disk
@pytest.fixture
def voc(tmp_path) -> Path:
    """Three images; b stands on line 3 of the training list, below an empty line."""
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    lines = line.format("a") + "\n" + line.format("b") + "  \n" + line.format("c")
    return write_voc(tmp_path / "voc", {"a": [0, 1], "b": [2, 255], "c": [3, 20]}, lines)


@pytest.fixture
def ade(tmp_path) -> Path:
    return write_ade(tmp_path / "ade")


@pytest.fixture
def logged(caplog, monkeypatch) -> Callable[[], list[str]]:
    """What was logged about voids and files that are left out."""
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level("INFO", logger=log.name)
    return lambda: [line for line in caplog.messages if "left out" in line or "hold" in line]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, "does not exist"),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read"),
    "text": (lambda path: path.write_text("not a picture"), "cannot be read"),
    "truncated": (cut, "cannot be read"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("what", "file"), [("image", "JPEGImages/b.jpg"), ("mask", "SegmentationClassAug/b.png")]
)
def test_unreadable_files_are_named_with_their_line(voc, what, file, fault):
    damage, complaint = FAULTS[fault]
    raw = VOC("train", str(voc))
    damage(voc / file)
    message = rf"^{voc}/.*/train_aug.txt, line 3: {what} {voc / file} {complaint}"
    with pytest.raises(UserError, match=message):
        raw.load(1)
    for index in (0, 2):
        raw.load(index)


@pytest.mark.parametrize(
    ("mask", "complaint"),
    [
        (mask_of([2]).convert("RGB"), "mode RGB; it must be a palette PNG of 8 bits or a grey one"),
        (mask_of([0, 21]).convert("I;16"), r"label id 21; valid are 0\.\.20 and 65535 \(void\)"),
        (wide_mask([2, 255]), r"label id 255; valid are 0\.\.20 and 65535 \(void\)"),
        (mask_of([0, 1]).convert("1"), "mode 1; it must be"),
        (mask_of([0, 21, 255]), r"label id 21; valid are 0\.\.20 and 255 \(void\)"),
        (mask_of([254]), "label id 254"),
    ],
    ids=["rgb", "16 bit", "16 bit 255", "1 bit", "id 21", "id 254"],
)
def test_a_mask_that_is_none_is_named_with_its_line(voc, mask, complaint):
    path = voc / "SegmentationClass" / "b.png"
    mask.save(path)
    with pytest.raises(
        UserError, match=f"val.txt, line 2: mask {path} (has|holds) the {complaint}"
    ):
        VOC("val", str(voc)).load(1)


def test_every_wrong_id_is_met_and_no_other(voc):
    raw = VOC("val", str(voc))
    for label in range(256):
        mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
        mask[-1, -1] = label
        Image.fromarray(mask).save(raw.entries[1].mask)
        for read in (raw.load_mask, raw.load_ids):
            if label < 21 or label == 255:
                read(1)
            else:
                with pytest.raises(UserError, match=f"line 2: .* holds the label id {label};"):
                    read(1)


def test_label_ids_of_a_mask():
    generator = np.random.default_rng(0)
    for _ in range(500):
        some = generator.choice(256, generator.integers(1, 9)).astype(np.uint8)
        mask = generator.choice(some, (5, 7))
        assert label_ids(mask) == sorted(set(mask.flat), reverse=True)
    for label in range(256):
        assert label_ids(np.full((2, 3), label, np.uint8)) == [label]
    assert label_ids(np.arange(256, dtype=np.uint8)) == list(range(255, -1, -1))


def test_image_and_mask_of_other_sizes(voc):
    image, mask = voc / "JPEGImages" / "b.jpg", voc / "SegmentationClassAug" / "b.png"
    Image.new("RGB", (HEIGHT, WIDTH)).save(image)
    message = f"line 3: image {image} is 6×9 pixels, but its mask {mask} is 9×6"
    with pytest.raises(UserError, match=message):
        VOC("train", str(voc)).load(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_message_of_a_loader_is_one_sentence(voc, tmp_path, workers):
    image = voc / "JPEGImages" / "b.jpg"
    image.unlink()
    loaders = bundle(VOC, voc, tmp_path, name="joint", workers=workers)
    with pytest.raises(UserError) as error:
        list(loaders.test_loader)
    expected = f"{voc}/ImageSets/Segmentation/val.txt, line 2: image {image} does not exist."
    assert sentence(error.value) == expected


@pytest.mark.parametrize(("mode", "suffix"), [("L", "jpg"), ("CMYK", "jpg"), ("RGBA", "png")])
def test_every_image_becomes_rgb(voc, mode, suffix):
    GREY.convert("RGB").convert(mode).save(
        voc / "JPEGImages" / "b.jpg", {"jpg": "JPEG"}.get(suffix, "PNG")
    )
    image, _ = VOC("train", str(voc)).load(1)
    assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
    assert np.abs(np.asarray(image).astype(int) - np.asarray(GREY)[..., None]).max() < 12


@pytest.mark.parametrize("mode", ["P", "L"])
def test_the_index_of_a_mask_is_the_class(voc, mode):
    mask = mask_of([0, 7, 20, 255])
    if mode == "P":
        mask.putpalette(list(range(255, -1, -1)) * 3)
    mask.save(voc / "SegmentationClass" / "b.png")
    _, ids = VOC("val", str(voc)).load(1)
    assert (ids.dtype, ids.shape) == (np.uint8, (HEIGHT, WIDTH))
    assert ids.ravel()[:5].tolist() == [0, 7, 20, 255, 0]


@pytest.mark.parametrize(
    "line",
    [
        "b",
        " b\t",
        "JPEGImages/b.jpg SegmentationClassAug/b.png",
        "/JPEGImages/b.jpg\t/SegmentationClassAug/b.png ",
    ],
)
def test_lines_of_a_training_list(tmp_path, line):
    root = write_voc(tmp_path / "voc", {"a": [1], "b": [2]}, f"\n{line}\r\n\n")
    (entry,) = VOC("train", str(root)).entries
    assert (entry.id, entry.line) == ("b", "/JPEGImages/b.jpg /SegmentationClassAug/b.png")
    assert entry.image == root / "JPEGImages" / "b.jpg"
    assert entry.mask == root / "SegmentationClassAug" / "b.png"
    assert entry.where == f"{root}/ImageSets/Segmentation/train_aug.txt, line 2"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("a\n\na b c\n", "train_aug.txt, line 3: 'a b c' is neither an id nor 'IMAGE_PATH MASK_P"),
        ("/JPEGImages/a.jpg\n", "train_aug.txt, line 1: '/JPEGImages/a.jpg' is neither"),
        ("a\nb\n\na\n", "line 4: image a stands in the list twice, first at .*.txt, line 1"),
        ("a\n/JPEGImages/a.jpg /SegmentationClassAug/a.png\n", "line 2: image a .*twice"),
        ("", "the train list of the data set is empty"),
        (" \n\n", "the train list of the data set is empty"),
    ],
)
def test_faulty_training_lists(tmp_path, lines, message):
    root = write_voc(tmp_path / "voc", {"a": [1], "b": [2]}, lines)
    with pytest.raises(UserError, match=message):
        VOC("train", str(root))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [(Path.unlink, "does not exist"), (lambda path: path.write_bytes(b"\xff\xfea"), "fails: ")],
)
def test_unreadable_lists(voc, damage, complaint):
    path = voc / "ImageSets" / "Segmentation" / "val.txt"
    damage(path)
    with pytest.raises(UserError, match=f"list file {path} {complaint}"):
        VOC("val", str(voc))


@pytest.mark.parametrize(
    ("raw", "write"), [(VOC, lambda p: write_voc(p, {"a": [1]})), (ADE, write_ade)]
)
def test_the_root_is_an_argument_or_an_environment_variable(tmp_path, monkeypatch, raw, write):
    variable = f"DKD_{raw.name.upper()}_ROOT"
    first, second = write(tmp_path / "first"), write(tmp_path / "second")
    monkeypatch.setenv(variable, str(first))
    assert raw("val").root == first
    assert raw("val").load(0)
    assert raw("val", str(second)).root == second
    monkeypatch.delenv(variable)
    monkeypatch.setattr(raw, "default_root", str(second))
    assert raw("val").root == second
    monkeypatch.setenv(variable, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=rf"nowhere does not exist; .*--data_dir.*{variable}"):
        raw("val")


def test_ade_classes_and_files(ade, monkeypatch):
    unsorted = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(unsorted(path), reverse=True)))
    raw = ADE("train", str(ade))
    assert len(raw.class_names) == 151
    assert (raw.class_names[0], raw.class_names[1], raw.class_names[150]) == (
        *("background", "thing 1", "thing 150"),
    )
    assert [entry.id for entry in raw.entries] == [f"ADE_training_{k}" for k in (1, 2, 3)]
    assert [entry.line for entry in raw.entries] == [entry.id for entry in raw.entries]
    for index, entry in enumerate(raw.entries):
        assert entry.where == f"{ade}/images/training, file {index + 1}"
        image, mask = raw.load(index)
        assert (image.mode, image.size) == ("RGB", (WIDTH, HEIGHT))
        assert set(mask.flat) == {0, index + 1, 150}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("\n7  \t", "\n8  \t"), "150.txt, line 8: expected the class number 7"),
        (
            lambda t: t.replace("\t1\tthing 9,", " 1 thing 9,"),
            "line 10: expected the class number 9",
        ),
        (lambda t: t.replace("\n4  \t", "\nfour\t"), "line 5: expected the class number 4"),
    ],
    ids=["number", "columns", "word"],
)
def test_faulty_ade_class_names(ade, change, message):
    path = ade / "objectInfo150.txt"
    text = path.read_text()
    assert change(text) != text
    path.write_text(change(text))
    with pytest.raises(UserError, match=message):
        ADE("train", str(ade))


def test_faults_of_an_ade_tree(ade):
    mask = ade / "annotations" / "training" / "ADE_training_2.png"
    mask_of([151]).save(mask)
    with pytest.raises(
        UserError, match=rf"training, file 2: mask {mask} .* label id 151; .*0\.\.150"
    ):
        ADE("train", str(ade)).load(1)
    (ade / "images" / "training").rename(ade / "images" / "elsewhere")
    with pytest.raises(UserError, match=r"image folder .*images/training does not exist"):
        ADE("train", str(ade))
    (ade / "images" / "training").mkdir()
    with pytest.raises(UserError, match="train list of the data set is empty"):
        ADE("train", str(ade))
    (ade / "objectInfo150.txt").unlink()
    with pytest.raises(UserError, match=r"list file .*objectInfo150.txt does not exist"):
        ADE("val", str(ade))


def test_ade_takes_images_of_any_format_and_tells_what_it_leaves_out(ade, tmp_path, logged):
    folder = ade / "images" / "training"
    twins = [f"._{path.name}" for path in folder.iterdir()]
    GREY.save(folder / "ADE_training_4.JPEG", "JPEG")
    GREY.save(folder / "ADE_training_5.png")
    for name in (*twins, ".DS_Store", "Thumbs.db", "list.txt", "ADE_training_6.heic"):
        (folder / name).write_bytes(b"\0\5\26\7")
    (folder / "more").mkdir()
    for k in (4, 5):
        mask_of([k]).save(ade / f"annotations/training/ADE_training_{k}.png")
    loaders = bundle(ADE, ade, tmp_path, name="own", steps=[[1, 2, 3, 4, 5]])
    assert loaders.train_set.names == [f"ADE_training_{k}" for k in range(1, 6)]
    assert [path.suffix for path in folder.glob("ADE_training_[45]*")].count(".png") == 1
    assert logged() == [
        f"train images: left out of {folder}: 5 hidden, 2 with an ending of no image "
        "(.heic, .txt), 1 in the form of folders"
    ]


def test_two_images_of_one_id(ade):
    folder = ade / "images" / "training"
    GREY.save(folder / "ADE_training_2.png")
    message = (
        f"{folder}, file 3: image ADE_training_2 stands in the list twice, first at {folder}, file "
        f"2 ({folder / 'ADE_training_2.jpg'} and {folder / 'ADE_training_2.png'}); answers, "
        "saliency maps and memory.json go by the name alone, so rename one, with its mask."
    )
    with pytest.raises(UserError) as caught:
        ADE("train", str(ade))
    assert str(caught.value) == message


def test_a_folder_without_images_tells_what_lies_there(ade):
    folder = ade / "images" / "training"
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(".heic"))
    message = f"train list of the data set is empty without what is left out of {folder}: 3 with an"
    with pytest.raises(UserError, match=message):
        ADE("train", str(ade))


# ------------------------------------------------------------------------------ void for foreground
BINARY = ("background", "crack")
VOID_IS = "hold 255 (in 16 bits 65535), which is void, neither trained on nor counted: where it"


@pytest.mark.parametrize("wide", [False, True])
def test_masks_of_background_and_void_alone_are_told(tmp_path, wide):
    root = write_voc(tmp_path / "voc", dict.fromkeys("abcdef", (0, 255)))
    if wide:
        for path in (root / "SegmentationClassAug").iterdir():
            wide_mask([0, 65535]).save(path)
    with pytest.raises(UserError) as caught:
        bundle(VOC, root, tmp_path, class_names=BINARY, name="x", steps=[[1]])
    assert str(caught.value) == (
        f"no image of {root} belongs to the train set of step 0 of task 'x' (overlap): no mask of "
        f"the train list holds 1; 6 of 6 that were looked at {VOID_IS} shall be foreground, write "
        "the label id of its class, such as 1."
    )


def test_void_for_foreground_in_the_test_masks_alone(tmp_path):
    root = write_voc(tmp_path / "voc", dict.fromkeys("abcdef", (0, 1)))
    for path in (root / "SegmentationClass").iterdir():
        mask_of([0, 255]).save(path)
    with pytest.raises(
        UserError,
        match=r"belongs to the test set .* no mask of the val list holds "
        r"1; 6 of 6 that were looked at hold 255",
    ):
        bundle(VOC, root, tmp_path, class_names=BINARY, name="x", steps=[[1]])


def test_a_class_that_occurs_as_void_alone(tmp_path, logged):
    """Beside another class of the step, and as the only one of its step."""
    root = write_voc(tmp_path / "voc", dict.fromkeys("abcdef", (0, 1, 255)))
    bundle(VOC, root, tmp_path, class_names=NAMES, name="x", steps=[[1, 3], [2]])
    told = f"no training mask holds 3; 6 of 6 that were looked at {VOID_IS} shall be foreground, "
    assert logged() == [f"{told}write the label id of its class, such as 3"]
    with pytest.raises(UserError, match=r"train list holds 2; 6 of 6 .* such as 2\.$"):
        bundle(VOC, root, tmp_path, class_names=NAMES, name="x", steps=[[1, 3], [2]], step=1)


def test_some_masks_with_void_for_foreground(tmp_path, logged):
    masks = {"a": (0, 1), "b": (0, 1, 255), "c": (0, 255), "d": (0,), "e": (1,), "f": (255,)}
    root = write_voc(tmp_path / "voc", masks)
    bundle(VOC, root, tmp_path, class_names=BINARY, name="x", steps=[[1]])
    words = f"masks hold no class; 2 of 3 that were looked at {VOID_IS} shall be foreground, write "
    assert logged() == [
        f"3 {split} {words}the label id of its class, such as 1" for split in ("train", "val")
    ]


def test_void_beside_classes_and_masks_of_background_are_no_news(tmp_path, logged, monkeypatch):
    masks = {"a": (0, 1, 255), "b": (2, 255), "c": (0,), "d": (0, 2), "e": (1,)}
    root = write_voc(tmp_path / "voc", masks)
    read = []
    monkeypatch.setattr(VOC, "load_mask", lambda raw, index: read.append(index) or np.zeros(1))
    bundle(VOC, root, tmp_path, class_names=NAMES[:3], name="x", steps=[[1, 2]])
    assert logged() == []
    assert read == [2, 2], "what has a class is not read again"


# -------------------------------------------------------------------- images and labels of a step
IDS = {"a": [0, 1, 3, 255], "b": [0, 1, 2, 3, 255], "c": [2, 0, 255], "d": [2, 4, 0], "e": [0, 4]}


@pytest.mark.parametrize("masked", [0, 255])
@pytest.mark.parametrize(
    ("setting", "kind", "images", "kept"),
    [
        ("overlap", "train", "bcd", {2: 3}),
        ("disjoint", "train", "bc", {2: 3}),
        ("sequential", "train", "bc", {3: 1, 1: 2, 2: 3}),
        ("overlap", "val", "bcd", {2: 3}),
        ("sequential", "val", "bcd", {2: 3}),
        ("overlap", "test", "abcd", {3: 1, 1: 2, 2: 3, 4: 4}),
        ("disjoint", "test", "abcd", {3: 1, 1: 2, 2: 3, 4: 4}),
    ],
)
def test_images_and_labels_of_a_step(tmp_path, setting, kind, images, kept, masked):
    """Step 1 of classes that arrive as 3, 1 | 2 | 4, so their channels are 1, 2 | 3 | 4.

    A test hides none: what future classes count as is decided when its matrix is read.
    """
    loaders = bundle(
        *(VOC, write_voc(tmp_path / "voc", IDS), tmp_path),
        **{"transform": False, "batch_size": 1, "masked": masked, "class_names": NAMES},
        **{"name": "own", "steps": [[3, 1], [2], [4]], "step": 1, "setting": setting},
    )
    dataset = getattr(loaders, f"{kind}_set")
    assert dataset.names == list(images)
    channels = {0: 0, 255: 255, **dict.fromkeys((1, 2, 3, 4), masked), **kept}
    for sample in dataset:
        ids = np.asarray(mask_of(IDS[sample.name]))
        assert (sample.image.dtype, sample.label.dtype) == (torch.uint8, torch.uint8)
        assert sample.image.shape == (3, HEIGHT, WIDTH)
        assert sample.label.tolist() == [[channels[label] for label in row] for row in ids]


def test_shipped_ade_config_ignores_hidden_classes_when_it_measures(ade, tmp_path):
    task = {"name": "own", "steps": [[2], [3], [1, 150]], "step": 1}
    whole = {"transform": False, "batch_size": 1}
    loaders = bundle(ADE, ade, tmp_path, **whole, **task)
    seen = {}
    for kind in ("train", "val", "test"):
        for sample in getattr(loaders, f"{kind}_set"):
            label = sample.label
            if kind == "test":  # where hidden classes have rows of their own, 3 and 4
                label = torch.where(label > 2, loaders.masking_value("test"), label)
            seen[kind, sample.name[-1]] = label.unique().tolist()
    assert seen == {
        ("train", "3"): [0, 2],
        ("val", "3"): [0, 2, 255],
        ("test", "2"): [0, 1, 255],
        ("test", "3"): [0, 2, 255],
    }


def test_evaluation_is_on_centre_crops_in_batches(toy_root, tmp_path):
    loaders = bundle(VOC, toy_root, tmp_path, class_names=CLASS_NAMES)
    batch = next(iter(loaders.val_loader))
    assert isinstance(batch, Sample)
    assert (batch.image.shape, batch.label.shape) == ((1, 3, 32, 32), (1, 32, 32))
    assert [batch.name[0] for batch in loaders.val_loader] == loaders.val_set.names
    raw = VOC("val", str(toy_root))
    image, _ = raw.load(int(loaders.val_set.indices[0]))
    scaled = image.resize((42, 32), Image.Resampling.BILINEAR)  # of 64×48
    centre = np.asarray(scaled.crop((5, 0, 37, 32)))
    assert (batch.image[0].permute(1, 2, 0).numpy() == centre).all()


def test_cross_validation_holds_out_a_fifth_of_the_training_images(toy_root, tmp_path):
    args = {"class_names": CLASS_NAMES, "name": "10-5", "step": 1}
    whole = bundle(VOC, toy_root, tmp_path, **args)
    parts = bundle(VOC, toy_root, tmp_path, cross_val=True, **args)
    train, held_out = parts.train_set.names, parts.val_set.names
    assert sorted(train + held_out) == whole.train_set.names
    assert len(whole.train_set) > 10
    assert len(held_out) == round(0.2 * len(whole.train_set))
    assert parts.test_set.names == whole.test_set.names
    assert isinstance(parts.val_set.transform, EvalTransform)
    again = bundle(VOC, toy_root, tmp_path, cross_val=True, **args)
    assert (again.train_set.names, again.val_set.names) == (train, held_out)
    other = bundle(VOC, toy_root, tmp_path, cross_val=True, seed=2, **args)
    assert other.val_set.names != held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"name": "19-1", "step": 1},
            "no image of .* belongs to the train set of step 1 of task '19-1'",
        ),
        ({"name": "15-2"}, "'15-2', which does not exist"),
        ({"transform": False}, r"train.args.transform is false.*set .*train.batch_size to 1"),
        ({"class_names": NAMES}, r"label id 5, but the data set's classes are 1\.\.4"),
        ({"class_names": ["background"]}, "has 1 names; between 2 and 65535"),
        ({"class_names": range(1 << 16)}, "has 65536 names; between 2 and 65535"),
        ({"class_names": ["background", "cat", "cat"]}, "name 'cat' more than once"),
        ({"class_names": ["background", ""]}, "must be a list of names, background first"),
        ({"class_names": ["background", 3]}, "must be a list of names, background first"),
        (
            {"batch_size": 6},
            r"training set of step 0 has 5 images, .*batch_size\) 6 × 1 process\(es\) .* = 6",
        ),
        (
            {"batch_size": 3, "ranks": (1, 2)},
            r"has 5 images, .*batch_size\) 3 × 2 process\(es\) .* = 6",
        ),
    ],
)
def test_settings_that_cannot_train(tmp_path, changes, message):
    root = write_voc(tmp_path / "voc", IDS)
    with pytest.raises(UserError, match=message):
        bundle(VOC, root, tmp_path, **{"steps": None, **changes}).train_loader  # noqa: B018


# ------------------------------------------------------------------------------------- random crops
@pytest.fixture(scope="module")
def draws() -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Axis → 400 draws of an image with red = 3x, green = 3y and a mask that holds x or y."""
    y, x = np.mgrid[:64, :64].astype(np.uint8)
    image = Image.fromarray(np.stack([3 * x, 3 * y, 0 * x], axis=-1))
    transform, found = TrainTransform(32), {}
    for axis, mask in {"x": x, "y": y}.items():
        torch.manual_seed(0)
        pairs = (transform(image, Image.fromarray(mask)) for _ in range(400))
        found[axis] = [(a.permute(1, 2, 0).int().numpy(), b.int().numpy()) for a, b in pairs]
    return found


@pytest.mark.parametrize(("axis", "colour"), [("x", 0), ("y", 1)])
def test_random_crops_keep_image_and_mask_aligned(draws, axis, colour):
    for image, mask in draws[axis]:
        assert (image.shape, mask.shape) == ((32, 32, 3), (32, 32))
        assert np.abs(image[..., colour] / 3 - mask).max() <= 1.5  # pixels of the whole image


def test_random_crops_flip_half_of_the_time_and_never_upside_down(draws):
    flipped = [mask[0, 0] > mask[0, -1] for _, mask in draws["x"]]
    assert 0.42 < np.mean(flipped) < 0.58
    assert all(mask[0, 0] < mask[-1, 0] for _, mask in draws["y"])


def test_random_crops_are_of_half_to_the_whole_area(draws):
    """A scale above 1 never fits, so the area is between one half and one."""

    def extent(mask: np.ndarray) -> float:
        return (np.ptp(mask) + 2) / 64  # 32 of up to 64 pixels: about one is lost at either end

    sides = np.array([[extent(mask) for _, mask in draws[axis]] for axis in "xy"]).T
    area, ratio = sides.prod(axis=1), sides[:, 0] / sides[:, 1]
    assert 0.42 < area.min() < 0.6 < 0.9 < area.max()
    assert 0.7 < ratio.min() < 0.85 < 1.2 < ratio.max() < 1.42
    assert len(np.unique(sides, axis=0)) > 100


# ------------------------------------------------------------------------- torchvision's numbers
TABLE = np.random.default_rng(0).permutation(256).astype(np.uint8)
SIZES = [(50, 37), (37, 51), (64, 64), (31, 90), (90, 31), (40, 7), (1, 1), (2, 65)]  # W, H


def noise(width: int, height: int) -> tuple[Image.Image, Image.Image]:
    """An image of noise and a mask of label ids, in which no two places look the same."""
    generator = np.random.default_rng(width)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    mask = generator.choice(np.array([*range(21), 255], np.uint8), (height, width))
    return Image.fromarray(image), Image.fromarray(mask)


def by_torchvision(
    image: Image.Image, mask: Image.Image, size: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Image, label and whether they were flipped, with the functions of torchvision alone."""
    box = RandomResizedCrop.get_params(image, [0.5, 2.0], [3 / 4, 4 / 3])
    image = F.resized_crop(image, *box, [size, size], interpolation=BILINEAR)
    mask = F.resized_crop(mask, *box, [size, size], interpolation=NEAREST)
    flipped = bool(torch.rand(1) < 0.5)
    if flipped:
        image, mask = F.horizontal_flip(image), F.horizontal_flip(mask)
    return F.pil_to_tensor(image), torch.from_numpy(TABLE[np.asarray(mask)]), flipped


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_random_boxes_are_those_of_torchvision(size):
    image, scale, ratio = Image.new("L", size), TrainTransform.scale, TrainTransform.ratio
    for seed in range(200):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(image, list(scale), list(ratio)), torch.rand(1)
        torch.manual_seed(seed)
        assert (random_box(*size, scale, ratio), torch.rand(1)) == expected


@pytest.mark.parametrize("crop", [32, 45, 100])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_crops_of_any_box_are_those_of_torchvision(size, crop):
    image, mask = noise(*size)
    generator, (width, height) = np.random.default_rng(crop), size
    boxes = [(0, 0, height, width), (0, 0, 1, 1), (height - 1, width - 1, 1, 1)]
    boxes += [(0, 0, (height + 1) // 2, width), (height // 2, width // 2, -(-height // 2), 1)]
    for _ in range(40):
        top, left = generator.integers(0, (height, width))
        h, w = generator.integers(1, (height - top + 1, width - left + 1))
        boxes += [(top, left, h, w), (top, left, height - top, width - left)]
    for box in boxes:
        box = tuple(map(int, box))
        pair = to_tensors(*resized_crop(box, (crop, crop), image, mask))
        for ours, theirs, how in zip(pair, (image, mask), (BILINEAR, NEAREST), strict=True):
            theirs = F.resized_crop(theirs, *box, [crop, crop], interpolation=how)
            assert torch.equal(ours, F.pil_to_tensor(theirs).view_as(ours)), box


@pytest.mark.parametrize("crop", [32, 45])
@pytest.mark.parametrize("size", [*SIZES, (500, 375), (333, 500), (32, 45), (45, 33)], ids=str)
def test_evaluation_crops_are_those_of_torchvision(size, crop):
    image, mask = noise(*size)
    pair = EvalTransform(crop)(image, mask)
    for ours, theirs, how in zip(pair, (image, mask), (BILINEAR, NEAREST), strict=True):
        theirs = F.center_crop(F.resize(theirs, [crop], interpolation=how), [crop, crop])
        assert torch.equal(ours, F.pil_to_tensor(theirs).view_as(ours))


@pytest.mark.parametrize("crop", [32, 45])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "RGBA", "P"])
def test_samples_are_those_of_torchvision(tmp_path, mode, crop):
    """From the files on; the image suffix is .jpg throughout, for the content decides."""
    root = write_voc(tmp_path / "voc", dict.fromkeys("abcdefgh", (0,)))
    for name, size in zip("abcdefgh", SIZES, strict=True):
        image, mask = noise(*size)
        path = root / "JPEGImages" / f"{name}.jpg"
        image.convert(mode).save(path, "PNG" if mode in ("RGBA", "P") else "JPEG")
        mask.putpalette(voc_palette())
        mask.save(root / "SegmentationClassAug" / f"{name}.png")
    raw = VOC("train", str(root))
    dataset = IncrementalDataset(raw, range(8), TABLE, TrainTransform(crop), ("seed", 3))
    flips = set()
    for position, entry in enumerate(raw.entries):
        image, mask = Image.open(entry.image).convert("RGB"), Image.open(entry.mask)
        for epoch in range(20):
            ours = dataset[position, epoch]
            torch.manual_seed(seed_from("seed", 3, epoch, entry.id))
            expected, labels, flipped = by_torchvision(image, mask, crop)
            assert torch.equal(ours.image, expected)
            assert torch.equal(ours.label, labels)
            assert ours.image.is_contiguous()
            assert ours.label.is_contiguous()
            flips.add(flipped)
    assert flips == {False, True}


# -------------------------------------------------------------------------------------- determinism
@pytest.fixture(scope="module")
def toy(toy_root, tmp_path_factory) -> Callable[..., IncrementalDataLoader]:
    """Bundles of the toy data for overlap 15-5, with one cache of the presence table."""
    cache = tmp_path_factory.mktemp("cache")

    def make(**changes):
        changes = {"class_names": CLASS_NAMES, "name": "15-5", **changes}
        return bundle(VOC, toy_root, cache, **changes)

    return make


def epoch(loaders: IncrementalDataLoader, number: int) -> list[Sample]:
    loaders.train_loader.batch_sampler.set_epoch(number)
    batches = list(loaders.train_loader)
    assert len(batches) == len(loaders.train_loader)
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(toy, workers):
    alone, helped = toy(), toy(workers=workers)
    for number in (0, 3):
        pairs = zip(epoch(alone, number), epoch(helped, number), strict=True)
        assert all(same(a, b) for a, b in pairs)
    pairs = zip(alone.test_loader, helped.test_loader, strict=True)
    assert all(same(a, b) for a, b in pairs)


def test_two_ranks_together_take_the_batches_of_one(toy):
    one = epoch(toy(batch_size=6), 2)
    ranks = [epoch(toy(batch_size=3, ranks=(rank, 2)), 2) for rank in (0, 1)]
    assert len(one) > 2
    for whole, *shares in zip(one, *ranks, strict=True):
        expected = dict(zip(whole.name, zip(whole.image, whole.label, strict=True), strict=True))
        found = {}
        for share in shares:
            assert len(share.name) == 3
            found |= zip(share.name, zip(share.image, share.label, strict=True), strict=True)
        assert set(found) == set(expected)
        for name, (image, label) in expected.items():
            assert torch.equal(image, found[name][0])
            assert torch.equal(label, found[name][1])


def test_two_ranks_share_the_test_images(toy):
    shares = [[b.name[0] for b in toy(ranks=(rank, 2)).test_loader] for rank in (0, 1)]
    names = toy().test_set.names
    assert shares == [names[::2], names[1::2]]


def test_epochs_and_seeds_differ_and_repeat(toy):
    loaders = toy()
    first, second, again = (epoch(loaders, number) for number in (0, 1, 0))
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    other_seed = epoch(toy(seed=2), 0)
    for other in (second, other_seed):
        assert [batch.name for batch in other] != [batch.name for batch in first]
    train, reseeded = loaders.train_set, toy(seed=2).train_set
    positions = range(len(train))
    assert all(same(train[i], train[i, 0]) for i in positions)
    for changed in ([train[i, 1] for i in positions], [reseeded[i, 0] for i in positions]):
        moved = [not torch.equal(train[i, 0].image, changed[i].image) for i in positions]
        assert np.mean(moved) > 0.7  # whole images without a flip may repeat


def test_an_epoch_holds_no_image_twice_and_drops_the_last_partial_batch(toy):
    loaders = toy(batch_size=5)
    names = [name for batch in epoch(loaders, 0) for name in batch.name]
    assert len(names) == len(loaders.train_set) // 5 * 5
    assert len(set(names)) == len(names)
    assert set(names) <= set(loaders.train_set.names)


def test_a_sample_depends_on_its_image_and_not_on_its_place(toy):
    loaders = toy()
    whole = loaders.train_set
    part = IncrementalDataset(
        *(whole.source, whole.indices[4::3], whole.table, whole.transform, whole.seed)
    )
    assert all(same(part[i, 5], whole[4 + 3 * i, 5]) for i in range(len(part)))
    torch.manual_seed(1)
    one = whole[0]
    torch.manual_seed(2)
    assert same(one, whole[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_global_generator_alone(toy, workers):
    loaders = toy(workers=workers)
    state = torch.get_rng_state()
    loaders.train_set[0]
    epoch(loaders, 0)
    next(iter(loaders.test_loader))
    assert torch.equal(torch.get_rng_state(), state)


def test_loading_processes_are_forked_and_memory_is_pinned_for_a_gpu_alone(toy, monkeypatch):
    """Whatever way of starting them is the default, and also where another run has a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", None)
    multiprocessing.set_start_method("forkserver")
    for workers in (0, 1):
        loaders = toy(workers=workers)
        assert loaders.pin_memory, "as the shipped config asks"
        assert not loaders.test_loader.pin_memory
        next(iter(loaders.test_loader))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("length", [0, 1, 7, 12])
def test_shares_cover_everything_once_and_in_order(length, world):
    shares = [OrderedShare(length, rank, world) for rank in range(world)]
    assert sorted(p for share in shares for p in share) == list(range(length))
    for share in shares:
        assert len(share) == len(list(share))
        assert list(share) == sorted(share)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_shuffled_batches_of_any_number_of_ranks(world):
    """12 of 31 positions a batch, over one, two or three ranks."""
    alone = ShuffledBatches(31, 12, 0, 1, ("seed",))
    ranks = [ShuffledBatches(31, 12 // world, rank, world, ("seed",)) for rank in range(world)]
    for sampler in (alone, *ranks):
        sampler.set_epoch(4)
        assert len(sampler) == len(list(sampler)) == 2
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert {len(part) for part in parts} == {12 // world}
        assert sorted(key for part in parts for key in part) == sorted(whole)
        assert {number for _, number in whole} == {4}


def test_cross_validation_needs_images(tmp_path):
    root = write_voc(tmp_path / "voc", {"a": [1], "b": [1]})
    with pytest.raises(UserError, match=r"val\.cross_val: the step has 2 training images"):
        bundle(VOC, root, tmp_path, cross_val=True, name="x", steps=[[1]])


def test_an_absurdly_large_image_is_named_with_its_line(voc):
    """60,000 × 60,000 pixels by its header: refused before any of it is decoded."""
    path = voc / "SegmentationClassAug" / "b.png"
    png = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60000, 60000) + png[24:29]
    path.write_bytes(png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:])
    with pytest.raises(UserError, match=r"train_aug\.txt, line 3: mask .*exceeds limit"):
        VOC("train", str(voc)).load(1)
