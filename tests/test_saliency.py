"""Saliency maps: read with the geometry of the labels, by training alone, or told what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.base_dataset import Entry
from base.batch import Batch
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.dataset import Joined, Sample
from data_loader.saliency import SaliencyMaps
from data_loader.voc import VOC
from tests.helpers import train, write_config
from trainer.build import build_data
from trainer.methods import METHODS
from trainer.methods.finetune import Finetune
from utils.errors import UserError, sentence
from utils.parse_config import ConfigParser
from utils.ranks import SINGLE

SIZES = [(50, 37), (37, 51), (31, 90), (90, 31), (64, 64), (40, 24)]  # W, H
SALIENT = 2  # label id whose pixels the maps mark
NAMES = [f"i{number}" for number in range(len(SIZES))]


@pytest.fixture
def root(tmp_path) -> Path:
    """Images of noise in six sizes, whose masks hold the ids 0 … 4; train and val are the same."""
    root, generator = tmp_path / "voc", np.random.default_rng(0)
    lists = root / "ImageSets/Segmentation"
    for folder in (lists, root / "JPEGImages", root / "SegmentationClassAug"):
        folder.mkdir(parents=True)
    (root / "SegmentationClass").symlink_to("SegmentationClassAug")
    for name, (width, height) in zip(NAMES, SIZES, strict=True):
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = generator.integers(0, 5, (height, width), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg")
        Image.fromarray(mask).save(root / f"SegmentationClassAug/{name}.png")
    for split in ("train_aug", "val"):
        (lists / f"{split}.txt").write_text("\n".join(NAMES))
    return root


@pytest.fixture
def maps(root, tmp_path) -> Path:
    """Maps that mark the pixels of one label id, with values 1 … 255."""
    folder, generator = tmp_path / "maps", np.random.default_rng(1)
    folder.mkdir()
    for path in sorted((root / "SegmentationClassAug").iterdir()):
        mask = np.asarray(Image.open(path))
        values = generator.integers(1, 256, mask.shape, dtype=np.uint8)
        Image.fromarray(np.where(mask == SALIENT, values, np.uint8(0))).save(folder / path.name)
    return folder


def load(
    root: Path, maps: Path | None, *kinds: str, memory: dict | None = None, **data: object
) -> IncrementalDataLoader:
    """The bundle of step 1 of 1, 2 | 3 | 4, set up; `data`: further keys of its block."""
    config = write_config(root.parent / "c.json", root, name="own", steps=[[1, 2], [3], [4]])
    tree = json.loads(config.read_text())
    args = tree["data_loader"]["args"]
    args["task"]["step"] = 1
    args["train"]["batch_size"] = 3
    args |= {"saliency_dir": maps and str(maps), "memory": memory or {}, **data}
    config.write_text(json.dumps(tree))
    argv = ["-c", str(config)]
    bundle = build_data(
        ConfigParser.from_args("train", "configs/config_voc.json", argv=argv), SINGLE
    )
    bundle.setup(*(kinds or ("train", "val", "test")))
    return bundle


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


# ---------------------------------------------------------------------------------------- samples
@pytest.mark.parametrize("transform", [True, False])
def test_a_map_goes_where_its_labels_go(root, maps, transform):
    """Crop, size and flip: a map of the pixels of one class is the labels' pixels of it."""
    block = {"args": {"transform": transform, "transform_args": {"crop_size": 33}}, "batch_size": 1}
    data = load(root, maps, train=block)
    dataset, some = data.train_set, []
    dataset.table = np.arange(256, dtype=np.uint8)  # the labels are the ids
    for position in range(len(dataset)):
        for epoch in range(12 if transform else 1):
            sample = dataset[position, epoch]
            assert sample.saliency.dtype == torch.uint8
            assert sample.saliency.is_contiguous()
            assert same(sample.saliency, (sample.label == SALIENT).to(torch.uint8))
            some.append(sample.saliency.sum().item())
    assert len(set(some)) > 5, "maps of several sizes and crops"


def test_maps_leave_images_and_labels_as_they_are(root, maps):
    without, with_maps = load(root, None).train_set, load(root, maps).train_set
    for key in ((position, epoch) for position in range(len(NAMES)) for epoch in range(8)):
        a, b = without[key], with_maps[key]
        assert same(a.image, b.image)
        assert same(a.label, b.label)
        assert a.name == b.name
        assert (a.saliency.shape, b.saliency.shape) == ((0,), (32, 32))


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_with_and_without_maps(root, maps, workers):
    for folder in (None, maps):
        data = load(root, folder, num_workers=workers)
        data.train_batches.set_epoch(1)
        (batch, _) = data.train_loader
        images, labels, _, saliency, replayed = batch.on(SINGLE.device)
        assert (images.dtype, images.shape) == (torch.float32, (3, 3, 32, 32))
        assert same(labels, batch.label)
        assert batch.replayed.tolist() == [False] * 3
        assert replayed is None
        if folder is None:
            assert batch.saliency.shape == (3, 0)
            assert saliency is None
        else:
            assert same(saliency, batch.saliency)
            assert saliency.shape == (3, 32, 32)
            assert saliency.unique().tolist() == [0, 1]


