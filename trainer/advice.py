"""What to call next when a step ends early or cannot go on, in words of the command line."""

from __future__ import annotations

from base.base_method import FAMILIES
from base.task import Task
from trainer.methods import METHODS, of_family
from utils import checkpoint as files
from utils.errors import UserError, listing
from utils.kept import read_removed
from utils.parse_config import ConfigParser


def after_divergence(config: ConfigParser, task: Task) -> str:
    """How to go on from a step whose loss is not finite, with the steps before it as they are.

    Args:
        config: of the step.
        task: the step.
    """
    step, last = task.schedule_step, _last(config, task)
    rate = f"--lr {config['optimizer']['args']['lr'] / 10:g}"
    if task.step == 0 and not task.joint and last > step:
        # A lower rate for step 0 is none for the later ones.
        command = f"--task_step {_span(config, step, step)} {rate}, then {_flag(config, 1, last)}"
    else:
        command = f"{_flag(config, step, last)} {rate}"
    folder = config.step_dir()
    if (folder / files.LAST).is_file():
        command += f", after deleting {folder}, which holds the epochs before"
        if config.call.resume is not None and not config.call.auto:
            command += ", and without -r"
    return f"to go on from step {step}, call again with {command}"


def around_finished(config: ConfigParser, task: Task) -> str:
    """How to train the steps that are left after one that is finished with other settings.

    Empty when the call is for no further step, or for none that is left.
    """
    last = _last(config, task)
    for step in range(task.schedule_step + 1, last + 1):
        if not _trained(config, step):
            return f", or leave it as it is and go on with {_flag(config, step, last)}"
    return ""


def base_of_family(family: str, method: str) -> str:
    """Why a method does not go on from a step of another family, and where its step 0 comes from.

    Args:
        family: of the step that is there.
        method: which one is to go on.
    """
    needed = METHODS[method].family
    there, here = (FAMILIES.get(name, f"'{name}', which nobody knows") for name in (family, needed))
    own = f"train step 0 with --method {method} and another --name"
    others = [name for name in of_family(needed) if name != method]
    if others:
        own += (
            f", or take that of a finished run of its family ({listing(others)}): --task_step 0 "
            "--method METHOD --base RUN/step_0 with the method of that run, then the later steps "
            f"with --method {method}"
        )
    return f"its channel 0 is {there}, but '{method}' needs {here}; {own}"


def _last(config: ConfigParser, task: Task) -> int:
    """The last step that the call is for."""
    steps = config.call.steps
    if steps is None:
        return task.schedule_step
    return len(task.schedule) - 1 if steps.last is None else steps.last


def _flag(config: ConfigParser, first: int, last: int) -> str:
    return f"--task_step {_span(config, first, last)}"


def _span(config: ConfigParser, first: int, last: int) -> str:
    # A range goes on where its steps stand, as the call did; a single step starts afresh.
    return str(first) if config.call.steps is None else f"{first}-{last}"


def _trained(config: ConfigParser, step: int) -> bool:
    path = files.final_checkpoint(config.step_dir(step))
    try:
        if path is None:
            return read_removed(config.step_dir(step)) is not None
        return bool(files.load(path).get("finished", True))
    except UserError:
        return False
