"""The report as one dictionary, `report.json`: what the page shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from scripts.reporting import fairness
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
from scripts.reporting.results import Result, Schedule
from scripts.reporting.sections import STEP_0, Group, Section, label_of
from utils import VERSION
from utils.errors import listing


def over_seeds(values: Iterable[float | None]) -> dict[str, float | int | None] | None:
    """Mean, deviation of the sample and number of the values that are there."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    std = statistics.stdev(known) if len(known) > 1 else None
    return {"mean": statistics.fmean(known), "std": std, "n": len(known)}


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are there."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def make_report(
    sections: Sequence[Section], left_out: Sequence[str], sources: Sequence[str]
) -> dict[str, Any]:
    """All figures of the report; its pictures come from `pictures.py`.

    `left_out` are sentences for what was left out, `sources` the paths that named the runs.
    """
    tasks = listing(f"{s.dataset.upper()} {s.task}, {s.setting}" for s in sections)
    return {
        "title": f"Class-incremental semantic segmentation: {tasks}",
        "created": datetime.now().strftime("%Y-%m-%d %H:%M"),
        "version": VERSION,
        "sources": list(sources),
        "tasks": [_task(section, left_out) for section in sections],
    }


def _task(section: Section, left_out: Sequence[str]) -> dict[str, Any]:
    arrival = {label: step for step, ids in enumerate(section.schedule) for label in ids}
    methods = [_method(section, group) for group in section.groups]
    known = {key for method in methods for key, figure in method["summary"].items() if figure}
    return {
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
        "configs": _differing_settings(section.groups),
        "warnings": fairness.warnings(section),
        "sentences": {"summary": [*fairness.too_close(methods), *left_out], "pictures": []},
        "pictures": [],
        "legend": [],
    }


def _method(section: Section, group: Group) -> dict[str, Any]:
    schedule = section.schedule
    upper = section.upper(group.method)
    figures = [run_figures(run, schedule, upper) for run in group.runs]

    def by_step(part: Callable[[list[Result]], Mapping[str, Any] | None]) -> list[dict[str, Any]]:
        """A row per step of which there is something to show."""
        rows = ((step, part(group.at(step))) for step in range(section.last + 1))
        return [{"step": step, **row} for step, row in rows if row]

    return {
        "label": group.label,
        "method": group.method,
        "joint": group.joint,
        "seeds": [run.last.seed for run in group.runs],
        "summary": {key: over_seeds(f[key] for f in figures) for key in FIGURES},
        "curve": by_step(lambda results: over_seeds(grouped(r, schedule)["all"] for r in results)),
        "iou": _iou(section, group),
        "flows": [] if group.joint else by_step(lambda results: _flows(results, schedule)),
        "loss": by_step(_losses),
        "cost": by_step(_cost),
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
    return np.ma.masked_invalid(each).mean(axis=0).tolist()


def _flows(results: Sequence[Result], schedule: Schedule) -> dict[str, float] | None:
    """Means over the seeds; None where no pixel is of an old class."""
    shares = [share for result in results if (share := flows(result, schedule))]
    return {k: statistics.fmean(s[k] for s in shares) for k in shares[0]} if shares else None


def _losses(results: Sequence[Result]) -> dict[str, Any] | None:
    """Loss term → (epoch, mean over the seeds); None where it was not trained."""
    values: dict[str, dict[int, list[float]]] = {}
    for result in results:
        for term, points in result.losses.items():
            for epoch, value in points:
                values.setdefault(term, {}).setdefault(epoch, []).append(value)
    terms = {
        term: [(epoch, statistics.fmean(each)) for epoch, each in sorted(epochs.items())]
        for term, epochs in values.items()
    }
    return {"terms": terms} if terms else None


def _cost(results: Sequence[Result]) -> dict[str, Any] | None:
    """Time of a step, means over the seeds, and its highest peak; None if it was not trained."""
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
    results = group.at(section.last)
    if section.last < section.end or not results or not all(map(_is_published, results)):
        return []
    label = "joint" if group.joint else label_of(group.runs[0].last)
    rows = []
    for reference in published(section.dataset, section.setting, section.task, label):
        counted = Convention(results[0].future, background=reference.background)
        ours = [grouped(result, section.schedule, counted) for result in results]
        overall = [values["all"] for values in ours if values["all"] is not None]
        rows.append(
            {
                "source": reference.source,
                "hIoU": reference.harmonic,
                "all": reference.overall,
                "std": reference.std,
                "n": reference.runs,
                "here": {key: mean_of(values[key] for values in ours) for key in ("hIoU", "all")},
                "verdict": verdict(reference, overall),
            }
        )
    return rows


def _is_published(result: Result) -> bool:
    """Whether a test was on the published images, as the published code crops them."""
    return bool(result.list_of("test").get("published")) and result.cropped == "centre crop 512"


def _about(result: Result) -> dict[str, Any]:
    keys = ("version", "code", "torch", "device", "precision", "images")
    known = {key: result.content[key] for key in keys if key in result.content}
    if tested := result.list_of("test"):
        text = {True: "published", False: "NOT the published list", None: "none was published"}
        known["list"] = f"{tested['sha256'][:12]}, {text[tested['published']]}"
    return known


def _conventions(section: Section, group: Group) -> dict[str, Any]:
    """The last step under every convention that its matrix allows, means over the seeds."""
    results = group.at(section.last)
    rows = convention_rows(results, section.schedule) if results else []
    return {"method": group.label, "rows": rows}


def convention_rows(results: Sequence[Result], schedule: Schedule) -> list[dict[str, Any]]:
    """A row per convention: how it differs, old, new, hIoU, all, and the change of all."""
    dataset, background = results[0].dataset, results[0].background
    here, reference = Convention(results[0].future), published_convention(dataset)
    named: dict[str, Convention] = {"as evaluated": here}
    if here != reference:
        named["as DKD's published code counts"] = reference
    for text, convention in changes(here, dataset, background).items():
        if convention != reference:
            named[text] = convention
    counted = {
        text: [grouped(result, schedule, convention) for result in results]
        for text, convention in (named | others_conventions(dataset)).items()
    }
    for name in results[0].passes:
        if all(name in result.passes for result in results):
            counted[name] = [grouped(r, schedule, wide=r.passes[name]) for r in results]
    rows: list[dict[str, Any]] = []
    for text, each in counted.items():
        values = {key: mean_of(v[key] for v in each) for key in each[0]}
        overall, first = values["all"], rows[0]["all"] if rows else values["all"]
        change = None if overall is None or first is None else overall - first
        published = named.get(text) == reference
        rows.append({"convention": text, **values, "published": published, "change": change})
    return rows


def _differing_settings(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Keys of the configs whose values are not the same everywhere.

    Joint training has no step 0 of its own, and the settings of one method are none of another's:
    of step 0 they are shown where those that have one differ.
    """
    rows = []
    for key in dict.fromkeys(key for group in groups for key in group.settings):
        values = [group.settings.get(key) for group in groups]
        distinct = {value for value in values if value is not None or not key.startswith(STEP_0)}
        if len(distinct) > 1:
            rows.append({"key": key, "values": [value or "–" for value in values]})
    return rows