def test_only_what_is_trained_on_reads_maps(root, maps):
    """Not the candidates of the memory, nor validation, also where that holds out some."""
    val = {"cross_val": True, "args": {"transform_args": {"crop_size": 48}}, "batch_size": 2}
    data = load(root, maps, val=val)
    assert data.train_set[0].saliency.numel() > 0
    for dataset in (data.val_set, data.test_set, data.candidate_set()):
        assert len(dataset) > 0
        assert dataset[0].saliency.numel() == 0
    load(root, root / "nowhere", "val", "test")


def test_a_map_of_another_ending_is_told(root, maps):
    first = maps / "i0.png"
    first.rename(first.with_suffix(".PNG"))
    (maps / "._i0.png").touch()
    words = rf"{first} does not exist, only i0\.PNG, which is not looked for; make those with the"
    with pytest.raises(UserError, match=words):
        load(root, maps, "train")


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_modes_of_a_map(root, tmp_path, mode):
    values = np.zeros((37, 50), np.uint8)
    values[3, 4], values[5, 6] = 255, 1 if mode != "1" else 255
    picture = Image.fromarray(values)
    if mode == "P":
        picture.putpalette([7, 7, 7] * 256)  # of no meaning
    (picture.convert("1") if mode == "1" else picture).save(tmp_path / "i0.png")
    assert Image.open(tmp_path / "i0.png").mode == mode
    raw = VOC("train", str(root))
    found = SaliencyMaps(str(tmp_path)).read(raw, raw.entries[0], (50, 37))
    assert (found.dtype, found.shape, found.sum()) == (np.uint8, (37, 50), 2)
    assert found[3, 4] == found[5, 6] == 1


def test_exemplars_carry_maps_and_say_that_they_are_replayed(root, maps):
    data = load(root, maps, memory={"labels": "stored"})
    data.replay({"i1": 0, "i4": 0})
    joined = data.train_loader.dataset
    assert isinstance(joined, Joined)
    own = len(data.train_set)
    for position in range(len(joined)):
        sample = joined[position, 2]
        assert sample.replayed is (position >= own)
        assert sample.saliency.shape == (32, 32)
    batch = torch.utils.data.default_collate([joined[0], joined[own], joined[1]])
    assert same(batch.replayed, torch.tensor([False, True, False]))
    assert same(batch.on(SINGLE.device).replayed, batch.replayed)


def test_a_batch_that_somebody_made_has_no_more_than_it_needs():
    batch = Sample(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 2, 2), ["a"])
    assert batch.on(SINGLE.device)[3:] == (None, None)


# ----------------------------------------------------------------------------------------- the hash
def test_the_hash_of_the_training_data_covers_the_maps(root, maps):
    without, data = load(root, None), load(root, maps)
    before = data.train_hash()
    assert before != without.train_hash()
    moved = maps.rename(maps.parent / "elsewhere")
    assert load(root, moved).train_hash() == before, "the maps decide, not their place"
    Image.new("L", SIZES[2]).save(moved / "i2.png")
    assert load(root, moved).train_hash() != before


# ------------------------------------------------------------------------------------ what is wrong
WHERE = r"^data_loader.args.saliency_dir \(--saliency_dir\): "


def test_a_folder_or_maps_that_do_not_exist(root, maps):
    with pytest.raises(UserError, match=WHERE + r"the folder .*/nowhere does not exist; name one"):
        load(root, root / "nowhere")
    for name in ("i1", "i4"):
        (maps / f"{name}.png").unlink()
    with pytest.raises(UserError) as error:
        load(root, maps)
    assert sentence(error.value) == (
        "data_loader.args.saliency_dir (--saliency_dir): 2 of 6 training images have no saliency "
        f"map, the first of them is i1: {maps}/i1.png does not exist; "
        "make those with the same detector, or name a complete folder."
    )


def test_exemplars_need_maps_as_well(root, maps):
    lists = root / "ImageSets/Segmentation/train_aug.txt"
    mask = Image.new("L", SIZES[5], 1)  # without a class of step 1
    mask.save(root / "SegmentationClassAug/i5.png")
    (maps / "i5.png").unlink()
    assert lists.read_text().endswith("i5")
    data = load(root, maps)
    with pytest.raises(UserError, match=r"1 of 2 training images .* is i5: .*i5\.png does"):
        data.replay({"i1": 0, "i5": 0})


def test_no_map_is_opened_before_it_is_needed(root, maps):
    (maps / "i3.png").write_text("no picture")
    data = load(root, maps)
    data.train_set[2]
    with pytest.raises(UserError, match=r"i3.png cannot be read: cannot identify"):
        data.train_set[3]


