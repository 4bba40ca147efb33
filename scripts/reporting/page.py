"""The report page: one HTML file out of the dictionary of `report.json`.

The file needs no network and no script: charts (`charts.py`) and pictures are images inside it,
`page.js` only sorts, searches and copies. Every figure arrives computed; what is worked out here is
layout: which value is the best of its column, which class lost how much, in which group it stands.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from jinja2 import ChainableUndefined, Environment, FileSystemLoader

from scripts.reporting import charts
from utils.files import atomic_path

FORGOTTEN = 10.0  # points of IoU that a class must lose to be called so
FOLD = 40  # with more classes, the groups of a map are folded and sorted by what was lost
TILES = 8  # of a picture in a line of the page
SWATCHES = 30  # a longer legend of pictures is folded
BLACK_FROM = 44  # percent: on viridis, black text is the easier to read from here on (WCAG 2)
Percents = Sequence["float | None"]  # percent, None where there is nothing


class Row(NamedTuple):
    """A class of a map, or the mean of a group: IoU per column and whether it marks a forgotten
    class, and the points lost (`lost_of`).
    """

    name: str
    cells: list[tuple[float | None, bool]]
    lost: float | None


class Arrivals(NamedTuple):
    """The classes that arrived in one step, their mean, and those of them that were forgotten."""

    step: int
    mean: Row
    rows: list[Row]
    forgotten: list[Row]


class Map(NamedTuple):
    """Class × column: the steps of one method, or the last step of every method (no `label`)."""

    label: str | None
    columns: list[str]
    groups: list[Arrivals]


def write_page(report: Mapping[str, Any], file: Path) -> None:
    """Write the page of a report, as `report.json` holds it, atomically.

    All lists of the report may be missing or empty, all values None.
    """
    looks = charts.method_styles(method for task in report["tasks"] for method in task["methods"])
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=ChainableUndefined,  # the parts of a report that are not there print nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["num"] = number
    viridis = matplotlib.colormaps["viridis"]
    html = environment.get_template("template.html").render(
        report=report,
        tasks=[task | _layout(task, looks) for task in report["tasks"]],
        looks=looks,
        flows=charts.FLOWS,
        ramp=[matplotlib.colors.to_hex(viridis(percent / 100)) for percent in range(101)],
        black_from=BLACK_FROM,
        forgotten=FORGOTTEN,
        fold=FOLD,
        swatches=SWATCHES,
    )
    with atomic_path(file) as temporary:  # names of folders need not be UTF-8
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")


def number(value: float | None, signed: bool = False) -> str:
    """Two decimals with a true minus sign; a dash where there is no value."""
    if value is None:
        return "–"
    text = f"{value:+.2f}" if signed else f"{value:.2f}"
    return "0.00" if text.strip("+-") == "0.00" else text.replace("-", "−")


def _layout(task: Mapping[str, Any], looks: Mapping[str, charts.Style]) -> dict[str, Any]:
    """What the template needs of a task beyond the report itself."""
    methods = task["methods"]
    trained = [method for method in methods if method.get("loss")]
    terms = charts.term_styles(
        name for method in trained for step in method["loss"] for name in step["terms"]
    )
    runs = [run for method in methods for run in method.get("runs", ())]
    same, differ = _shared([run.get("about", {}) for run in runs])
    return {
        "best": _best(task),
        "curve": charts.curve(methods, task["classes"], looks),
        "compared": map_of_methods(task) if len(methods) > 1 else None,
        "maps": [each for method in methods if (each := map_of_steps(task, method))],
        "flow_charts": {m["label"]: charts.flow(m) for m in methods if m.get("flows")},
        "terms": terms,
        "loss_charts": {
            m["label"]: [charts.loss(m["label"], step, terms) for step in m["loss"]]
            for m in trained
        },
        "cost_charts": [
            charts.bars(methods, "seconds_per_epoch", "seconds per epoch", looks),
            charts.bars(methods, "peak_memory_mib", "peak memory in MiB", looks),
        ],
        "pictures": [
            picture | {"tiles": _tiles(picture["tiles"])} for picture in task.get("pictures", ())
        ],
        "card": _card(task.get("conventions", ())),
        "runs": runs,
        "same": same,
        "differ": differ,
    }


def _tiles(tiles: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tiles of a picture; of more than a line, a method's several steps begin one (`first`)."""
    groups = itertools.groupby(tiles, lambda tile: tile["label"].rsplit(", step", 1)[0])
    lines = [list(group) for _, group in groups]
    many = len(tiles) > TILES
    return [
        {**tile, "first": many and len(line) > 1 and tile is line[0]}
        for line in lines
        for tile in line
    ]


