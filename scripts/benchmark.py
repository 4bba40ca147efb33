"""How fast is this project, and how far from what the machine allows?

    python scripts/benchmark.py [data|loss|step|eval|scan|growth|all] [--device cpu|cuda|cuda:1]
                                [--json FILE] [--quick] [--cpu_time]

Each section measures this project in turn with a *plain* implementation of the same formulas and
with a *limit*: the part of the work that nobody can leave out. Before a time counts, both must give
the same numbers. The plain way is how codes of this field go about it: labels masked by a Python
lambda per pixel, images made float and normalised one by one on the CPU, losses and their targets
at full resolution (the definitions in `models/loss.py`), every term fetched with `.item()`,
evaluation image by image with NumPy.

It needs no data: images and masks of VOC's size are drawn into a temporary folder. `--quick`
only shows that all works; its tiny network says nothing about speed. Called by hand.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import partial
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import utils  # noqa: F401, says how threads wait, before torch is imported

os.environ.setdefault("TQDM_DISABLE", "1")  # a progress bar would be measured as well

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as transforms

from base.base_method import BaseMethod, Batch
from base.base_model import BaseModel, ModelOutput
from base.task import Task
from data_loader.dataset import IncrementalDataset, Sample
from data_loader.transforms import IMAGENET_MEAN, IMAGENET_STD, TrainTransform, normalize
from data_loader.voc import VOC
from models import fused_loss
from models.fast_loss import by_definition
from models.weights import load_previous_step
from scripts.make_toy_voc import make_image
from scripts.measure import Row, forget_peak, in_turn, largest, must_agree, resident, say, table
from trainer.build import apply_fast, build_model
from trainer.evaluation import Evaluation
from trainer.methods import METHODS
from trainer.optim import build_optimizer, build_scheduler
from trainer.trainer import Trainer
from utils.distributed import Launch, Ranks, launch
from utils.misc import (
    PROJECT_ROOT,
    VOID,
    UserError,
    choose,
    cores,
    keep_freed_memory,
    one_sentence_errors,
    seed_from,
    voc_palette,
    write_json,
)
from utils.parse_config import ConfigParser

# glibc gives back at once what is freed, so that no call can live on the remains of another.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
BOTH = ("plain", "ours")
BUSY = 0.5  # processes that want a core before anything is measured
ITERATIONS = 10_000  # of the schedule, more than are measured
LABELS_END = 254  # channels are uint8, and 255 is void

Shape = tuple[int, ...]  # classes of each step; the last is trained, those before it are taught
VOC_STEP = {"VOC 15-5, step 1": (15, 5)}
VOC_LAST = {"VOC 15-1, step 5": (15, *[1] * 5)}
ADE_LAST = {"ADE 100-10, step 5": (100, *[10] * 5)}


# ----------------------------------------------------------------------------- what and how much
@dataclass(frozen=True)
class Plan:
    """How much is measured; the defaults are those of a full run on a CPU.

    Attributes:
        device: where networks and losses compute.
        rounds: measurements of each way at least; their median counts.
        budget: seconds in which there may be more.
        warm: rounds before.
        clock: what tells the seconds.
        pictures, masks: images and masks drawn for `data` and `scan`.
        backbone, crop, batch: of `step` and `eval`.
        shapes: of `step`; the first is also that of `eval`.
        losses: old classes, new classes and image side of `loss`.
        growth: backbone and crop of `growth`.
        grown: its shapes.
    """

    device: torch.device
    rounds: int = 3
    budget: float = 5
    warm: int = 0
    clock: Callable[[], float] = time.perf_counter
    pictures: int = 24
    masks: int = 10_582
    backbone: str = "resnet101"
    crop: int = 512
    batch: int = 2
    shapes: Mapping[str, Shape] = field(default_factory=lambda: VOC_STEP | ADE_LAST)
    losses: Sequence[Shape] = ((15, 5, 512), (100, 10, 512), (140, 10, 512), (990, 10, 128))
    growth: tuple[str, int] = ("tiny", 256)
    grown: Sequence[Shape] = (
        *((10, 10), (140, 10), (LABELS_END - 10, 10)),
        *((15, 1), (15, *[1] * 4), (15, *[1] * 9)),
    )


def make_plan(device: torch.device, quick: bool) -> Plan:
    """What to measure on a device; `quick`: only as much as shows that it works."""
    plan = Plan(device)
    if device.type == "cuda":
        shapes = VOC_STEP | VOC_LAST | ADE_LAST
        plan = replace(plan, warm=3, batch=8, shapes=shapes, growth=("resnet101", 512))
    if quick:
        plan = replace(plan, rounds=2, budget=0.5, pictures=4, masks=64, shapes=VOC_STEP)
        plan = replace(plan, backbone="tiny", crop=64, losses=((15, 5, 128),))
        plan = replace(plan, growth=("tiny", 64), grown=((10, 10),))
    return plan


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures belong to."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.is_file() else ""
    model = re.search(r"^model name\s*: (.*)$", text, re.M)
    cuda = device.type == "cuda"
    return {
        "cpu": model[1] if model else platform.processor() or platform.machine(),
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
    }


# ------------------------------------------------------------------------------------ measuring
def timed(plan: Plan, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each call."""
    cuda = plan.device.type == "cuda"
    wait = partial(torch.cuda.synchronize, plan.device) if cuda else lambda: None
    return in_turn(calls, plan.rounds, plan.budget, plan.warm, wait, plan.clock)


