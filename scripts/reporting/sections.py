"""Runs put together: those that learn the same classes in the same steps are a section of the
report, those that differ in their seeds alone a row of its tables.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from scripts.reporting.figures import iou_over_steps
from scripts.reporting.results import Result, Run, Schedule, labels_of
from trainer.methods import display_name, in_order
from utils.config_schema import OLDER, SCHEMA
from utils.errors import UserError, listing
from utils.labels import BACKGROUND

STEP_0 = "step 0: "  # before the keys of settings of a run that goes on
BATCH = "global batch"  # a setting that stands in no config
# What says which run or which step it is, not how it is trained.
NO_SETTING = re.compile(r"seed|data_loader\.args\.task\..*|arch\.args\.backbone_pretrained")


@dataclass(frozen=True)
class Group:
    """Runs of a task that differ in their seeds alone, with the settings that they share
    (`settings_of`): a row of the tables.

    Runs of joint training have their one result at the last step.
    """

    label: str
    runs: tuple[Run, ...]
    settings: Mapping[str, str]

    @property
    def joint(self) -> bool:
        """Whether all classes were learnt at once."""
        return self.runs[0].last.joint

    @property
    def method(self) -> str:
        """Name of the method."""
        return self.runs[0].last.content["method"]

    def at(self, step: int) -> list[Result]:
        """The tests of a step, of all seeds that have one."""
        return [run.results[step] for run in self.runs if step in run.results]


@dataclass(frozen=True)
class Section:
    """A task: runs that learn the same classes in the same steps.

    Attributes:
        schedule: label ids of each step, up to the last one that a run reached.
        end: the last step of the whole schedule.
        groups: the rows of its tables.
    """

    dataset: str
    setting: str
    task: str
    schedule: Schedule
    end: int
    groups: tuple[Group, ...]

    @property
    def last(self) -> int:
        """The last step that a run reached."""
        return len(self.schedule) - 1

    @property
    def runs(self) -> list[Run]:
        """The runs of all rows."""
        return [run for group in self.groups for run in group.runs]

    @property
    def ends(self) -> list[tuple[str, Result]]:
        """The tests of the last step, with the label of their row."""
        return [(group.label, r) for group in self.groups for r in group.at(self.last)]

    @cached_property
    def labels(self) -> list[int]:
        """Label ids in order of arrival, background first where there is one."""
        background = any(run.last.background for run in self.runs)
        return [*([BACKGROUND] if background else []), *labels_of(self.schedule)]

    @cached_property
    def names(self) -> dict[int, str]:
        """Label id → class name."""
        return {label: name for run in self.runs for label, name in run.last.names.items()}

    def upper(self, method: str) -> np.ndarray | None:
        """[classes] IoU under joint training: the same method's or, without it, the best one's."""
        labels = labels_of(self.schedule)
        bounds = {
            group.method: np.mean(
                [iou_over_steps(run, labels, self.last + 1)[:, -1] for run in group.runs], axis=0
            )
            for group in self.groups
            if group.joint
        }
        return bounds.get(method, max(bounds.values(), key=np.nanmean, default=None))


def settings_of(run: Run) -> dict[str, str]:
    """What decides how a run is trained, but seed and task: dotted key → value as JSON.

    Of the last step and, where it is another one, of step 0. A run whose config is not there is
    known by its name.
    """
    settings: dict[str, str] = {}
    for prefix, result in _settled(run).items():
        if result.global_batch is not None:
            settings[f"{prefix}{BATCH}"] = str(result.global_batch)
        if not result.config:
            settings[f"{prefix}name"] = _without_seed(result.content["name"])
            continue
        for key, value in (OLDER | result.config).items():
            if not NO_SETTING.fullmatch(key) and (key not in SCHEMA or SCHEMA[key].decides):
                settings[f"{prefix}{key}"] = json.dumps(value)
    return settings


def _settled(run: Run) -> dict[str, Result]:
    """The steps whose settings tell runs apart, by what their keys begin with."""
    first = run.results.get(0)
    return {"": run.last} | ({STEP_0: first} if run.last.step and first else {})


def label_of(result: Result) -> str:
    """How a method is called in tables: DKD-M, or joint with the method in brackets."""
    name = result.content["method"]
    if result.joint:
        return f"joint ({display_name(name)})"
    return display_name(name, result.memory > 0)


def make_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The tasks of runs, and a sentence for what is left out.

    Raises:
        UserError: the runs are of different data sets.
    """
    _check_one_data_set(runs)
    joint = [run for run in runs if run.last.joint]
    steps = [run for run in runs if not run.last.joint]
    later = [run for run in steps if run.last.step > 0]
    tasks: dict[tuple[str, str, Schedule], list[Run]] = {}
    for run in later or steps or joint:
        key = (run.last.content["setting"], run.last.content["task"], run.last.schedule)
        tasks.setdefault(key, []).append(run)
    sections, shown = [], set()
    for (setting, task, whole), members in tasks.items():
        last = max(run.last.step for run in members)
        schedule = whole[: last + 1]
        bounds = _of_these_classes(joint, schedule) if steps else []
        shown |= {run.folder for run in bounds}
        groups = _groups([*members, *bounds])
        sections.append(
            Section(members[0].last.dataset, setting, task, schedule, len(whole) - 1, groups)
        )
    at_0 = [run.name for run in steps if later and run.last.step == 0]
    left_out = [f"Left out, for they end at step 0: {listing(at_0, 2)}."] if at_0 else []
    others = [run.name for run in joint if steps and run.folder not in shown]
    if others:
        names = listing(others, 8)
        left_out.append(f"Left out, for they are joint training of other classes: {names}.")
    return sections, left_out


