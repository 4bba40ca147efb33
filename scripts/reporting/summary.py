"""The report as one dictionary, `report.json`: what the page shows, and what it says in words."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np

from scripts.reporting import sentences
from scripts.reporting.figures import (
    FIGURES,
    Convention,
    changes,
    flows,
    grouped,
    iou_over_steps,
    others_conventions,
    published_convention,
    run_figures,
)
from scripts.reporting.published import published, verdict
from scripts.reporting.results import Result, Run, Schedule, labels_of
from utils import VERSION
from utils.config_file import flatten
from utils.config_schema import SCHEMA
from utils.misc import BACKGROUND, UserError, listing

# How methods are called, in the order of the tables; others come by their own names after them.
NAMES = {
    "finetune": "finetune",
    "ft": "FT",
    "lwf_mc": "LwF-MC",
    "lwf": "LwF",
    "ilt": "ILT",
    "mib": "MiB",
    "sdr": "SDR",
    "plop": "PLOP",
    "ssul": "SSUL",
    "dkd": "DKD",
}
# They say which run or which step it is, not how it is trained.
NO_SETTING = re.compile(r"seed|data_loader\.args\.task\..*|arch\.args\.backbone_pretrained")


@dataclass(frozen=True)
class Group:
    """Runs of a task that differ in their seeds alone: a row of the tables.

    Attributes:
        label: of the method.
        runs: by name; that of joint training has its one result at the last step.
        settings: of their last step, what decides the weights: dotted key → value as JSON.
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


@dataclass(frozen=True)
class Section:
    """A task: runs that learn the same classes in the same steps.

    Attributes:
        dataset, setting, task: its names.
        schedule: label ids of each step, up to the last one that a run reached.
        end: the last step of the whole schedule.
        groups: its rows.
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
        """Of all rows."""
        return [run for group in self.groups for run in group.runs]

    @property
    def ends(self) -> list[tuple[str, Result]]:
        """The tests of the last step, with the label of their row."""
        return [
            (group.label, run.results[self.last])
            for group in self.groups
            for run in group.runs
            if self.last in run.results
        ]

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
    told: dict[str, str] = {}
    steps = {"": run.last} | (
        {"step 0: ": run.results[0]} if run.last.step and 0 in run.results else {}
    )
    for prefix, result in steps.items():
        if "global_batch" in result.history:
            told[f"{prefix}global batch"] = str(result.history["global_batch"])
        if not result.config:
            told[f"{prefix}name"] = _without_seed(result.content["name"])
            continue
        flat, _ = flatten(result.config, f"the config of {result.file.parent}", strict=False)
        told |= {
            f"{prefix}{key}": json.dumps(value)
            for key, value in flat.items()
            if not NO_SETTING.fullmatch(key) and (key not in SCHEMA or SCHEMA[key].decides)
        }
    return told


def label_of(result: Result) -> str:
    """How a method is called in tables: DKD-M, or joint with the method in brackets."""
    name = NAMES.get(result.content["method"], result.content["method"])
    if result.joint:
        return f"joint ({name})"
    return f"{name}-M" if result.memory else name


def make_sections(runs: Sequence[Run]) -> tuple[list[Section], list[str]]:
    """The tasks of runs.

    Returns:
        They, and what was left out, in words.

    Raises:
        UserError: the runs are of different data sets.
    """
    _check_one_data_set(runs)
    steps = [run for run in runs if not run.last.joint]
    joint = [run for run in runs if run.last.joint]
    later = [run for run in steps if run.last.step > 0]
    left = [run.name for run in steps if later and run.last.step == 0]
    tasks: dict[tuple[str, str, Schedule], list[Run]] = {}
    for run in later or steps or joint:
        key = (run.last.content["setting"], run.last.content["task"], run.last.schedule)
        tasks.setdefault(key, []).append(run)
    sections, shown = [], set()
    for (setting, task, whole), members in tasks.items():
        last = max(run.last.step for run in members)
        schedule = whole[: last + 1]
        if members[0] not in joint:
            for run in joint:
                for result in run.results.values():
                    if {*result.channels} - {BACKGROUND} == {*labels_of(schedule)} - {BACKGROUND}:
                        members = [*members, replace(run, results={last: result})]
                        shown.add(run.folder)
        groups = tuple(_groups(members))
        sections.append(
            Section(members[0].last.dataset, setting, task, schedule, len(whole) - 1, groups)
        )
    told = [f"Left out, for they end at step 0: {listing(left, 2)}."] if left else []
    lost = [run.name for run in joint if sections and later and run.folder not in shown]
    if lost:
        told.append(f"Left out, for they are joint training of other classes: {listing(lost, 8)}.")
    return sections, told


def _check_one_data_set(runs: Iterable[Run]) -> None:
    first: dict[object, tuple[str, Run]] = {}
    for run in runs:
        told = {"the data set": run.last.dataset} | {
            f"label id {label}": name for label, name in run.last.names.items()
        }
        for what, name in told.items():
            other, theirs = first.setdefault(what, (name, run))
            if other != name:
                raise UserError(
                    f"the runs are of different data sets: {what} is '{other}' in {theirs.folder} "
                    f"and '{name}' in {run.folder}; give one report the runs of one of them."
                )


def _groups(runs: Iterable[Run]) -> list[Group]:
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = label_of(run.last), json.dumps(settings_of(run), sort_keys=True)
        found.setdefault(key, []).append(run)
    labels = [label for label, _ in found]
    groups: dict[str, Group] = {}
    for (label, settings), members in found.items():
        if labels.count(label) > 1:
            label = f"{label}, {_without_seed(members[0].last.content['name'])}"
        again = sum(known == label or known.startswith(f"{label} #") for known in groups)
        label = f"{label} #{again + 1}" if again else label
        groups[label] = Group(label, tuple(members), json.loads(settings))
    order = list(NAMES)

    def place(group: Group) -> tuple[bool, int, str]:
        known = group.method in order
        return group.joint, order.index(group.method) if known else len(order), group.label

    return sorted(groups.values(), key=place)


def _without_seed(name: str) -> str:
    """The name of a run without a seed at its end."""
    return re.sub(r"[-_]?s(eed)?[-_]?\d+$", "", name) or name


def over_seeds(values: Iterable[float | None]) -> dict[str, float | int | None] | None:
    """Mean, deviation of the sample and number of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "n": len(known)}


