"""What the log says before a step starts: its classes, devices, batches, and what is unusual."""

from __future__ import annotations

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from base.base_method import BaseMethod
from base.base_model import BaseModel
from data_loader.data_loaders import IncrementalDataLoader
from utils.errors import listing
from utils.logger import log
from utils.parse_config import ConfigParser
from utils.processes.devices import no_gpu
from utils.ranks import Ranks
from utils.recipe import Recipe

MOST_LEFT = 0.05  # share of BatchNorm's first statistics that a step may leave without a warning


def announce(
    config: ConfigParser,
    ranks: Ranks,
    method: BaseMethod,
    data: IncrementalDataLoader,
    *,
    trains: bool,
) -> None:
    """Log the step, its processes and batches, and warn of what users tend to overlook."""
    task = method.task
    log.info(
        "%s %s %s, step %d of 0..%d%s, method %s: %d old and %d new classes (%s)",
        task.dataset,
        task.setting,
        task.name,
        task.schedule_step,
        task.schedule_step + len(task.steps) - 1 - task.step,
        ", joint: all its classes at once" if task.joint else "",
        config["method"],
        len(task.old),
        len(task.new),
        listing((task.class_names[label] for label in task.new), most=20),
    )
    on_cpu = ranks.device.type == "cpu"
    device = "CPU" if on_cpu else torch.cuda.get_device_name(ranks.device)
    log.info("%d process(es) on %s", ranks.world, device)
    if on_cpu and config.call.device != "cpu":
        log.warning(
            "NO GPU IS USED: %s, so this runs on the CPU, which is far slower; -d cpu says that it "
            "is meant",
            no_gpu(),
        )
    if not trains:
        return
    if len(task.schedule) > 1:
        for warning in config.warnings:
            log.warning("%s", warning)
    _announce_batches(ranks, data, frozen=config["arch"]["args"]["freeze_all_bn"])
    if task.published and config.recipe is not None:
        _compare_with_recipe(config.recipe, config, data)
    memory = config["data_loader"]["args"]["memory"]
    replays = task.step > 0 and memory["mem_size"] > 0
    if replays and memory["labels"] != "current" and not method.learns_old:
        log.warning(
            "memory.labels is '%s', but %s reads labels of new classes only: it learns what it "
            "learns with 'current'",
            memory["labels"],
            config["method"],
        )
    if config["trainer"]["monitor"] != "off" and not data.splits["val"]["cross_val"]:
        log.warning(
            "trainer.monitor chooses on validation images, and those are test images as well: set "
            "data_loader.args.val.cross_val to choose on training images that are held out"
        )


def _announce_batches(ranks: Ranks, data: IncrementalDataLoader, *, frozen: bool) -> None:
    """How large the global batch is and what BatchNorm sees of it."""
    log.info("global batch: %d, %s", data.global_batch, data.batch_text())
    if not frozen:
        synchronised = ranks.world > 1 and ranks.device.type == "cuda"
        scope = "synchronised over the GPUs" if synchronised else "of each process and batch alone"
        log.info("BatchNorm: statistics over %d images, %s", data.norm_batch, scope)
        return
    log.info("BatchNorm: frozen, with the statistics of the weights it starts from")
    if data.task.step == 0:
        log.warning("step 0 with frozen BatchNorm: the ASPP keeps its initial statistics for ever")


def announce_statistics(
    config: ConfigParser, data: IncrementalDataLoader, student: BaseModel
) -> None:
    """Warn where a step is too short for the backbone's BatchNorm to learn its statistics.

    Each batch leaves 1 - momentum of what they were.
    """
    norms = [each for each in student.parts().backbone.modules() if isinstance(each, _BatchNorm)]
    if student.frozen_bn or not norms:
        return
    batches = config["trainer"]["epochs"] * data.train_batches.iterations * data.accumulate
    momentum = norms[0].momentum or 0.0
    left = (1 - momentum) ** batches
    if left > MOST_LEFT:
        log.warning(
            "arch.args.backbone_bn_momentum is %g, too little for the %d iterations of this step: "
            "%.0f %% of the statistics that the backbone's BatchNorm starts with are left at its "
            "end; from %.2g on it is less than %.0f %%",
            momentum,
            batches,
            100 * left,
            1 - MOST_LEFT ** (1 / batches),
            100 * MOST_LEFT,
        )


def _compare_with_recipe(recipe: Recipe, config: ConfigParser, data: IncrementalDataLoader) -> None:
    """One warning about all that the published runs of this method have otherwise."""
    flat = config.flat()
    lines = [
        f"{key} is {flat.get(key)} instead of {value}"
        for key, value in recipe.values.items()
        if flat.get(key) != value
    ]
    if data.global_batch != recipe.global_batch:
        lines.append(
            f"the global batch is {data.global_batch} instead of {recipe.global_batch} (change "
            "--batch_size, the processes or --accumulate)"
        )
    elif (
        recipe.synchronised_bn
        and data.norm_batch < recipe.global_batch
        and not config["arch"]["args"]["freeze_all_bn"]
    ):
        lines.append(
            f"BatchNorm sees {data.norm_batch} images at a time instead of {recipe.global_batch} "
            "(accumulation does not change that, more images per GPU or more GPUs do)"
        )
    if lines:
        log.warning(
            "figures will differ from the published ones, whose recipe is %s: %s",
            recipe.file,
            "; ".join(lines),
        )
