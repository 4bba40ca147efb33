"""The replay memory of a step (DKD-M, SSUL-M): the old model over old data, choose, write, read.

It knows neither optimizer nor loop: nothing is trained yet.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from base.base_method import BaseMethod
from base.base_model import BaseModel
from base.task import Task
from data_loader import exemplars
from data_loader.data_loaders import IncrementalDataLoader
from data_loader.exemplars import Candidate
from data_loader.transforms import normalize
from models.pixels import size_of
from utils.errors import UserError, listing
from utils.labels import BACKGROUND
from utils.logger import log, progress
from utils.parse_config import ConfigParser
from utils.ranks import Ranks
from utils.seeds import seed_from


def replay(
    config: ConfigParser,
    ranks: Ranks,
    data: IncrementalDataLoader,
    method: BaseMethod,
    student: BaseModel,
    *,
    resumed: bool,
) -> None:
    """Give the step its exemplars: choose them and write `memory.json`, or read it on resuming.

    Rank 0 chooses, all ranks read the same file.

    Args:
        method: says what the old model sees in the background.
        student: with the previous step's weights, on the device; its new head is not used.
        resumed: the step goes on from a checkpoint.

    Raises:
        UserError: the previous memory is missing or faulty.
    """
    task = data.task
    file = config.step_dir() / exemplars.FILE
    if ranks.is_main and not (resumed and file.is_file()):
        earlier = {} if task.step == 1 else read_previous(config, task)
        kept = exemplars.stored(earlier, task.step - 1)
        lines = {entry.id: entry.line for entry in data.source["train"].entries}
        if strange := [candidate.name for candidate in kept if candidate.name not in lines]:
            raise UserError(
                f"memory list {previous_file(config)} names image {strange[0]}, which is not in "
                f"the training list of {data.source['train'].root}."
            )
        size = config["data_loader"]["args"]["memory"]["mem_size"]
        fresh = find_candidates(data.candidate_loader(), method, student, ranks.device)
        pool = exemplars.merge(kept, fresh)
        seed = seed_from(config["seed"], task.step, "memory")
        chosen = exemplars.choose(pool, task.old, size, seed)
        if not any(chosen.values()):
            raise UserError(
                f"none of {len(pool)} candidates for the memory holds an old class, so that "
                "nothing could be replayed; check the masks of the step before (scripts/"
                "check_data.py), or set data_loader.args.memory.mem_size (--mem_size) to 0."
            )
        _report(file, task, chosen, len(pool), len(kept), size)
        file.parent.mkdir(parents=True, exist_ok=True)
        taken = [candidate for each in chosen.values() for candidate in each]
        exemplars.write(file, task.step, taken, earlier, lines)
    ranks.barrier()
    memory = exemplars.read(file, step=task.step, known={*task.ids, task.void})
    data.replay(exemplars.origins(memory, task.step))


def previous_file(config: ConfigParser) -> Path:
    """The `memory.json` of the step before."""
    return config.step_dir(config["data_loader"]["args"]["task"]["step"] - 1) / exemplars.FILE


def read_previous(config: ConfigParser, task: Task) -> dict[str, Any]:
    """The memories up to that of the step before, with label ids of old classes alone.

    Raises:
        UserError: as `data_loader.exemplars.read`.
    """
    known = {*task.ids, task.void}
    return exemplars.read(previous_file(config), task.old, step=task.step - 1, known=known)


@torch.inference_mode()
def find_candidates(
    loader: DataLoader, method: BaseMethod, student: BaseModel, device: torch.device
) -> list[Candidate]:
    """Which old classes each image of the previous step's training set shows.

    From the second increment on, background is first filled in with what the previous model is
    sure of, since the masks name only the classes of that step.

    Args:
        loader: `IncrementalDataLoader.candidate_loader()`.
        method: of the step that is about to be trained.
    """
    task = method.task
    assert method.replay_confidence is not None, "refused before anything was allocated"
    student.eval()
    candidates = []
    for batch in progress(loader, desc=f"replay candidates of step {task.step - 1}", unit="it"):
        labels = batch.label
        if task.step > 1:
            output = student(normalize(batch.image.to(device)), method.answers_from)
            old = output._replace(logits=output.logits[:, : task.old_channels.stop])
            channels, scores = method.confident(old, size_of(labels))
            labels = pseudo_label(channels.cpu(), scores.cpu(), labels, method.replay_confidence)
        for name, label in zip(batch.name, labels.numpy(), strict=True):
            shown = np.setdiff1d(label, (BACKGROUND, np.iinfo(label.dtype).max))
            candidates.append(Candidate(name, tuple(task.label_ids()[shown].tolist())))
    return candidates


def pseudo_label(
    channels: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, least: float
) -> torch.Tensor:
    """Fill the background with the previous model's confident classes.

    Args:
        channels, scores: [N, H, W], of `BaseMethod.confident`.
        labels: [N, H, W] channels.
        least: score from which a class counts.

    Returns:
        [N, H, W] channels.
    """
    sure = (labels == BACKGROUND) & (scores >= least)
    return torch.where(sure, channels.to(labels.dtype), labels)


def _report(
    file: Path, task: Task, chosen: dict[int, list[Candidate]], pool: int, kept: int, size: int
) -> None:
    total = sum(map(len, chosen.values()))
    log.info("memory: %d of %d candidates chosen, %d of them stored before", total, pool, kept)
    for label, taken in chosen.items():
        names = listing(sorted(c.name for c in taken)) or "none"
        log.info("memory: %s: %d exemplars: %s", task.class_names[label], len(taken), names)
    held = {label for taken in chosen.values() for c in taken for label in c.ids}
    without = [task.class_names[label] for label in task.old if label not in held]
    if without:
        log.warning("memory: no candidate holds %s", listing(without))
    if total < size:
        log.warning("memory: %d exemplars were asked for, only %d could be found", size, total)
    most = math.ceil(size / len(task.old))
    log.info("memory: at most %d for each of %d classes; written: %s", most, len(task.old), file)
