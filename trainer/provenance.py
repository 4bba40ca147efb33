"""What decides the weights of a step, written into its checkpoints and compared later.

`-r` compares before it continues, `--base` before it takes another run's step 0, and a later step
before it starts. Keys of the config that only say where, how fast or how a run is looked at are
left out (`free` and `local` in `utils/config_schema.py`); batch size, processes and accumulation
count as their product and as what BatchNorm sees of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_loader import DATA_SETS
from data_loader.contents import changes, same_rows
from data_loader.data_loaders import IncrementalDataLoader
from trainer.build import Previous
from trainer.methods import METHODS
from trainer.optim import OPTIMIZERS
from utils import VERSION
from utils.config_schema import OLDER, OPTIONAL, SCHEMA
from utils.errors import UserError
from utils.files import PROJECT_ROOT, sha256
from utils.logger import log
from utils.lr_scheduler import SCHEDULERS
from utils.parse_config import ConfigParser
from utils.ranks import Ranks
from utils.sources import name_of, needed, source_hash

EPOCHS = "trainer.epochs"
LENGTHENED = "lengthened after epochs"
# Judged apart; and what a run started from is behind it.
FREE_ON_RESUME = (EPOCHS, LENGTHENED, "arch.args.backbone_pretrained")
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
    """The settings, the training data and the code; plain values only.

    Args:
        config, data: of the step.
        train_hash: of `data`, None where it shall not be compared.
    """
    return {
        "version": VERSION,
        "code": code_hash(),
        "own_code": own_code(config),
        "torch": str(torch.__version__),
        "contents": train_hash,
        "lengthened": [],  # epochs after which the finished step was made longer
        "settings": settings(config, data),
    }


def differences(
    here: Mapping[str, Any], there: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """What differs between two records, as `trainer.epochs is 60 here and 30 there`.

    What one of the two does not know came with another version and is left out.

    Args:
        here, there: the records.
        ignore: names of settings that may differ.
    """
    lines = []
    if here["version"] != there["version"]:
        lines.append(f"the code's version is {here['version']} here and {there['version']} there")
    if differ(here.get("contents"), there.get("contents")):
        lines.append(
            f"the training data have the hash {here['contents'][:12]} here and "
            f"{there['contents'][:12]} there"
        )
    this, other = (OLDER | each["settings"] | _lengthened(each) for each in (here, there))
    for name in this:
        if name in other and name not in ignore and this[name] != other[name]:
            lines.append(f"{name} is {this[name]} here and {other[name]} there")
    return lines


@dataclass(frozen=True)
class Provenance:
    """Where the weights of a step come from, as its checkpoints keep it.

    Attributes:
        record: what decides them (`record`).
        data: what the files of the data set hold (`IncrementalDataLoader.contents`); "trained" says
            what this step or one before it was trained on.
        previous: hash of the previous step's weights.
    """

    record: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, torch.Tensor] = field(default_factory=dict)
    previous: str | None = None

    @classmethod
    def of(
        cls, config: ConfigParser, data: IncrementalDataLoader, previous: Previous
    ) -> Provenance:
        """Of a step that is about to be trained, its images and exemplars being known."""
        contents = data.contents()
        if previous.data:
            before = _tables(previous.data)
            contents["trained"] |= same_rows(contents["train"], before["train"], before["trained"])
        contents["trained"] = contents["trained"].astype(np.uint8)
        tensors = {name: torch.from_numpy(table) for name, table in contents.items()}
        return cls(record(config, data, data.train_hash()), tensors, previous.sha256)

    def resumed(
        self,
        config: ConfigParser,
        checkpoint: Mapping[str, Any],
        path: Path,
        data: IncrementalDataLoader,
    ) -> Provenance:
        """Of the step that goes on from a checkpoint.

        Raises:
            UserError: it is another step's, or would go on differently than it began.
        """
        here, there = self.record, checkpoint["record"]
        differs = differences(here, there, ignore=FREE_ON_RESUME)
        if differ(here.get("contents"), there.get("contents")) and checkpoint.get("data"):
            now, before = _tables(self.data), _tables(checkpoint["data"])
            differs += changes(now["train"], before["train"], data.names("train"))
        if differs:
            folder, auto = config.step_dir(), config.call.auto
            anew = f"delete {folder} to train this step anew, " if auto else ""
            raise UserError(
                f"the checkpoint to resume from is of another run: {'; '.join(differs)}; give the "
                f"same, {anew}or another --name for a new run (the global batch is --batch_size × "
                "processes × trainer.accumulate)."
            )
        if differ(self.previous, checkpoint.get("previous")):
            raise UserError(
                f"the checkpoint to resume from, {path}, began with other weights of the previous "
                "step than those that lie there now; train this step anew as well (delete or "
                "rename its folder), or put the old ones back."
            )
        lengthened = list(there.get("lengthened", []))
        epochs, begun = here["settings"][EPOCHS], there["settings"].get(EPOCHS)
        if begun is not None and epochs != begun:
            if not checkpoint["finished"] or epochs < begun:
                raise UserError(
                    f"trainer.epochs (--epochs) is {epochs}, but the step of {path} was begun with "
                    f"{begun}, over which its learning rate falls; give --epochs {begun}, or train "
                    f"{epochs} epochs under another --name (a finished step can be lengthened)."
                )
            lengthened.append(begun)
            log.warning(
                "the finished step of %d epochs is lengthened to %d: its learning rate rises again "
                "to where %d epochs have it after %d, so it is no step of %d epochs",
                *(begun, epochs, epochs, begun, epochs),
            )
        return replace(self, record={**here, "lengthened": lengthened})


def check_data(data: IncrementalDataLoader, previous: Previous, ranks: Ranks) -> None:
    """Whether the data set is still that of the previous step; rank 0 looks.

    Raises:
        UserError: what an earlier step was trained on has changed.
    """
    if not (ranks.is_main and previous.data):
        return
    now, before = data.contents(), _tables(previous.data)
    since = f"since step {data.task.step - 1} was trained"
    trained = before["trained"].astype(bool)
    if changed := changes(now["train"], before["train"], data.names("train"), trained):
        raise UserError(
            f"the data in {data.source['train'].root} have changed {since}, among them what it or "
            f"a step before was trained on: {'; '.join(changed)}; put them back, or train from "
            "step 0 under another --name."
        )
    for split in ("train", "val"):
        if changed := changes(now[split], before[split], data.names(split)):
            log.warning(
                "the data of the %s list have changed %s: %s", split, since, "; ".join(changed)
            )


def _tables(data: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """What a checkpoint holds of its data set.

    Raises:
        UserError: it does not go together.
    """
    tables = {name: table.numpy() for name, table in data.items()}
    good = tables.keys() == {"train", "val", "trained"} and (
        all(tables[split].ndim == 2 and tables[split].shape[1] > 2 for split in ("train", "val"))
        and tables["trained"].shape == tables["train"].shape[:1]
    )
    if not good:
        raise UserError(
            "the checkpoint's tables of its data set do not go together; is it damaged?"
        )
    return tables


def differ(here: str | None, there: str | None) -> bool:
    """Whether two hashes are known and are not the same."""
    return here is not None and there is not None and here != there


def _lengthened(record: Mapping[str, Any]) -> dict[str, Any]:
    return {LENGTHENED: record["lengthened"]} if "lengthened" in record else {}


def remarks(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Differences that may change last digits, or nothing: worth a line, not a refusal."""
    names = {"code": "source files (hash)", "torch": "torch"}
    own, other = (each.get("own_code", {}) for each in (here, there))
    return [
        f"{text}: {here[key]} here, {there[key]} there"
        for key, text in names.items()
        if here[key] != there[key]
    ] + [
        f"{file} (hash): {own[file]} here, {other[file]} there"
        for file in own
        if file in other and own[file] != other[file]
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
def _common_files() -> frozenset[Path]:
    return frozenset(needed([PROJECT_ROOT / "trainer" / "run.py"]))


@lru_cache(maxsize=1)
def code_hash() -> str:
    """Short SHA-256 of the source files that every run needs, whatever its method and data set."""
    return source_hash(_common_files())


def own_code(config: ConfigParser) -> dict[str, str]:
    """File → short SHA-256, of the source files that its method or data set needs beside those.

    A file that another method needs as well is in the records of both.
    """
    return _own_code(METHODS[config["method"]], DATA_SETS[config["data_loader"]["type"]])


@lru_cache
def _own_code(*kinds: type) -> dict[str, str]:
    files = needed(Path(inspect.getfile(kind)) for kind in kinds) - _common_files()
    return {name_of(file): source_hash([file]) for file in sorted(files)}


def _weight_file(pretrained: bool | str) -> bool | str:
    """A local weight file as its hash, wherever it lies; torchvision's own file as its download."""
    if not isinstance(pretrained, str) or not Path(pretrained).is_file():
        return pretrained
    start = sha256(pretrained)[:8]  # what torchvision puts into the names of its files
    return True if Path(pretrained).stem.endswith(f"-{start}") else start
