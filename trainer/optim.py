"""Parameter groups, optimizer and schedule from a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from base.base_method import BaseMethod
from base.base_model import BaseModel
from utils.checkpoint_form import Values
from utils.errors import UserError
from utils.forms import PLAIN, fault, shown
from utils.lr_scheduler import SCHEDULERS
from utils.parse_config import ConfigParser

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "SGD": torch.optim.SGD,
    "AdamW": torch.optim.AdamW,
}
# Tensors like a parameter that it keeps of it; SGD only with momentum.
AVERAGES = {"SGD": ("momentum_buffer",), "AdamW": ("exp_avg", "exp_avg_sq")}
# Of a group: which way it is computed, and what the schedule sets.
FREE_OPTIONS = {"lr", "fused", "foreach", "capturable"}
HEAD_LR = 10  # ASPP and classifiers learn this many times faster than the backbone


def group(name: str, *modules: nn.Module, lr: float, weight_decay: float) -> dict[str, Any]:
    """One parameter group: what is trained of some modules."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    return {"name": name, "params": params, "lr": lr, "weight_decay": weight_decay}


def three_groups(
    student: BaseModel, lr: float, weight_decay: float, head_lr: float = 1
) -> list[dict[str, Any]]:
    """Backbone, ASPP and all heads; ASPP and heads learn `head_lr` times faster."""
    parts = student.parts()
    heads = parts.heads if parts.unknown is None else (*parts.heads, parts.unknown)
    return [
        group("backbone", parts.backbone, lr=lr, weight_decay=weight_decay),
        group("aspp", parts.decoder, lr=head_lr * lr, weight_decay=weight_decay),
        group("cls", *heads, lr=head_lr * lr, weight_decay=weight_decay),
    ]


def incremental_groups(
    student: BaseModel, step: int, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The groups of DKD's published code.

    At steps > 0 only the new classifier decays; the old ones, the auxiliary head among them, form a
    group of their own.
    """
    if step == 0:
        return three_groups(student, lr, weight_decay, HEAD_LR)
    parts, fast = student.parts(), HEAD_LR * lr
    *old, new = parts.heads
    return [
        group("backbone", parts.backbone, lr=lr, weight_decay=0),
        group("aspp", parts.decoder, lr=fast, weight_decay=0),
        group("cls_old", *old, lr=fast, weight_decay=0),
        group("cls_new", new, lr=fast, weight_decay=weight_decay),
    ]


def check_optimizer(config: ConfigParser) -> None:
    """Judge `optimizer` as a whole, before anything is allocated.

    Raises:
        UserError: an unknown type, an argument that it does not have, or values that do not go
            together.
    """
    config.resolve("optimizer", OPTIMIZERS)
    args = config["optimizer"]["args"]
    if args.get("nesterov") and not args.get("momentum"):
        raise UserError("optimizer.args.nesterov needs a momentum above 0; give one, or set false.")
    betas = args.get("betas", (0.9, 0.999))
    numbers = all(type(beta) in (int, float) and 0 <= beta < 1 for beta in betas)
    if len(betas) != 2 or not numbers:
        raise UserError(
            f"optimizer.args.betas is {list(betas)}, but must be two numbers >= 0 and below 1."
        )


def build_optimizer(
    config: ConfigParser, method: BaseMethod, student: BaseModel
) -> torch.optim.Optimizer:
    """The optimizer of `optimizer.type` over the method's parameter groups."""
    args = dict(config["optimizer"]["args"])
    groups = method.parameter_groups(student, args["lr"], args["weight_decay"])
    grouped = [parameter for group in groups for parameter in group["params"]]
    trainable = {id(p) for p in student.parameters() if p.requires_grad}
    assert len(grouped) == len({id(p) for p in grouped}), "a parameter is in two groups"
    assert {id(p) for p in grouped} == trainable, "the groups must hold every trainable parameter"
    # None leaves the choice between its other ways to torch; False would take the slowest on CUDA.
    fused = True if config["fast"]["fused_optimizer"] else None
    optimizer = config.resolve("optimizer", OPTIMIZERS)(groups, **args, fused=fused)
    # torch makes these at the first update, and leaves them uninitialised where the loss scale
    # skips that one. Made here, every checkpoint has those of every parameter.
    adam = config["optimizer"]["type"] == "AdamW"
    for parameter in grouped if adam or args.get("momentum") else ():
        for name in AVERAGES[config["optimizer"]["type"]]:
            optimizer.state[parameter][name] = torch.zeros_like(parameter)
        if adam:  # it counts where it computes: fused on the device
            device = parameter.device if fused else "cpu"
            optimizer.state[parameter]["step"] = torch.zeros((), device=device)

    def keep_own_way(optimizer: torch.optim.Optimizer) -> None:
        """What a checkpoint of another way brings: its option, and averages in its layout."""
        for group in optimizer.param_groups:
            group["fused"] = fused
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                if name == "step":
                    state[name] = value.to(parameter.device if fused else "cpu")
                elif value is not None:
                    # The fused update reads memory in its order, not by strides.
                    own = torch.empty_like(parameter, requires_grad=False)
                    state[name] = own.copy_(value)

    optimizer.register_load_state_dict_post_hook(keep_own_way)
    return optimizer


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Go on with what a checkpoint's optimizer kept.

    Args:
        optimizer: of `build_optimizer`.
        saved: its `state_dict` then.

    Raises:
        UserError: it is of other parameters or options, or something is missing.
    """
    own = optimizer.state_dict()
    kept = {
        index: {name: Values(value.dtype, tuple(value.shape)) for name, value in values.items()}
        for index, values in own["state"].items()
    }
    wrong = fault(saved["state"], kept, "optimizer.state")
    groups, others = own["param_groups"], saved["param_groups"]
    if [each["params"] for each in others] != [each["params"] for each in groups]:
        wrong = "optimizer.param_groups is of other parameters than this run's"
    else:
        for number, (own, other) in enumerate(zip(groups, others, strict=True)):
            for option in own.keys() & other.keys() - FREE_OPTIONS:
                if not PLAIN.accepts(other[option]) or own[option] != other[option]:
                    wrong = (
                        f"optimizer.param_groups[{number}].{option} is {shown(other[option])}, but "
                        f"this run's is {shown(own[option])}"
                    )
    if wrong:
        raise UserError(f"the checkpoint to resume from: {wrong}.")
    state = {
        index: {name: saved["state"][index][name] for name in names}
        for index, names in kept.items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def build_scheduler(
    config: ConfigParser, optimizer: torch.optim.Optimizer, max_iters: int
) -> LRScheduler:
    """The schedule of `lr_scheduler.type` over the iterations of the step."""
    return config.build("lr_scheduler", SCHEDULERS, optimizer, max_iters)
