"""The report page: one HTML file out of the dictionary of `report.json`.

The file needs no network and no script: charts are inline SVG
(`charts.py`), pictures are inline as the dictionary holds them, `page.js` only sorts, searches and
copies. Every figure of a method arrives computed; what is worked out here is layout: which value
is the best of its column, which class lost how much, in which group it stands.
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
Values = Sequence["float | None"]  # percent, None where there is nothing


class Row(NamedTuple):
    """A line of a class map: a class, or the mean of a group.

    Attributes:
        cells: IoU per column and whether it tells of forgetting.
        lost: points from the best earlier step to the last one; None for classes of the last step.
    """

    name: str
    cells: list[tuple[float | None, bool]]
    lost: float | None

    @property
    def forgotten(self) -> bool:
        """Whether a cell tells of forgetting."""
        return any(mark for _, mark in self.cells)


class Arrivals(NamedTuple):
    """The classes that arrived in one step."""

    step: int
    mean: Row
    rows: list[Row]

    @property
    def forgotten(self) -> list[Row]:
        """Those that were forgotten."""
        return [row for row in self.rows if row.forgotten]


class Map(NamedTuple):
    """Class × column: the steps of one method, or the last step of every method."""

    label: str | None
    columns: list[str]
    groups: list[Arrivals]


def write_page(report: Mapping[str, Any], file: Path) -> None:
    """Write the page of a report to `file`, atomically.

    Args:
        report: what `report.json` holds; all lists may be missing or empty, all values None.

    Raises:
        UserError: the file cannot be written.
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
    html = environment.get_template("template.html").render(
        report=report,
        tasks=[task | _layout(task, looks) for task in report["tasks"]],
        looks=looks,
        flows=charts.FLOWS,
        ramp=_ramp(),
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
    methods, classes = task["methods"], task["classes"]
    runs = [run for method in methods for run in method.get("runs", ())]
    same, differ = _about([run.get("about", {}) for run in runs])
    terms = {
        name
        for method in methods
        for step in method.get("loss", ())
        for name in step["terms"]
    }  # fmt: skip
    term_looks = charts.term_styles(terms)
    return {
        "best": _best(task),
        "curve": charts.curve(methods, classes, looks),
        "compared": map_of_methods(task) if len(methods) > 1 else None,
        "maps": [found for method in methods if (found := map_of_steps(task, method))],
        "flow_charts": {m["label"]: charts.flow(m) for m in methods if m.get("flows")},
        "terms": term_looks,
        "loss_charts": {
            m["label"]: [charts.loss(m["label"], step, term_looks) for step in m["loss"]]
            for m in methods
            if m.get("loss")
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
    if len(tiles) <= TILES:
        return [{**tile, "first": False} for tile in tiles]
    groups = itertools.groupby(tiles, lambda tile: tile["label"].rsplit(", step", 1)[0])
    lines = [list(group) for _, group in groups]
    return [{**tile, "first": len(line) > 1 and tile is line[0]} for line in lines for tile in line]


def _best(task: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(figure, label) of the best of every column, as far as shown; joint training is no rival."""
    rivals = [method for method in task["methods"] if not method.get("joint")]
    best: set[tuple[str, str]] = set()
    for figure in task["figures"]:
        key, higher = figure["key"], figure.get("higher")
        means = {
            method["label"]: round(cell["mean"], 2)
            for method in rivals
            if (cell := method["summary"].get(key)) and cell.get("mean") is not None
        }
        if higher is not None and len(means) > 1:
            top = (max if higher else min)(means.values())
            best.update((key, label) for label, mean in means.items() if mean == top)
    return best


def _card(groups: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Convention → its row of every method, empty where a method has none."""
    rows = [{row["convention"]: row for row in group["rows"]} for group in groups]
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return {name: [mine.get(name, {}) for mine in rows] for name in names}


def _about(abouts: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """What is the same of all runs, and the keys in which they differ."""
    keys = dict.fromkeys(itertools.chain.from_iterable(abouts))
    differ = [key for key in keys if len({str(about.get(key)) for about in abouts}) > 1]
    return {key: abouts[0][key] for key in keys if key not in differ}, differ


def map_of_steps(task: Mapping[str, Any], method: Mapping[str, Any]) -> Map | None:
    """A method's IoU of every class after every step; None where it was tested after one alone."""
    iou: Sequence[Values] = method.get("iou", ())
    steps = [t for t in range(task["last"] + 1) if any(row[t] is not None for row in iou)]
    if len(steps) < 2:
        return None
    rows = [[row[t] for t in steps] for row in iou]
    marks = [[False] * (len(steps) - 1) + [(lost_of(row) or 0) >= FORGOTTEN] for row in rows]
    names = [f"step {t}" for t in steps]
    return _map(task, method["label"], names, rows, marks, [lost_of(row) for row in rows])


def map_of_methods(task: Mapping[str, Any]) -> Map:
    """The IoU of every class after the last step, method by method."""
    methods = [method for method in task["methods"] if method.get("iou")]
    classes = range(len(task["classes"]))
    rows = [[method["iou"][c][task["last"]] for method in methods] for c in classes]
    lost = [[lost_of(method["iou"][c]) for method in methods] for c in classes]
    marks = [[(value or 0) >= FORGOTTEN for value in row] for row in lost]
    labels = [method["label"] for method in methods]
    return _map(task, None, labels, rows, marks, [_mean(row) for row in lost])


def _map(
    task: Mapping[str, Any],
    label: str | None,
    columns: list[str],
    values: Sequence[Values],
    marks: Sequence[Sequence[bool]],
    lost: Values,
) -> Map:
    """Rows in order of arrival, grouped by step; in a map to fold, what lost most comes first."""
    rows = [
        Row(entry["name"], list(zip(*cells, strict=True)), drop)
        for entry, *cells, drop in zip(task["classes"], values, marks, lost, strict=True)
    ]
    groups = []
    for step in sorted({entry["step"] for entry in task["classes"]}):
        mine = [i for i, entry in enumerate(task["classes"]) if entry["step"] == step]
        means = [(_mean(values[i][column] for i in mine), False) for column in range(len(columns))]
        mean = Row(f"step {step}: mean of {len(mine)}", means, _mean(lost[i] for i in mine))
        ours = [rows[i] for i in mine]
        if len(rows) > FOLD:
            ours.sort(key=lambda row: -(row.lost or 0))
        groups.append(Arrivals(step, mean, ours))
    return Map(label, columns, groups)


def lost_of(row: Values) -> float | None:
    """Points of IoU from the best step before the last one to the last one."""
    *earlier, last = row
    known = [value for value in earlier if value is not None]
    return max(known) - last if known and last is not None else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _ramp() -> list[tuple[str, str]]:
    """Background and text colour of a cell for 0, 1, … 100 percent: viridis, which is even."""
    ramp = []
    for red, green, blue, _ in matplotlib.colormaps["viridis"]([i / 100 for i in range(101)]):
        linear = [
            x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (red, green, blue)
        ]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        # the luminance at which black and white text are equally easy to read (WCAG 2)
        text = "#000" if luminance > 0.179 else "#fff"
        ramp.append((matplotlib.colors.to_hex((red, green, blue)), text))
    return ramp