def _of_these_classes(joint: Iterable[Run], schedule: Schedule) -> list[Run]:
    """Joint training of the classes of a schedule, as if tested at its last step."""
    return [
        replace(run, results={len(schedule) - 1: result})
        for run in joint
        for result in run.results.values()
        if {*result.channels} - {BACKGROUND} == {*labels_of(schedule)} - {BACKGROUND}
    ]


def _check_one_data_set(runs: Iterable[Run]) -> None:
    first: dict[str, tuple[str, Run]] = {}
    for run in runs:
        facts = {"the data set": run.last.dataset} | {
            f"label id {label}": name for label, name in run.last.names.items()
        }
        for what, name in facts.items():
            known, other = first.setdefault(what, (name, run))
            if known != name:
                raise UserError(
                    f"the runs are of different data sets: {what} is '{known}' in {other.folder} "
                    f"and '{name}' in {run.folder}; give one report the runs of one of them."
                )


def _groups(runs: Iterable[Run]) -> tuple[Group, ...]:
    """The rows of a task, in the order of the methods, joint training last."""
    rows: dict[tuple[str, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in sorted(runs, key=lambda run: bool(_lost(run))):
        label, settings = label_of(run.last), settings_of(run)
        alike = [
            key
            for key in rows
            if key[0] == label and {k: v for k, v in key[1] if k not in _lost(run)} == settings
        ]
        # A batch that a damaged file held is taken to be that of the runs that are equal else.
        key = alike[0] if len(alike) == 1 else (label, tuple(sorted(settings.items())))
        rows.setdefault(key, []).append(run)
    counts, uses = Counter(label for label, _ in rows), Counter[str]()
    groups = []
    for (label, known), members in rows.items():
        if counts[label] > 1:
            label = f"{label}, {_without_seed(members[0].last.content['name'])}"
        uses[label] += 1
        label = f"{label} #{uses[label]}" if uses[label] > 1 else label
        members = sorted(members, key=lambda run: run.folder)
        groups.append(Group(label, tuple(members), dict(known)))
    order = in_order(group.method for group in groups)
    return tuple(sorted(groups, key=lambda g: (g.joint, order.index(g.method), g.label)))


def _lost(run: Run) -> set[str]:
    """The settings that a damaged file held."""
    return {f"{prefix}{BATCH}" for prefix, result in _settled(run).items() if result.lost_batch}


def _without_seed(name: str) -> str:
    """The name of a run without a seed at its end."""
    return re.sub(r"[-_](s|seed)[-_]?\d+$", "", name) or name
