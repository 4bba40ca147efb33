"""The devices that `-d` names, and why there may be no GPU."""

from __future__ import annotations

import os
import re

import torch

from utils.errors import UserError, listing


def find_devices(text: str | None, *, training: bool = False) -> list[torch.device]:
    """The devices that `-d` names; default: every visible GPU, or the CPU.

    Args:
        text: of `-d`.
        training: a GPU that is asked for must be there. To evaluate, `-d 0`, which published
            commands end with, means the CPU where there is no GPU.

    Raises:
        UserError: a malformed text, or a GPU that does not exist.
    """
    if text is not None and text != "cpu" and not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"-d/--device is '{text}'; give GPU ids such as 0 or 0,1, or cpu.")
    ids = [] if text in (None, "cpu") else [int(number) for number in text.split(",")]
    if len(set(ids)) < len(ids):
        raise UserError(f"-d/--device is '{text}', but a GPU is named twice.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "cpu" or (count == 0 and (not ids or (ids == [0] and not training))):
        return [torch.device("cpu")]
    wrong = [number for number in ids if number >= count]
    if wrong:
        visible = listing(range(count)) or f"none ({no_gpu()}), so use -d cpu"
        raise UserError(
            f"-d/--device is '{text}', but GPU {wrong[0]} does not exist; visible: {visible}."
        )
    return [torch.device("cuda", number) for number in ids or range(count)]


def no_gpu() -> str:
    """Why torch computes on no GPU here."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} was installed without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = f" (CUDA_VISIBLE_DEVICES is '{hidden}')" if hidden is not None else ""
    return f"torch {torch.__version__} sees no GPU or no driver{why}"
