"""The sections `data` and `scan`: samples of one loading process, and what masks hold."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from data_loader.dataset import IncrementalDataset
from data_loader.transforms import IMAGENET_MEAN, IMAGENET_STD, TrainTransform, normalize
from data_loader.voc import VOC
from scripts.benchmarking.measure import Row, must_agree, say
from scripts.benchmarking.plan import Plan, timed
from scripts.toy_data.shapes import make_image
from utils.files import PROJECT_ROOT
from utils.labels import VOID
from utils.machine import keep_freed_memory
from utils.pictures import palette_image
from utils.seeds import seed_from


@contextmanager
def drawn(pictures: int, masks: int) -> Iterator[Path]:
    """A temporary tree in VOC layout: `val` lists images with masks, `train` masks alone.

    Shapes on clouds with a texture that makes a JPEG of 500×375 about as large as VOC's.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
            (root / name).mkdir(parents=True)
        for number in range(pictures):
            pixels, labels = make_image(0, "val", number, (500, 375))
            rng = np.random.default_rng(number)
            coarse = Image.fromarray(rng.normal(0, 24, (125, 167)).astype(np.float32))
            grain = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC))
            grain = grain + rng.normal(0, 6, grain.shape)
            photo = Image.fromarray(np.clip(pixels + grain[..., None], 0, 255).astype(np.uint8))
            photo.save(root / f"JPEGImages/{number}.jpg", quality=92)
            palette_image(labels).save(root / f"SegmentationClass/{number}.png")
        (root / "SegmentationClassAug").mkdir()
        for number in range(masks):
            source = root / f"SegmentationClass/{number % pictures}.png"
            shutil.copyfile(source, root / f"SegmentationClassAug/{number}.png")
        for split, count in (("val", pictures), ("train_aug", masks)):
            text = "".join(f"{number}\n" for number in range(count))
            (root / f"ImageSets/Segmentation/{split}.txt").write_text(text, encoding="utf-8")
        yield root


def decoded_crop(
    dataset: IncrementalDataset, preset: TrainTransform, position: int
) -> tuple[Image.Image, Image.Image]:
    """Decode an image and its mask, and crop, resize and flip both: the limit of a sample.

    Draws the random numbers that the data set draws.
    """
    entry = dataset.source.entries[dataset.indices[position]]
    image, mask = Image.open(entry.image).convert("RGB"), Image.open(entry.mask)
    torch.default_generator.manual_seed(seed_from(*dataset.seed, 0, entry.id))
    box = RandomResizedCrop.get_params(image, list(preset.scale), list(preset.ratio))
    modes = transforms.InterpolationMode
    image = transforms.resized_crop(image, *box, preset.size, interpolation=modes.BILINEAR)
    mask = transforms.resized_crop(mask, *box, preset.size, interpolation=modes.NEAREST)
    if torch.rand(1) < preset.flip:
        image, mask = transforms.horizontal_flip(image), transforms.horizontal_flip(mask)
    return image, mask


def plain_sample(
    dataset: IncrementalDataset, preset: TrainTransform, position: int, channels: dict[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """image [3, H, W] float32, normalised, and labels [H, W]; a lambda looks at every pixel."""
    image, mask = decoded_crop(dataset, preset, position)
    ids = np.asarray(mask).flatten().tolist()
    labels = list(map(lambda label: channels.get(label, 0), ids))  # noqa: C417
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    normal = transforms.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
    return normal, torch.tensor(labels).view(mask.height, mask.width)


def measure_data(plan: Plan) -> list[Row]:
    """Samples of one loading process, 500×375 → crop 512; ours leaves normalising to the device."""
    with drawn(plan.pictures, 1) as root:
        table = np.zeros(256, dtype=np.uint8)
        table[16:21], table[VOID] = range(16, 21), VOID
        channels = {label: int(channel) for label, channel in enumerate(table) if channel}
        raw, preset = VOC("val", str(root)), TrainTransform(512)
        dataset = IncrementalDataset(raw, range(len(raw)), table, preset, (1, 1))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes of a loader
        keep_freed_memory()
        try:
            for position in range(len(dataset)):
                image, labels = plain_sample(dataset, preset, position, channels)
                ours = dataset[position]
                must_agree("data, image", image, normalize(ours.image[None])[0], 0)
                must_agree("data, labels", labels, ours.label, 0)
            positions = range(len(dataset))
            seconds = timed(
                plan,
                {
                    "plain": lambda: [
                        plain_sample(dataset, preset, p, channels) for p in positions
                    ],
                    "ours": lambda: [dataset[p] for p in positions],
                    "limit": lambda: [decoded_crop(dataset, preset, p) for p in positions],
                },
            )
        finally:
            torch.set_num_threads(threads)
    rates = {name: len(dataset) / value for name, value in seconds.items()}
    return [Row("data", "one process, crop 512", "images/s", **rates)]


def measure_scan(plan: Plan) -> list[Row]:
    """Which classes each mask holds, and the same from the cache."""
    say(f"scan: {plan.masks} masks")
    with drawn(min(plan.pictures, plan.masks), plan.masks) as root:
        script = PROJECT_ROOT / "scripts" / "benchmark_scan.py"
        command = [sys.executable, str(script), str(root), str(plan.rounds), str(plan.budget)]
        done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    seconds = json.loads(done.stdout.splitlines()[-1])
    busy = int(seconds.pop("cores"))
    rates = {name: plan.masks / value for name, value in seconds.items()}
    cached = rates.pop("cached")
    return [
        Row("scan", f"{plan.masks} masks, {busy} core(s)", "masks/s", **rates),
        Row("scan", "  from the cache", "masks/s", rates["plain"], cached),
    ]