def _best(task: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(figure, label) of the best of every column, as far as shown; joint training is no rival."""
    best: set[tuple[str, str]] = set()
    for figure in task["figures"]:
        key, higher = figure["key"], figure.get("higher")
        means = {
            method["label"]: round(cell["mean"], 2)
            for method in task["methods"]
            if not method.get("joint") and (cell := method["summary"].get(key))
        }
        if higher is not None and len(means) > 1:
            top = (max if higher else min)(means.values())
            best.update((key, label) for label, mean in means.items() if mean == top)
    return best


def _card(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Convention → its row of every method, empty where a method has none."""
    by_method = [{row["convention"]: row for row in group["rows"]} for group in groups]
    names = dict.fromkeys(itertools.chain.from_iterable(by_method))
    return {name: [rows.get(name, {}) for rows in by_method] for name in names}


def _shared(abouts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is the same of all runs, and the keys in which they differ."""
    keys = dict.fromkeys(itertools.chain.from_iterable(abouts))
    differ = [key for key in keys if len({str(about.get(key)) for about in abouts}) > 1]
    return {key: abouts[0][key] for key in keys if key not in differ}, differ


def map_of_steps(task: Mapping[str, Any], method: Mapping[str, Any]) -> Map | None:
    """A method's IoU of every class after every step; None where it was tested after one alone."""
    iou: Sequence[Percents] = method.get("iou", ())
    steps = [t for t in range(task["last"] + 1) if any(row[t] is not None for row in iou)]
    if len(steps) < 2:
        return None
    lost = [lost_of(row) for row in iou]
    cells = [
        [(row[t], t == steps[-1] and (drop or 0) >= FORGOTTEN) for t in steps]
        for row, drop in zip(iou, lost, strict=True)
    ]
    return _map(task, method["label"], [f"step {t}" for t in steps], cells, lost)


def map_of_methods(task: Mapping[str, Any]) -> Map:
    """The IoU of every class after the last step, method by method."""
    methods = [method for method in task["methods"] if method.get("iou")]
    by_class = [[method["iou"][c] for method in methods] for c in range(len(task["classes"]))]
    cells = [[(row[-1], (lost_of(row) or 0) >= FORGOTTEN) for row in rows] for rows in by_class]
    lost = [_mean(map(lost_of, rows)) for rows in by_class]
    return _map(task, None, [method["label"] for method in methods], cells, lost)


def _map(
    task: Mapping[str, Any],
    label: str | None,
    columns: list[str],
    cells: Sequence[list[tuple[float | None, bool]]],
    lost: Percents,
) -> Map:
    """Rows in order of arrival, grouped by step; in a map to fold, what lost most comes first."""
    classes = task["classes"]
    groups = []
    for step in sorted({entry["step"] for entry in classes}):
        rows = [
            Row(entry["name"], each, drop)
            for entry, each, drop in zip(classes, cells, lost, strict=True)
            if entry["step"] == step
        ]
        means = [(_mean(row.cells[k][0] for row in rows), False) for k in range(len(columns))]
        mean = Row(f"step {step}: mean of {len(rows)}", means, _mean(row.lost for row in rows))
        if len(classes) > FOLD:
            rows.sort(key=lambda row: -(row.lost or 0))
        forgotten = [row for row in rows if any(mark for _, mark in row.cells)]
        groups.append(Arrivals(step, mean, rows, forgotten))
    return Map(label, columns, groups)


def lost_of(row: Percents) -> float | None:
    """Points of IoU from the best step before the last one to the last one."""
    *earlier, last = row
    known = [value for value in earlier if value is not None]
    return max(known) - last if known and last is not None else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