def make_report(
    sections: Sequence[Section], left_out: Sequence[str], sources: Sequence[str]
) -> dict[str, Any]:
    """All figures of the report; its pictures come from `pictures.py`.

    Args:
        sections, left_out: of `make_sections`.
        sources: the paths that named the runs.
    """
    tasks = listing(f"{s.dataset.upper()} {s.task}, {s.setting}" for s in sections)
    return {
        "title": f"Class-incremental semantic segmentation: {tasks}",
        "created": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "version": VERSION,
        "sources": list(sources),
        "tasks": [make_task_report(section, left_out) for section in sections],
    }


def make_task_report(section: Section, left_out: Sequence[str]) -> dict[str, Any]:
    """The part of a task."""
    arrival = {label: step for step, ids in enumerate(section.schedule) for label in ids}
    methods = [_method(section, group) for group in section.groups]
    known = {key for method in methods for key, figure in method["summary"].items() if figure}
    told: dict[str, Any] = {
        "dataset": section.dataset,
        "setting": section.setting,
        "task": section.task,
        "last": section.last,
        "end": section.end,
        "classes": [
            {
                "id": label,
                "name": section.names[label],
                "step": arrival.get(label, 0),
                "is_background": label not in arrival,
            }
            for label in section.labels
        ],
        "figures": [
            {"key": key, **figure._asdict()} for key, figure in FIGURES.items() if key in known
        ],
        "methods": methods,
        "conventions": [_conventions(section, group) for group in section.groups],
        "configs": _differing(section.groups),
        "warnings": sentences.warnings(section),
        "pictures": [],
        "legend": [],
    }
    told["sentences"] = sentences.make(told)
    told["sentences"]["summary"] += left_out
    return told


def _method(section: Section, group: Group) -> dict[str, Any]:
    schedule = section.schedule
    upper = section.upper(group.method)
    figures = [run_figures(run, schedule, upper) for run in group.runs]
    steps = sorted({step for run in group.runs for step in run.results})
    at = {step: [run.results[step] for run in group.runs if step in run.results] for step in steps}
    means = {
        step: over_seeds(grouped(result, schedule)["all"] for result in results)
        for step, results in at.items()
    }
    return {
        "label": group.label,
        "method": group.method,
        "joint": group.joint,
        "seeds": [run.last.seed for run in group.runs],
        "summary": {key: over_seeds(f[key] for f in figures) for key in FIGURES},
        "curve": [{"step": step, **mean} for step, mean in means.items() if mean],
        "iou": _iou(section, group),
        "flows": [] if group.joint else _flows(at, schedule),
        "loss": [
            {"step": step, "terms": terms}
            for step, results in at.items()
            if (terms := _losses(results))
        ],
        "cost": [{"step": step} | cost for step, results in at.items() if (cost := _cost(results))],
        "published": _published(section, group),
        "runs": [
            {
                "name": run.name,
                "folder": str(run.folder),
                "seed": run.last.seed,
                "summary": values,
                "about": _about(run.last),
            }
            for run, values in zip(group.runs, figures, strict=True)
        ],
    }


def _iou(section: Section, group: Group) -> list[list[float | None]]:
    """Class × step, mean over the seeds."""
    steps = section.last + 1
    each = np.stack([iou_over_steps(run, section.labels, steps) for run in group.runs])
    known = ~np.isnan(each)
    total, count = np.where(known, each, 0).sum(axis=0), known.sum(axis=0)
    return [
        [float(value / n) if n else None for value, n in zip(values, counts, strict=True)]
        for values, counts in zip(total, count, strict=True)
    ]


def _flows(at: Mapping[int, Sequence[Result]], schedule: Schedule) -> list[dict[str, Any]]:
    told = []
    for step, results in at.items():
        shares = [share for result in results if (share := flows(result, schedule))]
        if shares:
            means = {key: statistics.fmean(share[key] for share in shares) for key in shares[0]}
            told.append({"step": step, **means})
    return told


