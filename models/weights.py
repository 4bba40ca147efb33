"""Strict loading of weights: whatever may be missing is written out by name.

ImageNet weights for a backbone, the previous step's weights plus exactly the new head, released
weights. Called by the model and by `trainer/run.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum

from models.backbone import BACKBONES
from utils.logger import log
from utils.misc import UserError, listing

State = Mapping[str, torch.Tensor]


def check_fit(
    model: nn.Module, state: State, source: str, *, may_miss: Iterable[str] = ()
) -> State:
    """Whether `state` can be loaded into `model`, which may lie on the meta device.

    Args:
        model: would take the weights.
        state: names → tensors; a prefix `module.` on all of them (DistributedDataParallel) is cut.
        source: what the weights are, for messages.
        may_miss: names that may be absent.

    Returns:
        `state` without the prefix.

    Raises:
        UserError: lists the missing, the unexpected and the wrongly shaped names.
    """
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys() - set(may_miss)),
        "unexpected": sorted(state.keys() - own.keys()),
        "wrongly shaped": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in sorted(own.keys() & state.keys())
            if state[name].shape != own[name].shape
        ],
    }
    told = [f"{what}: {listing(names, most=6)}" for what, names in faults.items() if names]
    if told:
        raise UserError(f"{source} does not fit the model; {'; '.join(told)}.")
    return state


def load_strict(
    model: nn.Module, state: State, source: str, *, may_miss: Iterable[str] = ()
) -> None:
    """Load `state` into `model`, every key matched; names in `may_miss` keep their values.

    Raises:
        UserError: as `check_fit`.
    """
    state = check_fit(model, state, source, may_miss=may_miss)
    # BatchNorm modules fill in a missing num_batches_tracked themselves, hence the full dict.
    model.load_state_dict({**model.state_dict(), **state})


def check_previous_step(model: nn.Module, state: State, new_head: int, source: str) -> list[str]:
    """Whether step t-1's weights fit the model of step t, of which only the new head may miss.

    Args:
        model: with one head more than `state`.
        state: of the previous step.
        new_head: number of the new head, `cls.{new_head}`.
        source: what the weights are, for messages.

    Returns:
        The names of the new head.

    Raises:
        UserError: as `check_fit`; or `state` already has the new head.
    """
    prefix = f"cls.{new_head}."
    already = [name for name in state if name.removeprefix("module.").startswith(prefix)]
    if already:
        raise UserError(
            f"{source} already has {already[0]}: these are not the weights of the step before."
        )
    head = [name for name in model.state_dict() if name.startswith(prefix)]
    check_fit(model, state, source, may_miss=head)
    return head


def load_previous_step(model: nn.Module, state: State, new_head: int, source: str) -> None:
    """Load step t-1's weights into the model of step t; the new head keeps its initial values.

    Raises:
        UserError: as `check_previous_step`.
    """
    head = check_previous_step(model, state, new_head, source)
    load_strict(model, state, source, may_miss=head)
    log.info("%s: loaded strictly; not in it, as it must be: %s", source, ", ".join(head))


def check_imagenet(name: str, pretrained: bool | str) -> None:
    """Whether there are ImageNet weights for a backbone; a file is read and compared.

    Args:
        name: out of `BACKBONES`.
        pretrained: True: those of torchvision; a path: that file.

    Raises:
        UserError: there are none, or the file is missing, damaged or another backbone's.
    """
    if pretrained is True:
        _published(name)
    elif pretrained:
        spec = BACKBONES[name]
        with torch.device("meta"):
            backbone = spec.build(spec.strides[0])
        check_fit(backbone, *_of_backbone(name, pretrained), may_miss=_may_miss(name, backbone))


def load_imagenet(backbone: nn.Module, name: str, pretrained: bool | str) -> None:
    """Load ImageNet weights, without the classifier, into a backbone.

    Args:
        backbone: with torchvision's names.
        name: as in `check_imagenet`; its entry says how a weight file maps.
        pretrained: True: download (or take from torch's cache); a path: that file.

    Raises:
        UserError: as `check_imagenet`, or the download fails.
    """
    state, source = _of_backbone(name, pretrained)
    load_strict(backbone, state, source, may_miss=_may_miss(name, backbone))
    log.info("%s: loaded strictly, without the classifier", source)


def _of_backbone(name: str, pretrained: bool | str) -> tuple[State, str]:
    """The weights without the classifier, and what they are in words."""
    if isinstance(pretrained, str):
        state, file = _read(Path(pretrained)), pretrained
    else:
        weights = _published(name)
        state, file = _download(weights), weights.url
    dropped = BACKBONES[name].dropped
    kept = {key: tensor for key, tensor in state.items() if not key.startswith(dropped)}
    return kept, f"the ImageNet weight file {file} for arch.args.backbone '{name}'"


def _published(name: str) -> WeightsEnum:
    weights = BACKBONES[name].weights
    if weights is None:
        raise UserError(
            f"there are no ImageNet weights for arch.args.backbone '{name}'; set "
            "arch.args.backbone_pretrained to false or to the path of a weight file."
        )
    return weights


def _may_miss(name: str, backbone: nn.Module) -> list[str]:
    return [key for key in backbone.state_dict() if key.endswith(BACKBONES[name].may_miss)]


def _read(path: Path) -> dict[str, Any]:
    where = "arch.args.backbone_pretrained"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{where}: there is no file {path}.") from None
    except Exception as error:  # torch tells a damaged or unsafe file by many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{where}: {path} cannot be read as weights: {reason}") from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(torch.is_tensor(t) for t in state.values()):
        raise UserError(f"{where}: {path} is no file of weights by name.")
    return state


def _download(weights: WeightsEnum) -> dict[str, Any]:
    file = weights.url.rsplit("/", 1)[1]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        return torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # whatever the network or the disk says, the way on is the same
        raise UserError(
            f"the ImageNet weights {weights.url} cannot be fetched ({error}); put the file at "
            f"{cache / file}, or name it in arch.args.backbone_pretrained."
        ) from None
