"""Downloaded files cannot run code, lie outside their root, or choose where we write."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_loader.splits import presence_table
from data_loader.voc import VOC
from models.model import DeepLabV3
from tests.helpers import dkd_heads, write_config
from trainer.run import run
from utils.config_schema import SCHEMA
from utils.errors import UserError
from utils.parse_config import ConfigParser
from utils.processes.launch import plan_launch


class Malicious:
    """Unpickling it would leave a file behind."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return (os.mkdir, (self.trace,))


@pytest.fixture
def trace(tmp_path):
    """The file that malicious content would make; none of the tests may."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


def write_tree(root):
    """One image in each list, in VOC layout."""
    for folder in ("JPEGImages", "SegmentationClassAug", "SegmentationClass"):
        (root / folder).mkdir(parents=True)
        suffix = "jpg" if folder == "JPEGImages" else "png"
        for name in ("a", "b"):
            picture = Image.new("RGB" if suffix == "jpg" else "L", (20, 16))
            picture.save(root / folder / f"{name}.{suffix}")
    lists = root / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    return root


# ----------------------------------------------------------------------------------- running code
@pytest.mark.parametrize("legacy", [False, True])
def test_weights_that_would_run_code(tmp_path, trace, toy_root, legacy):
    config = write_config(tmp_path / "toy.json", toy_root)
    weights = tmp_path / "w.pth"
    state = {"state_dict": DeepLabV3(dkd_heads(1, 15), backbone="tiny").state_dict()}
    torch.save(
        {**state, "epoch": Malicious(trace)}, weights, _use_new_zipfile_serialization=not legacy
    )
    argv = ["-c", str(config), "-r", str(weights), "--save_dir", str(tmp_path / "runs")]
    with pytest.raises(UserError, match="could run code; it is not loaded"):
        run(ConfigParser.from_args("eval", "configs/config_voc.json", argv=argv))


def test_imagenet_file_that_would_run_code(tmp_path, trace, toy_root):
    config = write_config(tmp_path / "toy.json", toy_root)
    torch.save({"conv1.weight": Malicious(trace)}, tmp_path / "resnet.pth")
    tree = json.loads(config.read_text())
    tree["arch"]["args"]["backbone_pretrained"] = str(tmp_path / "resnet.pth")
    config.write_text(json.dumps(tree))
    with pytest.raises(UserError, match="cannot be read as weights"):
        run(ConfigParser.from_args("train", "configs/config_voc.json", argv=["-c", str(config)]))


def test_image_list_that_would_run_code(tmp_path, trace, toy_root):
    lists = tmp_path / "lists" / "voc"
    lists.mkdir(parents=True)
    array = np.array([Malicious(trace)], dtype=object)
    np.save(lists / "overlap_15-5_train_00.npy", array, allow_pickle=True)
    config = write_config(tmp_path / "toy.json", toy_root)
    tree = json.loads(config.read_text())
    del tree["data_loader"]["args"]["class_names"]  # published lists are of VOC's own classes
    config.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"image list .* cannot be read"):
        run(ConfigParser.from_args("train", "configs/config_voc.json", argv=["-c", str(config)]))


def test_class_cache_that_would_run_code(tmp_path, trace):
    dataset = VOC("train", str(write_tree(tmp_path / "voc")))
    expected = presence_table(dataset, tmp_path / "lists")
    (cache,) = (tmp_path / "lists").glob("presence_*.npz")
    for content in (
        lambda file: np.savez(file, presence=np.array([Malicious(trace)]), key=np.array("x")),
        lambda file: file.write(pickle.dumps(Malicious(trace))),
    ):
        with open(cache, "wb") as file:
            content(file)
        assert (presence_table(dataset, tmp_path / "lists") == expected).all()


# ------------------------------------------------------------------------------- outside the root
@pytest.mark.parametrize(
    "line",
    [
        "/../../etc/passwd.jpg /SegmentationClassAug/a.png",
        "/JPEGImages/a.jpg /SegmentationClassAug/../../voc2/a.png",
        "/JPEGImages/../../voc_secret/a.jpg /SegmentationClassAug/a.png",
    ],
)
def test_paths_that_leave_the_root(tmp_path, line):
    root = write_tree(tmp_path / "voc")
    (root / "ImageSets/Segmentation/train_aug.txt").write_text(f"b\n{line}\n")
    with pytest.raises(UserError, match=r"train_aug\.txt, line 2: the path .* leaves the data"):
        VOC("train", str(root))


def test_paths_that_only_seem_to_leave_the_root(tmp_path):
    root = write_tree(tmp_path / "voc")
    line = "/JPEGImages/../JPEGImages/a.jpg /SegmentationClassAug/a.png"
    (root / "ImageSets/Segmentation/train_aug.txt").write_text(line)
    assert VOC("train", str(root)).load(0)[0].size == (20, 16)


@pytest.mark.parametrize("what", ["JPEGImages", "SegmentationClassAug"])
@pytest.mark.parametrize("kind", ["file", "folder", "chain"])
def test_symbolic_links_out_of_the_root(tmp_path, what, kind):
    root = write_tree(tmp_path / "voc")
    outside = tmp_path / "outside"
    (root / what).rename(outside)
    if kind == "folder":
        (root / what).symlink_to(outside)
    else:
        (root / what).mkdir()
        for file in outside.iterdir():
            via = tmp_path / f"via_{file.name}" if kind == "chain" else file
            if kind == "chain":
                via.symlink_to(file)
            (root / what / file.name).symlink_to(via)
    with pytest.raises(UserError, match=r"line 1: .* is a link to .*outside.*follow_links"):
        VOC("train", str(root)).load(0)
    assert VOC("train", str(root), follow_links=True).load(0)[1].shape == (16, 20)


def test_links_inside_the_root_and_to_the_root_are_fine(tmp_path):
    root = write_tree(tmp_path / "voc")
    (root / "JPEGImages").rename(root / "images")
    (root / "JPEGImages").symlink_to("images")
    (tmp_path / "link").symlink_to(root)
    assert VOC("train", str(tmp_path / "link")).load(0)[0].size == (20, 16)


def test_formats_that_start_other_programs_are_no_images(tmp_path):
    root = write_tree(tmp_path / "voc")
    (root / "JPEGImages/a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 16\n")
    with pytest.raises(UserError, match="cannot be read"):
        VOC("train", str(root)).load(0)
    (root / "JPEGImages/a.jpg").unlink()
    os.mkfifo(root / "JPEGImages/a.jpg")
    for follow_links in (False, True):
        with pytest.raises(UserError, match="it is no regular file"):
            VOC("train", str(root), follow_links=follow_links).load(0)
        if not follow_links:  # then behind a link that stays inside
            (root / "JPEGImages/a.jpg").rename(root / "pipe")
            (root / "JPEGImages/a.jpg").symlink_to(root / "pipe")
            with pytest.raises(UserError, match="it is no regular file"):
                VOC("train", str(root)).load(0)


def test_what_lies_outside_is_not_asked_whether_it_exists(tmp_path):
    root = write_tree(tmp_path / "voc")
    (root / "JPEGImages").rename(tmp_path / "elsewhere")
    (root / "JPEGImages").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/a.jpg").unlink()
    with pytest.raises(UserError, match=r"is a link to .*elsewhere/a\.jpg, outside"):
        VOC("train", str(root)).load(0)


# ----------------------------------------------------------------- a config that was downloaded
def test_config_beside_weights_chooses_no_place(tmp_path, toy_root, monkeypatch):
    """Folders that are written to and places where processes meet stay this machine's."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    folder, evil = tmp_path / "downloaded", tmp_path / "evil"
    folder.mkdir()
    config = write_config(folder / "config.json", toy_root, idxs_path=str(evil / "lists"))
    tree = json.loads(config.read_text())
    tree["trainer"]["save_dir"] = str(evil / "runs")
    tree |= {
        "multiprocessing_distributed": True,
        "n_gpu": 3,
        "world_size": 2,
        "rank": 1,
        "dist_url": "tcp://192.0.2.1:4444",
    }
    tree["data_loader"]["args"]["follow_links"] = True
    config.write_text(json.dumps(tree))
    model = DeepLabV3(dkd_heads(1, 15), backbone="tiny")
    torch.save({"state_dict": model.state_dict()}, folder / "w.pth")
    parsed = ConfigParser.from_args(
        "eval", "configs/config_voc.json", argv=["-r", str(folder / "w.pth")]
    )
    plan = plan_launch(parsed, {})
    assert (plan.world, plan.distributed, plan.nodes) == (1, False, 1)
    assert parsed["data_loader"]["args"]["follow_links"] is False
    run(parsed)
    assert not evil.exists()
    assert {path.name for path in folder.iterdir()} == {"config.json", "w.pth"}
    assert {path.name for path in here.iterdir()} == {"saved_voc", "data"}


