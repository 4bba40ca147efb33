"""Which steps a command line asks for. Imports no torch."""

from __future__ import annotations

from data_loader import DATA_SETS
from utils.config_schema import Steps
from utils.errors import UserError, choose, listing
from utils.parse_config import ConfigParser


def settings_help(name: str) -> str:
    """The settings of a method, a line each."""
    from trainer.methods import METHODS  # with torch, which other helps do without

    rows = METHODS[choose("method", name, METHODS)].Settings.rules()
    width = max(map(len, rows), default=0)
    lines = [f"  {key:<{width}}  {rule.doc}, {rule.expected()}" for key, rule in rows.items()]
    return "\n".join([f"settings of {name}, the block hyperparameter:", *lines])


def step_configs(config: ConfigParser) -> list[ConfigParser]:
    """The configuration of each step, in order.

    Raises:
        UserError: `--task_step` names a step that the task does not have.
    """
    if config.steps is None:
        return [config]
    return [config.at_step(step) for step in _numbers(config, config.steps)]


def _numbers(config: ConfigParser, steps: Steps) -> range:
    task = config["data_loader"]["args"]["task"]
    schedule = task["steps"]
    if schedule is None:
        tables = DATA_SETS[config["data_loader"]["type"]].tables
        schedule = tables[choose("data_loader.args.task.name", task["name"], tables)]
    first, last = steps.first, steps.last
    last = len(schedule) - 1 if last is None else last
    if last >= len(schedule):
        raise UserError(
            f"--task_step is {first}-{last}, but task '{task['name']}' has the steps "
            f"{listing(range(len(schedule)))}."
        )
    return range(first, last + 1)