def extra_memory(
    plan: Plan, ways: Sequence[str], make: Callable[..., Callable[[], object]], *args: Any
) -> dict[str, float]:
    """MiB that a call needs at its peak beyond what lay there before, each way.

    Args:
        plan: names the device; on a CPU each way is called in a fresh process.
        ways: "plain", "ours", ….
        make: from one of them, the image side, more of `args` and the device to the call.
        args: image side first.
    """
    jobs = [(make, way, *args, plan.device) for way in ways]
    if plan.device.type == "cuda":
        return {way: peak(*job) for way, job in zip(ways, jobs, strict=True)}
    with giving_back(), get_context("spawn").Pool(len(jobs), maxtasksperchild=1) as pool:
        return dict(zip(ways, pool.starmap(peak, jobs, chunksize=1), strict=True))


@contextmanager
def giving_back() -> Iterator[None]:
    """Let processes started now give memory back as soon as it is freed, which makes them slow."""
    os.environ.update(GIVE_BACK)
    try:
        yield
    finally:
        for name in GIVE_BACK:
            del os.environ[name]


def peak(make: Callable[..., Callable[[], object]], way: str, side: int, *args: Any) -> float:
    """MiB of one way; on a CPU right only once per process."""
    make(way, 64, *args)()  # libraries, threads and handles are no part of the peak
    return beyond(make(way, side, *args), args[-1])


def beyond(call: Callable[[], object], device: torch.device) -> float:
    """MiB that a call needs at its peak beyond what lies there now."""
    call()  # leaves gradients and momentum; on CUDA it also chooses algorithms, some with much room
    gc.collect()
    if device.type == "cpu":
        forget_peak()
        before = resident("VmRSS")
        call()
        return max(0.0, resident("VmHWM") - before)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    call()
    return (torch.cuda.max_memory_allocated(device) - held) / 2**20


# ------------------------------------------------------------------------------------------ data
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
            mask = Image.fromarray(labels)
            mask.putpalette(voc_palette())
            mask.save(root / f"SegmentationClass/{number}.png")
        (root / "SegmentationClassAug").mkdir()
        for number in range(masks):
            source = root / f"SegmentationClass/{number % pictures}.png"
            shutil.copyfile(source, root / f"SegmentationClassAug/{number}.png")
        for split, count in (("val", pictures), ("train_aug", masks)):
            text = "".join(f"{number}\n" for number in range(count))
            (root / f"ImageSets/Segmentation/{split}.txt").write_text(text)
        yield root


def decoded_crop(dataset: IncrementalDataset, position: int) -> tuple[Image.Image, Image.Image]:
    """Decode an image and its mask, and crop, resize and flip both: the limit of a sample.

    Draws the random numbers that the data set draws.
    """
    entry = dataset.raw.entries[dataset.indices[position]]
    image, mask = Image.open(entry.image).convert("RGB"), Image.open(entry.mask)
    torch.default_generator.manual_seed(seed_from(*dataset.seed, 0, entry.id))
    preset = dataset.transform
    box = RandomResizedCrop.get_params(image, list(preset.scale), list(preset.ratio))
    modes = transforms.InterpolationMode
    image = transforms.resized_crop(image, *box, preset.size, interpolation=modes.BILINEAR)
    mask = transforms.resized_crop(mask, *box, preset.size, interpolation=modes.NEAREST)
    if torch.rand(1) < preset.flip:
        image, mask = transforms.horizontal_flip(image), transforms.horizontal_flip(mask)
    return image, mask


