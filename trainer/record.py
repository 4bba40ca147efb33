"""What decides the weights of a step, written into its checkpoints and compared later.

`-r` compares before it continues, `--base` before it takes another run's step 0. Keys of the config
that only say where, how fast or how a run is looked at are left out (`free` and `local` in
`utils/config_schema.py`); batch size, processes and accumulation count as their product and as what
BatchNorm sees of it.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from data_loader.data_loaders import IncrementalDataLoader
from trainer.optim import OPTIMIZERS
from utils import VERSION
from utils.config_schema import OPTIONAL, SCHEMA
from utils.lr_scheduler import SCHEDULERS
from utils.misc import PROJECT_ROOT, sha256
from utils.parse_config import ConfigParser

PACKAGES = ("base", "data_loader", "models", "trainer", "utils")
FROM_STEP_1 = "data_loader.args.memory."  # keys that mean nothing at step 0


def settings(config: ConfigParser, data: IncrementalDataLoader) -> dict[str, Any]:
    """What the configuration says about the weights: name → value, plain values only."""
    task, frozen = data.task, config["arch"]["args"]["freeze_all_bn"]
    found: dict[str, Any] = {
        "data set": task.dataset,
        "setting": task.setting,
        "classes": [list(ids) for ids in task.steps[: task.step + 1]],
        "class names": [task.class_names[label] for label in task.ids],
        "global batch": data.global_batch,
        "images that BatchNorm sees": None if frozen else data.norm_batch,
    }
    for dotted, value in (_defaults(config) | config.flat()).items():
        if dotted in SCHEMA and not SCHEMA[dotted].decides:
            continue
        if task.step == 0 and dotted.startswith(FROM_STEP_1):
            continue
        found[dotted] = value
    where = "arch.args.backbone_pretrained"
    found[where] = _weight_file(found[where]) if task.step == 0 else None
    return found


def record(
    config: ConfigParser, data: IncrementalDataLoader, train_hash: str | None
) -> dict[str, Any]:
    """The settings, the training data and the code; plain values only."""
    return {
        "version": VERSION,
        "code": code_hash(),
        "torch": str(torch.__version__),
        "data": train_hash,
        "settings": settings(config, data),
    }


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """What differs between two records, as `trainer.epochs is 60 here and 30 there`.

    Settings that one of the two does not know came with another version and are left out.
    """
    told = []
    if here["version"] != there["version"]:
        told.append(f"the code's version is {here['version']} here and {there['version']} there")
    if None not in (here["data"], there["data"]) and here["data"] != there["data"]:
        told.append(
            f"the training data have the hash {here['data'][:12]} here and "
            f"{there['data'][:12]} there"
        )
    mine, other = here["settings"], there["settings"]
    for name in mine:
        if name in other and name not in ignore and mine[name] != other[name]:
            told.append(f"{name} is {mine[name]} here and {other[name]} there")
    return told


def remarks(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Differences that may change last digits, or nothing: worth a line, not a refusal."""
    names = {"code": "source files (hash)", "torch": "torch"}
    return [
        f"{words}: {here[key]} here, {there[key]} there"
        for key, words in names.items()
        if here[key] != there[key]
    ]


def _defaults(config: ConfigParser) -> dict[str, Any]:
    """Dotted key → value of the optional arguments of optimizer and schedule that nobody chose."""
    registries: dict[str, Mapping[str, type]] = {
        "optimizer": OPTIMIZERS,
        "lr_scheduler": SCHEDULERS,
    }
    found = {}
    for section, registry in registries.items():
        arguments = inspect.signature(registry[config[section]["type"]]).parameters
        for name in arguments:
            if (dotted := f"{section}.args.{name}") in OPTIONAL:
                value = arguments[name].default
                found[dotted] = list(value) if isinstance(value, tuple) else value
    return found


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Short SHA-256 of the source files of the packages."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((PROJECT_ROOT / package).rglob("*.py")):
            digest.update(path.relative_to(PROJECT_ROOT).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _weight_file(pretrained: bool | str) -> bool | str:
    """A local weight file as its hash, wherever it lies; torchvision's own file as its download."""
    if not isinstance(pretrained, str) or not Path(pretrained).is_file():
        return pretrained
    start = sha256(pretrained)[:8]  # what torchvision puts into the names of its files
    return True if Path(pretrained).stem.endswith(f"-{start}") else start
