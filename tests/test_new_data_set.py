"""A data set of its own, in this file alone: one class, one registration, one config.

It has no background class, 300 classes in masks of 16 bits, label ids far from channels and test
images of several rectangular sizes. It trains two steps with memory, resumes and is evaluated.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
from base.base_dataset import BaseDataset, Entry
from base.task import make_task
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.transforms import EvalTransform, Resize, TrainTransform, eval_transform
from models.loss import mbce
from scripts.check_data import check_tree
from tests.helpers import PROJECT, evaluation
from trainer.build import build_data
from trainer.replay import pseudo_label
from trainer.run import run
from trainer.trainer import Trainer
from utils.errors import UserError
from utils.metric import ConfusionMatrix
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE

VOID = 65535
IDS = (40000, 7, 300, 255, 0, *range(1000, 30500, 100))  # in order of arrival; 255 is no void here
STEPS = [list(IDS[:200]), list(IDS[200:])]
SIDE = 8  # pixels of a tile


class Mosaic(BaseDataset):
    """Tiles of one class each; every file is listed by its folder."""

    name = "mosaic"
    default_root = "/dataset/mosaic"
    root_variable = "MOSAIC_ROOT"
    tables = {"200-100": STEPS}  # noqa: RUF012
    complete = {"train": 12, "val": 8}  # noqa: RUF012
    background = False
    evaluation = "whole"

    def read_class_names(self) -> dict[int, str]:
        return {label: f"tile {label}" for label in IDS}

    def read_entries(self) -> list[Entry]:
        folder = self.root / self.split
        return [
            Entry(path.stem, path.stem, path, path.with_suffix(".png"), f"{folder}, file {n}")
            for n, path in enumerate(sorted(folder.glob("*.jpg")), start=1)
        ]


def write_mosaic(root: Path) -> Path:
    """12 training images of 5×5 tiles, together all classes, and 8 wide or high validation images
    of 5×8 tiles with a border of void.
    """
    assert len(IDS) == 300
    for split, count, columns in (("train", 12, 5), ("val", 8, 8)):
        (root / split).mkdir(parents=True)
        for number in range(count):
            tiles = np.resize(np.array(IDS[number::count], np.uint16), (5, columns))
            mask = np.kron(tiles, np.ones((SIDE, SIDE), np.uint16))
            if split == "val":
                mask[:2] = VOID
                mask = mask.T if number % 2 else mask
            pixels = np.stack([mask % 251, mask % 241, mask % 239], axis=-1).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{split}{number:02d}.jpg")
            Image.fromarray(np.ascontiguousarray(mask)).save(
                root / split / f"{split}{number:02d}.png"
            )
    return root


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(data_loader.DATA_SETS, "Mosaic", Mosaic)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return write_mosaic(tmp_path_factory.mktemp("data") / "mosaic")


@pytest.fixture
def config(root, tmp_path) -> Path:
    """The default config of the data set."""
    tree = json.loads((PROJECT / "configs/config_voc.json").read_text())
    tree["arch"]["args"] |= {"backbone": "tiny", "backbone_pretrained": False}
    args = tree["data_loader"]["args"]
    tree["data_loader"]["type"] = "Mosaic"
    args |= {"data_dir": str(root), "num_workers": 0}
    args["task"] |= {"name": "200-100", "idxs_path": str(tmp_path / "lists")}
    args["train"]["args"]["transform_args"]["crop_size"] = 32
    args["train"]["batch_size"] = 4
    for kind in ("val", "test"):
        args[kind]["args"]["masking_value"] = 255
    tree["optimizer"]["args"]["lr"] = 1e-5  # the loss sums over 300 classes
    tree["trainer"] |= {"epochs": 2, "save_dir": str(tmp_path / "runs")}
    path = tmp_path / "config_mosaic.json"
    path.write_text(json.dumps(tree))
    return path


def start(config: Path, *flags: str, mode: str = "train") -> ConfigParser:
    """What an entry script does."""
    parsed = ConfigParser.from_args(mode, str(config), argv=list(flags))
    run(parsed)
    return parsed


def set_up(config: Path, step: int, *kinds: str) -> IncrementalDataLoader:
    data = build_data(
        ConfigParser.from_args("train", str(config), argv=["--task_step", str(step)]), SINGLE
    )
    data.setup(*kinds)
    return data


def weights(parsed: ConfigParser) -> dict[str, torch.Tensor]:
    return torch.load(parsed.step_dir() / "checkpoint-epoch2.pth", weights_only=True)["state_dict"]


# ------------------------------------------------------------------------------------ whole runs
def test_it_trains_two_steps_resumes_and_is_evaluated(config, root, monkeypatch):
    zero = start(config)
    flags = ("--task_step", "1", "--mem_size", "4", "--freeze_bn")
    whole = start(config, *flags)
    report = json.loads((whole.log_dir() / "metrics.json").read_text())

    epochs = Trainer.train_epoch
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer,
            "train_epoch",
            lambda self, epoch: pytest.fail("killed") if epoch == 2 else epochs(self, epoch),
        )
        saved = Path(whole["trainer"]["save_dir"])
        (saved / "models" / "again").mkdir()
        whole.step_dir().rename(saved / "models" / "again" / "step_1")
        with pytest.raises(pytest.fail.Exception, match="killed"):
            start(config, *flags)
    resumed = start(config, *flags, "-r", "auto")
    expected = torch.load(
        saved / "models" / "again" / "step_1" / "checkpoint-epoch2.pth", weights_only=True
    )["state_dict"]
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name
    again = json.loads((resumed.log_dir() / "metrics.json").read_text())
    assert again["confusion"] == report["confusion"]

    for parsed in (zero, resumed):
        step = str(parsed["data_loader"]["args"]["task"]["step"])
        file = str(parsed.step_dir() / "checkpoint-epoch2.pth")
        tested = start(config, "--task_step", step, "-r", file, "--test")
        own = json.loads((parsed.log_dir() / "metrics.json").read_text())
        assert evaluation(tested)["confusion"] == own["confusion"]


def test_the_report_counts_what_the_masks_hold(config, root):
    """Without a background class there is no row, and no share in a mean, for it."""
    start(config, "--epochs", "1")
    parsed = start(config, "--task_step", "1", "--epochs", "1", "--freeze_bn")
    report = json.loads((parsed.log_dir() / "metrics.json").read_text())
    pixels: Counter[int] = Counter()
    for path in sorted((root / "val").glob("*.png")):
        pixels.update(np.asarray(Image.open(path)).ravel().tolist())
    assert [row["label_id"] for row in report["classes"]] == list(IDS)
    assert [row["pixels"] for row in report["classes"]] == [pixels[label] for label in IDS]
    assert report["classes"][0]["name"] == "tile 40000"
    confusion = np.array(report["confusion"])
    assert confusion.shape == (301, 301)
    assert confusion[0].sum() == 0
    assert confusion.sum() == sum(pixels.values()) - pixels[VOID]
    for metric, of_class in (
        ("Mean_Intersection_over_Union", "IoU"),
        ("Pixel_Accuracy_Class", "accuracy"),
    ):
        by_class = [row[of_class] for row in report["classes"]]
        means = report["metrics"][metric]
        assert means["old"] == pytest.approx(np.mean(by_class[:200]))
        assert means["new"] == pytest.approx(np.mean(by_class[200:]))
        assert means["overall"] == pytest.approx(np.mean(by_class))


def test_a_run_tells_of_an_id_out_of_range(config, root, tmp_path):
    shutil.copytree(root, tmp_path / "damaged")
    mask = tmp_path / "damaged" / "train" / "train05.png"
    Image.fromarray(np.full((40, 40), 40001, np.uint16)).save(mask)
    with pytest.raises(UserError) as error:
        start(config, "--data_dir", str(tmp_path / "damaged"))
    assert str(error.value).startswith(
        f"{mask.parent}, file 6: mask {mask} holds the label id 40001; valid are 0, 7, 255, 300, "
    )
    assert str(error.value).endswith(" and 65535 (void).")


# --------------------------------------------------------------------------------- labels of a step
@pytest.mark.parametrize(("step", "dtype"), [(0, torch.uint8), (1, torch.int32)])
def test_labels_are_as_wide_as_the_channels_need(config, root, step, dtype):
    data = set_up(config, step, "train", "test")
    void, channels = torch.iinfo(dtype).max, {label: k for k, label in enumerate(IDS, start=1)}
    sizes = set()
    for sample in data.test_set:
        mask = np.asarray(Image.open(root / "val" / f"{sample.name}.png"))
        rows = [channels.get(k, torch.iinfo(torch.int32).max) for k in mask.ravel().tolist()]
        assert sample.label.dtype == torch.int32, "300 classes have rows of their own at every step"
        assert sample.label.flatten().tolist() == rows
        sizes.add(tuple(sample.label.shape))
    assert sizes == {(40, 64), (64, 40)}
    new = {0, void, *range(*((1, 201) if step == 0 else (201, 301)))}
    data.train_loader.batch_sampler.set_epoch(0)
    shown = set()
    for batch in data.train_loader:
        assert (batch.label.dtype, batch.label.shape) == (dtype, (4, 32, 32))
        shown |= set(batch.label.unique().tolist())
    assert shown <= new
    assert len(shown) > 50


def test_the_cached_table_has_a_column_for_each_id(config):
    data = set_up(config, 1, "train")
    again = set_up(config, 1, "train")
    presence = data._presence("train")
    assert presence.shape == (12, 300)
    assert (presence.sum(axis=1) == 25).all()
    assert presence.any(axis=0).all()
    assert (again._presence("train") == presence).all()
    ids = np.array(data.task.ids)
    for row, entry in enumerate(data.source["train"].entries):
        assert set(ids[presence[row]]) == set(np.unique(np.asarray(Image.open(entry.mask))))
    assert "12 images show " in data.leakage()


@pytest.mark.parametrize("step", [0, 1])
def test_the_task_converts_ids_of_16_bits(step):
    names = {label: str(label) for label in IDS}
    args = {"name": "200-100", "setting": "overlap", "step": step, "background": False}
    task = make_task("mosaic", Mosaic.tables, names, **args)
    table, seen = task.label_table(task.seen, 255), list(task.seen)
    assert table.shape == (65536,)
    assert table[seen].tolist() == list(range(1, 1 + len(seen)))
    assert table[VOID] == np.iinfo(table.dtype).max
    hidden = [k for k in range(VOID) if k not in set(seen)]
    assert (table[hidden] == np.iinfo(table.dtype).max).all()
    assert (task.label_table(task.seen, 0)[hidden] == 0).all()
    ids = task.label_ids()
    assert (ids.dtype, ids[0], ids[1:].tolist()) == (np.uint16, VOID, seen)
    assert list(task.base_channels) == list(range(1, 201))
    with pytest.raises(UserError, match=r"label id 1, but the data set's classes are 0, 7, 255"):
        make_task("mosaic", Mosaic.tables, names, **args, steps=[[0, 1]])


@pytest.mark.parametrize(("classes", "dtype"), [(254, np.uint8), (255, np.int32)])
def test_labels_widen_with_the_class_that_would_be_void(classes, dtype):
    names = [str(label) for label in range(300)]
    steps = [list(range(1, 1 + classes)), [299]]
    task = make_task("x", {}, names, name="own", setting="overlap", step=0, steps=steps)
    table = task.label_table(task.seen, 0)
    assert table.dtype == dtype
    assert table[classes] == classes
    assert (table[0], table[299], table[VOID]) == (0, 0, np.iinfo(dtype).max)


# ------------------------------------------------------------------------------------------- masks
def one_mask(root: Path, values: np.ndarray, kind: str = "png") -> Mosaic:
    (root / "val").mkdir(parents=True)
    Image.new("RGB", values.shape[::-1]).save(root / "val/a.jpg")
    Image.fromarray(values).save(root / "val/a.png", {"png": "PNG", "tif": "TIFF"}[kind])
    return Mosaic("val", str(root))


@pytest.mark.parametrize("label", [1, 254, 256, 40001, 65534])
def test_an_id_out_of_range_is_one_sentence(tmp_path, label):
    raw = one_mask(tmp_path, np.array([[7, VOID, label, 300]], np.uint16))
    expected = (
        f"{tmp_path}/val, file 1: mask {tmp_path}/val/a.png holds the label id {label}; valid are "
        "0, 7, 255, 300, 1000, "
    )
    for read in (raw.load, raw.load_mask, raw.load_ids):
        with pytest.raises(UserError) as error:
            read(0)
        assert str(error.value).startswith(expected)
        assert str(error.value).endswith(" more and 65535 (void).")


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (np.array([[7, VOID, 40000, 255]], np.uint16), "png", [7, VOID, 40000, 255]),
        (np.array([[7, VOID, 40000, 255]], np.int32), "tif", [7, VOID, 40000, 255]),
        (np.array([[7, 255, 0]], np.uint8), "png", [7, VOID, 0]),
        (np.array([[7]], np.uint16), "png", [7]),
    ],
    ids=["16 bits", "32 bits", "8 bits", "one id"],
)
def test_masks_of_any_depth(tmp_path, values, kind, expected):
    raw = one_mask(tmp_path, values, kind)
    mask = raw.load_mask(0)
    assert (mask.dtype, mask.ravel().tolist()) == (np.uint16, expected)
    assert raw.load_ids(0) == sorted(set(expected) - {VOID}, reverse=True)


@pytest.mark.parametrize("label", [-1, 65536, 70000])
def test_more_than_16_bits_are_told(tmp_path, label):
    raw = one_mask(tmp_path, np.array([[7, label]], np.int32), "tif")
    with pytest.raises(UserError, match=f"holds the label id {label}; valid are"):
        raw.load_mask(0)


# --------------------------------------------------------------------------- tensors of wide labels
def test_crops_of_wide_labels_are_exact():
    """What the transforms make of channels in 8 bits, they make of wider ones."""
    generator = np.random.default_rng(0)
    for width, height in ((50, 37), (31, 90), (64, 64)):
        narrow = generator.integers(0, 256, (height, width), dtype=np.uint8)
        wide = narrow.astype(np.int32) * 8_000_000 + 3  # to the largest numbers of 31 bits
        image = Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for transform in (TrainTransform(32), EvalTransform(45), Resize((20, 33))):
            for seed in range(10):
                pairs = []
                for label in (narrow, wide):
                    torch.manual_seed(seed)
                    pairs.append(transform(image, Image.fromarray(label)))
                (pixels, small), (same_pixels, large) = pairs
                assert (large.dtype, large.shape) == (torch.int32, small.shape)
                assert torch.equal(large, small.int() * 8_000_000 + 3)
                assert torch.equal(pixels, same_pixels)


def test_a_fixed_size_is_height_and_width():
    image, label = Image.new("RGB", (50, 30)), Image.new("L", (50, 30))
    made = [eval_transform(way, 16)(image, label) for way in ("crop", "whole", (20, 33))]
    assert [tuple(label.shape) for _, label in made] == [(16, 16), (30, 50), (20, 33)]
    assert [tuple(image.shape[1:]) for image, _ in made] == [(16, 16), (30, 50), (20, 33)]


def test_whole_images_cannot_be_stacked(config):
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"]["test"]["batch_size"] = 2
    config.write_text(json.dumps(tree))
    message = r"args\.test: mosaic is evaluated on whole images, .*test\.batch_size to 1"
    with pytest.raises(UserError, match=message):
        start(config)


def test_loss_pseudo_labels_and_counts_of_wide_labels():
    void = torch.iinfo(torch.int32).max
    labels = torch.randint(0, 301, (2, 16, 16), dtype=torch.int32)
    labels[:, :3] = void
    logits = torch.randn(2, 100, 16, 16)
    ids = torch.arange(201, 301).view(1, -1, 1, 1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, (labels[:, None] == ids).float(), reduction="none"
    ).mean((0, 2, 3))
    torch.testing.assert_close(mbce(logits, labels, 201), expected)

    preds = torch.randint(0, 301, (2, 16, 16))
    confusion = ConfusionMatrix(301, 301, torch.device("cpu"))
    confusion.update(labels, preds)
    matrix = np.zeros((301, 301), int)
    for label, pred in zip(labels.flatten().tolist(), preds.flatten().tolist(), strict=True):
        if label != void:
            matrix[label, pred] += 1
    assert (confusion.matrix() == matrix).all()

    channels = torch.full((1, 2, 2), 300)
    labels = torch.tensor([[[0, 7], [void, 256]]], dtype=torch.int32)
    filled = pseudo_label(channels, torch.ones(1, 2, 2), labels, 0.9)
    assert (filled.dtype, filled.tolist()) == (torch.int32, [[[300, 7], [void, 256]]])


# ------------------------------------------------------------------------------------ data doctor
def test_the_doctor_reads_it_through_its_class(config, root, tmp_path, capsys):
    parsed = ConfigParser.from_args("train", str(config), argv=[])
    findings = check_tree(Mosaic, parsed, steps=True)
    assert {finding.what for finding in findings} == {"comparison with the published lists"}
    text = capsys.readouterr().out
    assert f"{root}: 12 training images, 8 validation images, 300 classes" in text
    assert "step 1: 12 train" in text

    shutil.copytree(root, tmp_path / "damaged")
    damaged = ["--data_dir", str(tmp_path / "damaged")]
    masks = sorted((tmp_path / "damaged" / "train").glob("*.png"))
    Image.fromarray(np.full((40, 40), 40001, np.uint16)).save(masks[3])
    Image.fromarray(np.full((40, 40), VOID, np.uint16)).save(masks[4])
    parsed = ConfigParser.from_args("train", str(config), argv=damaged)
    found = {finding.what: finding.where for finding in check_tree(Mosaic, parsed, steps=False)}
    (wrong,) = found["label id out of range in a training mask"]
    assert f"file 4: mask {masks[3]} holds the label id 40001; valid are 0, 7, 255" in wrong
    assert len(found["class without a pixel in any training mask"]) == 50
    (silent,) = found["training mask with void, but without a class"]
    assert silent.endswith(f"file 5: {masks[4]}")
