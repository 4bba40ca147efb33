"""The way in: a command line, the configuration of each step that it names, the run.

Imports next to nothing before signals are handled, and torch only when there is work for it: a
wrong flag is answered at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from utils.processes import signals, threads

if TYPE_CHECKING:
    from utils.config_schema import StepRange
    from utils.parse_config import ConfigParser


def main(mode: str, default_config: str, description: str | None) -> None:
    """What an entry script does.

    Args:
        mode: "train" or "eval".
        default_config: the shipped config of the script, relative to the project.
        description: text of `--help`.
    """
    signals.end_at_once()  # on a signal, also while the rest is being imported
    threads.spin_briefly()
    from utils.errors import one_sentence_errors
    from utils.parse_config import ConfigParser

    with one_sentence_errors():
        settings = settings_help if mode == "train" else None
        config = ConfigParser.from_args(mode, default_config, description, settings_help=settings)
        steps = step_configs(config)
        from trainer.run import run

        run(*steps)


def settings_help(method: str) -> str:
    """The settings of a method, a line each."""
    from trainer.methods import METHODS
    from utils.errors import choose

    rows = METHODS[choose("method", method, METHODS)].Settings.rules()
    width = max(map(len, rows), default=0)
    lines = [f"  {key:<{width}}  {rule.doc}, {rule.expected()}" for key, rule in rows.items()]
    return "\n".join([f"settings of {method}, the block hyperparameter:", *lines])


def step_configs(config: ConfigParser) -> list[ConfigParser]:
    """The configuration of each step that a command line names, in order.

    Raises:
        UserError: `--task_step` names a step that the task does not have.
    """
    steps = config.call.steps
    if steps is None:
        return [config]
    return [config.at_step(step) for step in _numbers(config, steps)]


def _numbers(config: ConfigParser, steps: StepRange) -> range:
    from data_loader import DATA_SETS
    from utils.errors import UserError, choose, listing

    task = config["data_loader"]["args"]["task"]
    schedule = task["steps"]
    if schedule is None:
        tables = DATA_SETS[config["data_loader"]["type"]].tables
        schedule = tables[choose("data_loader.args.task.name", task["name"], tables)]
    last = len(schedule) - 1 if steps.last is None else steps.last
    if last >= len(schedule):
        raise UserError(
            f"--task_step is {steps.first}-{last}, but task '{task['name']}' has the steps "
            f"{listing(range(len(schedule)))}."
        )
    return range(steps.first, last + 1)
