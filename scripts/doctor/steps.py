"""The data doctor judges the image sets of the steps, also against the published lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from base.base_dataset import BaseDataset
from base.task import SETTINGS, ClassNames, Task, make_task
from data_loader.splits import (
    HELD_OUT,
    derive,
    list_hash,
    list_name,
    published_file,
    published_lists,
    read_published,
)
from scripts.doctor.findings import SPLIT_NAMES, Faults
from utils.errors import UserError, listing
from utils.parse_config import ConfigParser

KINDS = {"train": "train", "val": "val", "test": "val"}  # image set of a step → its split


def published_faults(
    known: type[BaseDataset],
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
    names: ClassNames,
) -> Faults:
    """Whether the lists of every task, setting and step are the published ones."""
    published = {
        key.split("/")[1]: value
        for key, value in published_lists().items()
        if key.startswith(f"{known.name}/")
    }
    derived = {}
    for task in every_step(known, names):
        for kind, split in KINDS.items():
            if list_name(task, kind) in published:
                entries = readers[split].entries
                indices = derive(readers[split], presence[split], task, kind)
                ids = [entries[index].id for index in indices]
                derived[list_name(task, kind)] = {"count": len(ids), "sha256": list_hash(ids)}
    return compare_lists(derived, published)


def every_step(known: type[BaseDataset], names: ClassNames) -> Iterator[Task]:
    """Every step of every published schedule in every setting."""
    for setting in SETTINGS:
        for name, steps in known.tables.items():
            for step in range(len(steps)):
                yield make_task(
                    known.name,
                    known.tables,
                    names,
                    name=name,
                    setting=setting,
                    step=step,
                    background=known.background,
                )


def compare_lists(derived: Mapping[str, Any], published: Mapping[str, Any]) -> Faults:
    """Compare two tables of `{name: {"count": …, "sha256": …}}`."""
    equal = {name for name, value in derived.items() if value == published[name]}
    rest = sorted(set(published) - set(derived))
    without = f"; of no task here: {listing(rest)}" if rest else ""
    yield "compared", f"{len(equal)} of {len(derived)} are equal, count and hash{without}"
    for name in sorted(set(derived) - equal):
        counts = f"{derived[name]['count']:,} by the masks, {published[name]['count']:,} published"
        yield "differs", f"{name}: {counts}"


def incomplete(known: type[BaseDataset], readers: Mapping[str, BaseDataset]) -> str:
    """How the numbers of images differ from the complete data set's; empty when they do not."""
    counts = {split: len(reader.entries) for split, reader in readers.items()}
    return listing(
        f"{counts[split]:,} {word} images instead of {known.complete[split]:,}"
        for split, word in SPLIT_NAMES.items()
        if counts[split] != known.complete[split]
    )


def step_lists(
    task: Task,
    lists_dir: str,
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], Faults]:
    """Image set of the step → indices, by the user's published file or by the rule."""
    lists: dict[str, np.ndarray] = {}
    faults: list[tuple[str, str]] = []
    for kind, split in KINDS.items():
        path = published_file(task, kind, lists_dir)
        try:
            by_file = read_published(path, readers[split]) if path else None
            by_rule = derive(readers[split], presence[split], task, kind)
            lists[kind] = by_rule if by_file is None else by_file
        except UserError as error:
            lists[kind] = np.empty(0, dtype=np.int64)
            faults.append(("step list", str(error)))
    return lists, faults


def check_steps(
    config: ConfigParser,
    first: Task,
    readers: Mapping[str, BaseDataset],
    presence: Mapping[str, np.ndarray],
) -> tuple[list[str], Faults]:
    """The numbers of images of each step as lines, and the steps that cannot be trained."""
    lines: list[str] = []
    faults: list[tuple[str, str]] = []
    known_batch = 0
    for step in range(len(first.steps)):
        task, at_step = replace(first, step=step), config.at_step(step)
        args = at_step["data_loader"]["args"]
        batch = args["train"]["batch_size"] * at_step["trainer"].get("accumulate", 1)
        if batch != known_batch:
            per_iteration = f"{batch} images per iteration and process"
            lines.append(f"task {first.name}, {first.setting}, {per_iteration}:")
            known_batch = batch
        lists, list_faults = step_lists(task, args["task"]["idxs_path"], readers, presence)
        counts = {kind: len(indices) for kind, indices in lists.items()}
        if args["val"]["cross_val"]:
            counts["val"] = round(HELD_OUT * counts["train"])
            counts["train"] -= counts["val"]
        texts = (f"{count} {SPLIT_NAMES.get(kind, kind)}" for kind, count in counts.items())
        lines.append(f"  step {step}: {listing(texts)} images")
        faults += list_faults
        if counts["train"] < batch:
            faults.append(("step train", f"step {step}: {counts['train']} of {batch} images"))
        if counts["val"] == 0:
            fault = "step held out" if args["val"]["cross_val"] else "step val"
            faults.append((fault, f"step {step}"))
        if counts["test"] == 0:
            faults.append(("step test", f"step {step}"))
        ever, now = (
            set(np.flatnonzero(table.any(axis=0)).tolist())
            for table in (presence["train"], presence["train"][lists["train"]])
        )
        for label, column in zip(task.new, task.columns(task.new), strict=True):
            if column in ever - now:
                faults.append(("step class", f"step {step}: {label} ({task.class_names[label]})"))
    return lines, faults


def refusal(config: ConfigParser) -> Faults:
    """What training would say before it reads an image."""
    from trainer.build import build_data  # not above, for they import torch
    from utils.ranks import SINGLE

    try:
        build_data(config, SINGLE)
    except UserError as error:
        yield "refusal", str(error)