def saved(picture: Callable[[], Image.Image], kind: str = "PNG") -> Callable[[Path], object]:
    return lambda path: picture().save(path, kind)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (Path.unlink, "saliency map {path} does not exist."),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "saliency map {path} cannot be r"),
        (
            saved(lambda: Image.new("RGB", SIZES[0])),
            "saliency map {path} is a PNG of the mode RGB; it must be a PNG of 1 bit, grey of 8",
        ),
        (
            saved(lambda: Image.new("I;16", SIZES[0])),
            "saliency map {path} is a PNG of the mode I;16; it must be",
        ),
        (
            saved(lambda: Image.new("L", SIZES[0]), "JPEG"),
            "saliency map {path} is a JPEG of the mode L; it must be",
        ),
        (
            saved(lambda: Image.new("L", SIZES[1])),
            "image {image} is 50×37 pixels, but its saliency map {path} is 37×51.",
        ),
    ],
    ids=["missing", "cut", "colour", "16 bits", "JPEG", "size"],
)
def test_a_faulty_map_is_named_with_its_line(root, maps, damage, complaint):
    raw, path = VOC("train", str(root)), maps / "i0.png"
    damage(path)
    entry: Entry = raw.entries[0]
    with pytest.raises(UserError) as error:
        SaliencyMaps(str(maps)).read(raw, entry, SIZES[0])
    expected = complaint.format(path=path, image=entry.image)
    assert str(error.value).startswith(f"{entry.where}: {expected}")


def test_a_link_out_of_the_folder(root, maps):
    (maps / "i0.png").rename(root.parent / "map.png")
    (maps / "i0.png").symlink_to(root.parent / "map.png")
    raw = VOC("train", str(root))
    with pytest.raises(UserError, match=rf"is a link to .*outside the folder {maps}; .*follow_li"):
        SaliencyMaps(str(maps)).read(raw, raw.entries[0], SIZES[0])
    raw = VOC("train", str(root), follow_links=True)
    assert SaliencyMaps(str(maps)).read(raw, raw.entries[0], SIZES[0]).any()


# ------------------------------------------------------------------------------------- whole runs
@pytest.fixture
def reader(monkeypatch) -> list[Batch]:
    """Makes `finetune` a method that reads maps; returns what it was given to train on."""
    given: list[Batch] = []

    class Reader(Finetune):
        reads_saliency = True

        def losses(self, batch, student, teacher, total):
            given.append(batch)
            return super().losses(batch, student, teacher, total)

    monkeypatch.setitem(METHODS, "finetune", Reader)
    return given


def test_maps_and_exemplars_reach_the_method(toy_root, tmp_path, reader):
    """Half of each later batch is replayed, labelled with every seen class."""
    maps = tmp_path / "maps"
    maps.mkdir()
    for path in (toy_root / "SegmentationClassAug").iterdir():
        mask = np.asarray(Image.open(path))
        Image.fromarray(np.where(mask == 255, np.uint8(0), mask)).save(maps / path.name)
    config = write_config(tmp_path / "c.json", toy_root)
    tree = json.loads(config.read_text())
    tree["data_loader"]["args"] |= {
        "saliency_dir": str(maps),
        "memory": {"mem_size": 6, "mix": "half_batch", "labels": "all_seen"},
    }
    config.write_text(json.dumps(tree))
    flags = ("--method", "finetune", "--epochs", "1")
    train(config, *flags)
    assert len(reader) == 5
    assert all(batch.replayed is None for batch in reader)
    for batch in reader:
        assert batch.saliency.shape == batch.labels.shape
        assert (batch.saliency[(batch.labels > 0) & (batch.labels < 255)] == 1).all()
    reader.clear()
    run = train(config, *flags, "--freeze_bn", "--task_step", "1", "--bs", "4")
    images = int(re.search(r"(\d+) images show", (run.log_dir() / "info.log").read_text())[1])
    assert [batch.iteration for batch in reader] == list(range(images // 4)), "as without a memory"
    old = set()
    for batch in reader:
        assert batch.replayed.sum() == 2
        assert batch.saliency.shape == batch.labels.shape
        assert 0 in batch.saliency
        old |= set(batch.labels[batch.replayed].unique().tolist()) & set(range(1, 16))
        assert not set(batch.labels[~batch.replayed].unique().tolist()) & set(range(1, 16))
    assert len(old) > 5


def test_methods_that_make_nothing_of_it_are_refused(toy_config, tmp_path, monkeypatch):
    message = (
        r"^method 'dkd' with these settings reads no saliency maps; leave "
        r"data_loader.args.saliency_dir \(--saliency_dir\) null\.$"
    )
    with pytest.raises(UserError, match=message):
        train(toy_config, "--saliency_dir", str(tmp_path))
    message = (
        r"^method 'ssul' with these settings reads a saliency map of every training image, but "
        r"data_loader.args.saliency_dir is null; name their folder with --saliency_dir, or see "
        r"--method ssul --help for the setting that does without\.$"
    )
    with pytest.raises(UserError, match=message):
        train(toy_config, "--method", "ssul")
    monkeypatch.setattr(METHODS["dkd"], "replay_confidence", None)
    message = (
        r"^method 'dkd' has no replay memory; set data_loader.args.memory.mem_size \(--mem_size\) "
        r"to 0, or choose one of .*finetune.*\.$"
    )
    with pytest.raises(UserError, match=message):
        train(toy_config, "--mem_size", "5")
    assert not (tmp_path / "runs").exists()
