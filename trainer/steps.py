"""Which steps a command line asks for, and which of them are left. Called by the entry scripts.

Imports no torch: that a whole task is finished is answered at once.
"""

from __future__ import annotations

from data_loader import DATA_SETS
from utils.config_file import flatten, read_config
from utils.config_schema import SCHEMA, Steps
from utils.misc import UserError, choose, listing
from utils.parse_config import ConfigParser

METRICS = "metrics.json"  # of a step's test, by which one knows that the step is done
# Together with what decides the weights: a step with other batches may be another one.
BATCH = ("data_loader.args.train.batch_size", "trainer.accumulate")
TASK = ("data_loader.args.task.steps", "data_loader.args.task.joint")


def settings_help(name: str) -> str:
    """The settings of a method, a line each."""
    from trainer.methods import METHODS  # with torch, which other helps do without

    rows = METHODS[choose("method", name, METHODS)].Settings.rules()
    width = max(map(len, rows), default=0)
    lines = [f"  {key:<{width}}  {rule.doc}, {rule.expected()}" for key, rule in rows.items()]
    return "\n".join([f"settings of {name}, the block hyperparameter:", *lines])


def unfinished(config: ConfigParser) -> list[ConfigParser]:
    """The steps to run, one after the other; of those that are done it says so.

    Raises:
        UserError: `--task_step` names a step that the task does not have.
    """
    configs = [config]
    if config.steps is not None:
        configs = [config.at_step(step) for step in _numbers(config, config.steps)]
    return [each for each in configs if not _is_finished(each)]


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


def _is_finished(config: ConfigParser) -> bool:
    """Whether `-r auto` finds the step trained and tested, with just these settings.

    Whatever is in doubt, or differs, is judged where the checkpoint is read.
    """
    folder, metrics = config.step_dir(), config.log_dir() / METRICS
    written = folder / "config.json"
    if config.test or not config.auto or not (metrics.is_file() and written.is_file()):
        return False
    if not any(folder.glob("checkpoint-epoch*.pth")):
        return False
    then, _ = flatten(read_config(written), str(written), strict=False)
    now = config.flat()
    if config.global_batch is not None:  # what a process gets of it depends on their number
        del now[BATCH[0]], then[BATCH[0]]
    for key in {*now, *then}:
        decides = key in (*BATCH, *TASK) or key not in SCHEMA or SCHEMA[key].decides
        if decides and now.get(key) != then.get(key):
            return False
    print(f"{folder} is finished, see {metrics}: nothing to do")
    return True
