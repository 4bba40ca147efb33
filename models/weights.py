"""Strict loading of weights: whatever may be missing is written out by name.

ImageNet weights for a backbone, the previous step's weights plus exactly the new head, released
weights. Knows no step and no method.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum

from models.backbone import BACKBONES
from utils import checkpoint as files
from utils.checkpoint_form import check_weights, kind, not_finite
from utils.errors import UserError, listing
from utils.logger import log

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
        UserError: lists the missing and the unexpected names, and those of another shape, or with
            whole numbers in the place of real ones.
    """
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    own = model.state_dict()
    both = sorted(own.keys() & state.keys())
    faults = {
        "missing": sorted(own.keys() - state.keys() - set(may_miss)),
        "unexpected": sorted(state.keys() - own.keys()),
        "wrongly shaped": [
            f"{name} {list(state[name].shape)} instead of {list(own[name].shape)}"
            for name in both
            if state[name].shape != own[name].shape
        ],
        "of another type": [
            f"{name} {kind(state[name].dtype)} instead of {kind(own[name].dtype)}"
            for name in both
            if state[name].is_floating_point() != own[name].is_floating_point()
        ],
    }
    lines = [f"{what}: {listing(names, most=6)}" for what, names in faults.items() if names]
    if lines:
        raise UserError(f"{source} does not fit the model; {'; '.join(lines)}.")
    return state


def load_strict(
    model: nn.Module, state: State, source: str, *, may_miss: Iterable[str] = ()
) -> None:
    """Load `state` into `model`, every key matched; names in `may_miss` keep their values.

    Weights of another precision are converted, and the log says so.

    Raises:
        UserError: as `check_fit`.
    """
    state = check_fit(model, state, source, may_miss=may_miss)
    own = model.state_dict()
    types = {(kind(state[name].dtype), kind(own[name].dtype)) for name in state}
    for there, here in sorted(types):
        if there != here:
            log.info("%s: what it holds as %s is converted to %s", source, there, here)
    # BatchNorm modules fill in a missing num_batches_tracked themselves, hence the full dict.
    model.load_state_dict({**own, **state})


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


def _read(path: Path) -> State:
    where = "arch.args.backbone_pretrained"
    if not path.is_file():
        raise UserError(f"{where}: there is no file {path}.")
    source = f"{where}: the weight file {path}"
    state = files.read(path, source)
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    return _checked(state, source)


def _checked(state: Any, source: str) -> State:
    """`state`, when it is weights by name with finite values."""
    check_weights(state, source)
    if faults := not_finite(state):
        raise UserError(f"{source} is of no use: {faults}.")
    return state


def _download(weights: WeightsEnum) -> State:
    file = weights.url.rsplit("/", 1)[1]
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", check_hash=True, weights_only=True
        )
    except Exception as error:  # whatever the network or the disk says, the way on is the same
        raise UserError(
            f"the ImageNet weights {weights.url} cannot be fetched ({error}); put the file at "
            f"{cache / file}, or name it in arch.args.backbone_pretrained."
        ) from None
    return _checked(state, f"the ImageNet weights {cache / file}")