def _losses(results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    """Loss term → (epoch, mean over the seeds)."""
    values: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for term, points in result.losses.items():
            for epoch, value in points:
                values.setdefault(term, {}).setdefault(epoch, []).append(value)
    return {
        term: [(epoch, statistics.fmean(each)) for epoch, each in sorted(epochs.items())]
        for term, epochs in values.items()
    }


def _cost(results: Sequence[Result]) -> dict[str, Any] | None:
    """Time and memory of a step, means over the seeds; None where it was not trained here."""
    histories = [result.history for result in results if result.history.get("epochs")]
    if not histories:
        return None
    epochs = [epoch for history in histories for epoch in history["epochs"]]
    whole = [epoch["seconds"] for epoch in epochs if epoch["whole"]]
    peaks = [peak for history in histories if (peak := history["peak_memory_mib"]) is not None]
    return {
        "seconds_per_epoch": statistics.fmean(whole) if whole else None,
        "minutes": sum(epoch["seconds"] for epoch in epochs) / 60 / len(histories),
        "peak_memory_mib": max(peaks, default=None),
        "device": histories[0]["device"],
    }


def _published(section: Section, group: Group) -> list[dict[str, Any]]:
    """Published figures beside those of a group, counted as they were.

    Only of the whole task, tested on the published images as the published code crops them.
    """
    alike = {_tested_on(result) for _, result in section.ends if _is_published(result)}
    results = [run.results[section.last] for run in group.runs if section.last in run.results]
    if section.last < section.end or not results or not {*map(_tested_on, results)} <= alike:
        return []
    label = "joint" if group.joint else label_of(group.runs[0].last)
    rows = []
    for theirs in published(section.dataset, section.setting, section.task, label):
        counted = Convention(results[0].future, background=theirs.background)
        ours = [grouped(result, section.schedule, counted) for result in results]
        rows.append(
            {
                "source": theirs.source,
                "hIoU": theirs.harmonic,
                "all": theirs.overall,
                "std": theirs.std,
                "n": theirs.runs,
                "here": {
                    key: (over_seeds(v[key] for v in ours) or {}).get("mean")
                    for key in ("hIoU", "all")
                },
                "verdict": verdict(theirs, [v["all"] for v in ours if v["all"] is not None]),
            }
        )
    return rows


def _is_published(result: Result) -> bool:
    """Whether a test was on the published images, as the published code crops them."""
    told = result.content.get("lists", {}).get("test", {}).get("published")
    return bool(told) and result.content["protocol"]["images"] == "centre crop 512"


def _tested_on(result: Result) -> tuple[object, object]:
    """Which images, and how they are cropped."""
    images = result.content.get("lists", {}).get("test", {}).get("sha256")
    return images, result.content.get("protocol", {}).get("images")


def _about(result: Result) -> dict[str, Any]:
    keys = ("version", "code", "torch", "device", "precision", "images")
    known = {key: result.content[key] for key in keys if key in result.content}
    tested = result.content.get("lists", {}).get("test")
    if tested:
        words = {True: "published", False: "NOT the published list", None: "none was published"}
        known["list"] = f"{tested['sha256'][:12]}, {words[tested['published']]}"
    return known


def _conventions(section: Section, group: Group) -> dict[str, Any]:
    """The last step under every convention that its matrix tells, means over the seeds."""
    results = [run.results[section.last] for run in group.runs if section.last in run.results]
    rows = convention_rows(results, section.schedule) if results else []
    return {"method": group.label, "rows": rows}


def convention_rows(results: Sequence[Result], schedule: Schedule) -> list[dict[str, Any]]:
    """A row per convention: how it differs, old, new, hIoU, all, and the change of all."""
    dataset = results[0].dataset
    mine, theirs = Convention(results[0].future), published_convention(dataset)
    named: dict[str, Convention] = {"as evaluated": mine}
    if mine != theirs:
        named["as DKD's published code counts"] = theirs
    named |= changes(mine, dataset)
    counted = {
        words: [grouped(result, schedule, convention) for result in results]
        for words, convention in (named | others_conventions(dataset)).items()
    }
    for words in results[0].passes:
        if all(words in result.passes for result in results):
            counted[words] = [grouped(r, schedule, wide=r.passes[words]) for r in results]
    rows: list[dict[str, Any]] = []
    for words, each in counted.items():
        values = {key: (over_seeds(v[key] for v in each) or {}).get("mean") for key in each[0]}
        overall, first = values["all"], rows[0]["all"] if rows else values["all"]
        change = None if overall is None or first is None else overall - first
        published = named.get(words) == theirs
        rows.append({"convention": words, **values, "published": published, "change": change})
    return rows


def _differing(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Keys of the configs whose values are not the same everywhere."""
    keys = {key: None for group in groups for key in group.settings}
    rows = [
        {"key": key, "values": [group.settings.get(key, "–") for group in groups]} for key in keys
    ]
    return [row for row in rows if len({*row["values"]}) > 1]