def plain_sample(
    dataset: IncrementalDataset, position: int, channels: dict[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """image [3, H, W] float32, normalised, and labels [H, W]; a lambda looks at every pixel."""
    image, mask = decoded_crop(dataset, position)
    pixels = np.asarray(mask).flatten().tolist()
    labels = list(map(lambda label: channels.get(label, 0), pixels))  # noqa: C417
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
    image = transforms.normalize(pixels, list(IMAGENET_MEAN), list(IMAGENET_STD))
    return image, torch.tensor(labels).view(mask.height, mask.width)


def measure_data(plan: Plan) -> list[Row]:
    """Samples of one loading process, 500×375 → crop 512; ours leaves normalising to the device."""
    with drawn(plan.pictures, 1) as root:
        table = np.zeros(256, dtype=np.uint8)
        table[16:21], table[VOID] = range(16, 21), VOID
        channels = {label: int(channel) for label, channel in enumerate(table) if channel}
        raw = VOC("val", str(root))
        dataset = IncrementalDataset(raw, range(len(raw)), table, TrainTransform(512), (1, 1))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in the processes of a loader
        keep_freed_memory()
        try:
            for position in range(len(dataset)):
                image, labels = plain_sample(dataset, position, channels)
                ours = dataset[position]
                must_agree("data, image", image, normalize(ours.image[None])[0], 0)
                must_agree("data, labels", labels, ours.label, 0)
            positions = range(len(dataset))
            seconds = timed(
                plan,
                {
                    "plain": lambda: [plain_sample(dataset, p, channels) for p in positions],
                    "ours": lambda: [dataset[p] for p in positions],
                    "limit": lambda: [decoded_crop(dataset, p) for p in positions],
                },
            )
        finally:
            torch.set_num_threads(threads)
    rates = {name: len(dataset) / value for name, value in seconds.items()}
    return [Row("data", "one process, crop 512", "images/s", **rates)]


# ------------------------------------------------------------------------------------------ loss
class NewFirst(Task):
    """A step whose new classes have the first channels and the old ones those behind.

    Only so can labels, which are uint8, name the new classes among more than 254.
    """

    @property
    def new_channels(self) -> slice:
        return slice(1, 1 + len(self.new))

    @property
    def old_channels(self) -> slice:
        return slice(1 + len(self.new), 1 + len(self.seen))


def make_task(shape: Shape) -> Task:
    """The last step of a schedule with so many classes per step."""
    ends = np.cumsum(shape).tolist()
    steps = tuple(tuple(range(1 + end - n, 1 + end)) for end, n in zip(ends, shape, strict=True))
    kind = Task if ends[-1] <= LABELS_END else NewFirst
    names = tuple(f"class{label}" for label in range(1 + ends[-1]))
    return kind("benchmark", "own", "overlap", len(shape) - 1, steps, names)


def defined_losses(method: BaseMethod, *given: Any) -> dict[str, torch.Tensor]:
    """`method.losses` in the plain way: at full resolution, as `models/loss.py` defines them."""
    with by_definition():
        return method.losses(*given)


def weighted(method: BaseMethod, terms: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scalar whose gradient is taken."""
    return sum(method.weights[name] * term.sum() for name, term in terms.items())


def make_loss(
    way: str, side: int, old: int, new: int, device: torch.device
) -> Callable[[], dict[str, torch.Tensor]]:
    """All terms forward and backward for two images, from logits at a sixteenth of their side.

    Returns:
        The call, which returns terms and gradients by name.
    """
    method = METHODS["dkd"](make_task((old, new)), {"pos_weight": 2})
    generator = torch.Generator().manual_seed(0)

    def outputs(channels: int, parts: int, trained: bool) -> ModelOutput:
        counts = (channels, parts, parts)
        maps = (2 * torch.randn(2, n, side // 16, side // 16, generator=generator) for n in counts)
        return ModelOutput(*(x.to(device).requires_grad_(trained) for x in maps))

    channels = method.task.new_channels
    student = outputs(1 + old + new, old + new, True)
    teacher = outputs(method.task.old_channels.stop, old, False)
    labels = torch.randint(0, new + 2, (2, side, side), generator=generator)
    labels = torch.where(labels < 2, labels * VOID, labels + channels.start - 2)
    labels = labels.to(torch.uint8).to(device)
    losses = partial(defined_losses, method) if way == "plain" else method.losses
    leaves = {name: x for name, x in student._asdict().items() if x is not None}

    def call() -> dict[str, torch.Tensor]:
        fused_loss.switched_on = way == "fused"
        for leaf in leaves.values():
            leaf.grad = None
        terms = losses(Batch(None, labels), student, teacher, None)
        weighted(method, terms).backward()
        slopes = {f"{name} slope": x.grad for name, x in leaves.items()}
        return {name: term.detach() for name, term in terms.items()} | slopes

    return call


def measure_loss(plan: Plan) -> list[Row]:
    """The loss terms alone, forward and backward; where it can run, also in the fused kernel."""
    rows = []
    for old, new, side in plan.losses:
        what = f"{1 + old + new} classes, {new} new, 2 × {side}²"
        say(f"loss: {what}")
        ways = ["plain", "ours", "fused"][: 2 if fused_loss.fault(plan.device) else 3]
        calls = {way: make_loss(way, side, old, new, plan.device) for way in ways}
        plain, *others = (call() for call in calls.values())
        for name, values in plain.items():
            for ours in others:
                must_agree(f"loss, {name}", values.cpu(), ours[name].cpu(), 1e-5)
        del plain, others
        times = {name: 1e3 * value for name, value in timed(plan, calls).items()}
        used = extra_memory(plan, ways, make_loss, side, old, new)
        rows.append(Row("loss", what, "ms", times["plain"], times["ours"]))
        rows.append(Row("loss", "  extra memory", "MiB", used["plain"], used["ours"]))
        if "fused" in ways:
            rows.append(Row("loss", "  fused kernel", "ms", times["plain"], times["fused"]))
            rows.append(Row("loss", "  extra memory", "MiB", used["plain"], used["fused"]))
    return rows


# ------------------------------------------------------------------------------- step, evaluation
class Stub:
    """What a trainer reads of a loader bundle before any loading."""

    def __init__(self, task: Task):
        self.task = task

    def one_size(self, kind: str) -> bool:
        return True


class Net:
    """A step's networks with random weights and what trains them, wired as a run does.

    The same arguments give the same weights.
    """

    def __init__(self, shape: Shape, backbone: str, device: torch.device):
        self.task, self.device = make_task(shape), device
        argv = ["--task_name=15-5", "--task_step=1", "--freeze_bn", "--lr=1e-4"]
        self.config = ConfigParser.from_args("train", "configs/config_voc.json", argv=argv)
        self.method = METHODS["dkd"](self.task, self.config["hyperparameter"])
        torch.manual_seed(0)
        plan, arch = self.method.heads(), {"backbone": backbone, "backbone_pretrained": False}
        self.teacher = build_model(self.config, plan.previous(), **arch)
        for name, parameter in self.teacher.named_parameters():
            if name.endswith("bn3.weight"):
                # Else the frozen BatchNorm of a random network lets every block double its values.
                torch.nn.init.constant_(parameter, 0.2)
        self.student = build_model(self.config, plan, **arch, dropout=False)
        new, weights = len(plan.sizes) - 1, self.teacher.state_dict()
        load_previous_step(self.student, weights, new, "the teacher")
        self.method.start(self.student, {})
        self.teacher.requires_grad_(False).eval().to(device)
        self.student.train().to(device)
        torch.backends.cudnn.benchmark = True

    def autocast(self) -> torch.amp.autocast:
        """Mixed precision where a run uses it."""
        kind = self.device.type
        dtype = getattr(torch, self.config["amp_dtype"])
        return torch.amp.autocast(kind, dtype, enabled=self.config["use_amp"] and kind == "cuda")

    def trainer(self, ranks: Ranks | None = None) -> Trainer:
        """The project's own, made as a run makes it for training."""
        ranks = ranks or Ranks(0, 1, self.device)
        apply_fast(self.config, self.student, self.teacher, trains=True)
        optimizer = build_optimizer(self.config, self.method, self.student)
        scheduler = build_scheduler(self.config, optimizer, ITERATIONS)
        parts: dict[str, Any] = {"method": self.method, "student": self.student}
        parts |= {"teacher": self.teacher, "optimizer": optimizer, "scheduler": scheduler}
        return Trainer(self.config, ranks, data=Stub(self.task), record={}, **parts)

    def evaluation(self) -> Evaluation:
        """The project's own, made as a run makes it for evaluation."""
        apply_fast(self.config, self.student, trains=False)
        parts: dict[str, Any] = {"method": self.method, "student": self.student}
        return Evaluation(self.config, Ranks(0, 1, self.device), data=Stub(self.task), **parts)

    def batch(self, count: int, side: int) -> Sample:
        """Random images and labels of the classes."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (count, 3, side, side), generator=generator)
        coarse = torch.randint(0, 2 + len(self.task.seen), (count, 1, 8, 8), generator=generator)
        labels = F.interpolate(coarse.float(), size=(side, side))[:, 0].to(torch.uint8)
        labels[labels > len(self.task.seen)] = VOID
        return Sample(images.to(torch.uint8), labels, [str(number) for number in range(count)])

    def plain_step(self) -> Callable[[torch.Tensor, torch.Tensor], dict[str, float]]:
        """A training step in the plain way; every term is fetched."""
        args = dict(self.config["optimizer"]["args"])
        groups = self.method.parameter_groups(self.student, args["lr"], args["weight_decay"])
        optimizer = torch.optim.SGD(groups, **args)
        scheduler = build_scheduler(self.config, optimizer, ITERATIONS)
        mixed = self.config["use_amp"] and self.device.type == "cuda"
        scaler = torch.amp.GradScaler(self.device.type, enabled=mixed)

        def step(images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
            optimizer.zero_grad()
            with self.autocast():
                outputs = self.student(images, self.method.wants)
                with torch.no_grad():
                    targets = self.teacher(images, self.method.wants)
            terms = defined_losses(self.method, Batch(images, labels), outputs, targets, None)
            loss = weighted(self.method, terms)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            return {"loss": loss.item()} | {name: t.mean().item() for name, t in terms.items()}

        return step

    def network_only(self, images: torch.Tensor) -> None:
        """Teacher forward, student forward and backward; the loss is the sum of the outputs."""
        with self.autocast():
            outputs = self.student(images, self.method.wants)
            with torch.no_grad():
                self.teacher(images, self.method.wants)
        self.student.zero_grad(set_to_none=True)
        sum(output.float().sum() for output in outputs if output is not None).backward()


def make_step(
    way: str, side: int, shape: Shape, backbone: str, batch: int, device: torch.device
) -> Callable[[], Any]:
    """One training step: in the plain way, ours, or ("limit") the network alone."""
    net = Net(shape, backbone, device)
    sample = net.batch(batch, side)
    images, labels = normalize(sample.image.to(device)), sample.label.to(device)
    if way == "plain":
        return partial(net.plain_step(), images, labels)
    trainer = net.trainer()
    if way == "limit":  # the networks as the trainer has them
        return partial(net.network_only, images)
    return lambda: trainer.train_step([(images, labels)])


def fits(plan: Plan, way: str, shape: Shape, batch: int) -> bool:
    """Whether training steps with this batch find room on the GPU."""
    try:
        call = make_step(way, plan.crop, shape, plan.backbone, batch, plan.device)
        call()
        call()  # the first had no momentum yet
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        call = None
        gc.collect()
        torch.cuda.empty_cache()


def step_seconds(plan: Plan, side: int, *args: Any) -> dict[str, float]:
    """Median seconds of a step each way, once the first steps agree."""
    calls = {way: make_step(way, side, *args, plan.device) for way in ("plain", "ours", "limit")}
    plain, ours = calls["plain"](), calls["ours"]()
    for name, value in plain.items():  # half precision leaves three digits
        tolerance = 1e-3 if plan.device.type == "cpu" else 3e-2
        must_agree(f"step, {name}", value, ours[name].item(), tolerance)
    return timed(plan, calls)


def measure_step(plan: Plan) -> list[Row]:
    """Whole training steps: student, teacher, DKD, SGD; on a GPU also memory and largest batch."""
    rows = []
    for what, shape in plan.shapes.items():
        say(f"step: {what}, {plan.backbone}, {plan.batch} × {plan.crop}²")
        args = (plan.crop, shape, plan.backbone, plan.batch)
        seconds = step_seconds(plan, *args)
        rates = {name: plan.batch / value for name, value in seconds.items()}
        rows.append(Row("step", f"{what}, {plan.backbone}", "images/s", **rates))
        if plan.device.type != "cuda":
            continue
        used = extra_memory(plan, BOTH, make_step, *args)
        rows.append(Row("step", "  extra memory", "MiB", **used))
        say(f"step: {what}, the largest batch that fits")
        most = {way: float(largest(partial(fits, plan, way, shape))) for way in BOTH}
        rows.append(Row("step", "  largest batch", "images", **most))
    return rows


@torch.no_grad()
def plain_evaluate(net: Net, student: BaseModel, samples: Sequence[Sample]) -> np.ndarray:
    """The confusion matrix of images that come one by one, counted on the host."""
    classes = 1 + len(net.task.seen)
    confusion = np.zeros((classes, classes), dtype=np.int64)
    student.eval()
    for sample in samples:
        images = transforms.normalize(
            sample.image.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD)
        )
        with net.autocast():
            logits = student(images.to(net.device)).logits
        size = sample.label.shape[-2:]
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)
        scores = logits[0, 1:].sigmoid().cpu().numpy()
        preds = scores.argmax(axis=0) + 1
        preds[scores.max(axis=0) <= 0.5] = 0
        labels = sample.label[0].numpy()
        counted = labels != VOID
        cells = classes * labels[counted].astype(np.int64) + preds[counted]
        confusion += np.bincount(cells, minlength=classes**2).reshape(classes, classes)
    return confusion


def measure_eval(plan: Plan) -> list[Row]:
    """Evaluation of images that are decoded already."""
    what, shape = next(iter(plan.shapes.items()))
    say(f"eval: {what}, {plan.backbone}, {plan.crop}²")
    net = Net(shape, plan.backbone, plan.device)
    student, evaluation = copy.deepcopy(net.student), net.evaluation()
    whole = net.batch(2 * plan.batch, plan.crop)
    count = len(whole.name)
    single, batches = (
        [Sample(*(part[i : i + n] for part in whole)) for i in range(0, count, n)]
        for n in (1, plan.batch)
    )

    @torch.inference_mode()
    def network_only() -> None:
        for batch in batches:
            with net.autocast():
                net.student(normalize(batch.image.to(plan.device)))

    def ours() -> np.ndarray:
        with redirect_stderr(StringIO()):  # the progress bar
            return evaluation.evaluate(batches, "test")

    plain = partial(plain_evaluate, net, student, single)
    tolerance = 1e-3 if plan.device.type == "cpu" else 3e-2
    must_agree("eval, confusion matrix", plain(), ours(), tolerance)
    seconds = timed(plan, {"plain": plain, "ours": ours, "limit": network_only})
    rates = {name: count / value for name, value in seconds.items()}
    return [Row("eval", f"{what}, {plan.backbone}", "images/s", **rates)]


# --------------------------------------------------------------------------------- scan, growth
def measure_scan(plan: Plan) -> list[Row]:
    """Which classes each mask holds, and the same from the cache."""
    say(f"scan: {plan.masks} masks")
    with drawn(min(plan.pictures, plan.masks), plan.masks) as root:
        script = PROJECT_ROOT / "scripts" / "benchmark_scan.py"
        command = [sys.executable, script, root, str(plan.rounds), str(plan.budget)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
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


def measure_growth(plan: Plan) -> list[Row]:
    """Step time and memory with more classes, more heads and more processes.

    Labels are uint8, so a step cannot have more than 254 classes; `loss` goes on to 1001.
    """
    rows, (backbone, side) = [], plan.growth
    for shape in plan.grown:
        what = f"{1 + sum(shape)} classes, {1 + len(shape)} heads"
        say(f"growth: {what}, {backbone}, {plan.batch} × {side}²")
        args = (side, shape, backbone, plan.batch)
        milliseconds = {name: 1e3 * value for name, value in step_seconds(plan, *args).items()}
        rows.append(Row("growth", f"{what}, {backbone}", "ms", **milliseconds))
        used = extra_memory(plan, BOTH, make_step, *args)
        rows.append(Row("growth", "  extra memory", "MiB", **used))
    return rows + measure_processes(plan)


@dataclass(frozen=True)
class Job:
    """What each process of `measure_processes` is told.

    Attributes:
        plan: how much is measured.
        figures: where rank 0 leaves the loss and what it measured.
        memory: measure MiB, else seconds.
    """

    plan: Plan
    figures: Path
    memory: bool


def measure_processes(plan: Plan) -> list[Row]:
    """The same global batch in one process and in two; on a CPU they share the cores."""
    rows, losses, cuda = [], [], plan.device.type == "cuda"
    for count in range(1, 1 + (min(2, torch.cuda.device_count()) if cuda else 2)):
        what = f"{count} process(es), {2 * plan.batch} images in all"
        say(f"growth: {what}")
        with giving_back():
            loss, mebibytes = in_group(plan, count, memory=True)
        losses += [loss]
        loss, seconds = in_group(plan, count, memory=False)
        losses += [loss]
        must_agree("growth, loss of the processes", losses, losses[:1] * len(losses), 1e-3)
        rows.append(Row("growth", f"{what}, {plan.growth[0]}", "ms", None, 1e3 * seconds))
        rows.append(Row("growth", "  extra memory of each", "MiB", None, mebibytes))
    return rows


def in_group(plan: Plan, count: int, *, memory: bool) -> list[float]:
    """Loss of a training step in so many processes, and its MiB or seconds."""
    cuda = plan.device.type == "cuda"
    devices = [torch.device("cuda", rank) if cuda else plan.device for rank in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        job = Job(plan, Path(folder) / "figures.json", memory)
        launch(
            train_in_group,
            job,
            Launch(
                devices=tuple(devices),
                nodes=1,
                node=0,
                backend="nccl" if cuda else "gloo",
                url=f"file://{folder}/meet",
                by_torchrun=False,
                distributed=True,
                world=count,
            ),
        )
        return json.loads(job.figures.read_text())


def train_in_group(job: Job, ranks: Ranks) -> None:
    """Training steps of one process, which has its share of the batch."""
    plan, (backbone, side) = job.plan, job.plan.growth
    net = Net((15, 5), backbone, ranks.device)
    trainer = net.trainer(ranks)

    def batch(side: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = net.batch(2 * plan.batch, side)
        images, labels = (x[ranks.rank :: ranks.world] for x in (sample.image, sample.label))
        return normalize(images.to(ranks.device)), labels.to(ranks.device)

    whole = batch(side)
    loss = ranks.sum(trainer.train_step([whole])["loss"]).item() / ranks.world
    if job.memory:
        value = beyond(lambda: trainer.train_step([whole]), ranks.device)
    else:
        # As many steps in every process: they wait for each other.
        counted = replace(plan, rounds=10, budget=0, device=ranks.device)
        value = timed(counted, {"step": lambda: trainer.train_step([whole])})["step"]
        if plan.clock is time.process_time:
            value = ranks.sum(torch.tensor(value)).item()
    if ranks.is_main:
        write_json(job.figures, [loss, value])


SECTIONS: dict[str, Callable[[Plan], list[Row]]] = {
    "data": measure_data,
    "loss": measure_loss,
    "step": measure_step,
    "eval": measure_eval,
    "scan": measure_scan,
    "growth": measure_growth,
}


def find_device(text: str) -> torch.device:
    """The device of `--device`."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise UserError(f"--device is '{text}'; valid: cpu, cuda, cuda:1, ….")
    device = torch.device(text)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device is '{text}', but there are {torch.cuda.device_count()} GPUs.")
    return device


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Parse the arguments, measure, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("section", nargs="?", default="all", help="what to measure; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="count the seconds of all cores together, which other work hardly moves "
        "(not in scan, whose processes are many)",
    )
    args = parser.parse_args(argv)
    choose("the section", args.section, [*SECTIONS, "all"])
    device = find_device(args.device)
    if args.cpu_time and device.type != "cpu":
        raise UserError("--cpu_time is for --device cpu; a GPU's seconds are those of the clock.")
    plan, rows, about = make_plan(device, args.quick), [], machine(device)
    if args.cpu_time:
        plan, about = replace(plan, clock=time.process_time), {**about, "seconds": "CPU"}
    for name in SECTIONS if args.section == "all" else [args.section]:
        say(name)
        rows += SECTIONS[name](plan)
        if args.json:  # after every section, for a later one may fail
            figures = [row.as_dict() for row in rows]
            write_json(args.json, {"machine": about, "quick": args.quick, "rows": figures})
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if about["load"] > BUSY:
        print(
            f"load {about['load']:.1f} before the start: others disturb the clock, see --cpu_time"
        )
    print(table(rows))
    return rows


if __name__ == "__main__":
    with one_sentence_errors():
        main()