def test_keys_that_a_downloaded_config_has_no_say_in():
    assert {dotted for dotted, key in SCHEMA.items() if key.local} == {
        *("n_gpu", "multiprocessing_distributed", "rank", "world_size"),
        *("dist_backend", "dist_url", "trainer.save_dir", "data_loader.args.follow_links"),
        *("fast.compile", "data_loader.args.num_workers"),
        *("data_loader.args.val.batch_size", "data_loader.args.test.batch_size"),
    }
    paths = {dotted for dotted in SCHEMA if dotted.endswith(("_dir", "_path"))}
    assert paths == {
        "trainer.save_dir",  # not from beside weights
        "data_loader.args.data_dir",  # read only
        "data_loader.args.saliency_dir",  # read only
        "data_loader.args.task.idxs_path",  # then read only: the cache goes to the default
    }


def test_types_in_a_config_are_looked_up_and_never_imported(tmp_path, toy_root):
    for key in ("arch", "data_loader", "optimizer", "lr_scheduler", "evaluator"):
        config = write_config(tmp_path / f"{key}.json", toy_root)
        tree = json.loads(config.read_text())
        tree.setdefault(key, {})["type"] = "os.system"
        config.write_text(json.dumps(tree))
        with pytest.raises(UserError, match=f"{key}.type is 'os.system'"):
            run(
                ConfigParser.from_args("train", "configs/config_voc.json", argv=["-c", str(config)])
            )
    assert Path(tmp_path / "runs").exists() is False
