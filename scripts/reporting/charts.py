"""The charts of the report page: matplotlib's SVG, each an image of its own.

Drawn for a white page, without a background; a dark page inverts them (`page.css`). Numbers arrive
computed; nothing here knows runs, files or data sets.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, MUTED, RULE = "#1b1d21", "#595f69", "#cdd1d7"
METHODS = (
    *("#0072b2", "#d55e00", "#739a7d", "#97546e"),
    *("#615407", "#014165", "#161616", "#582506"),
)
TERMS = ("#4684fc", "#c83d70", "#103804", "#7d7a00", "#8b0075")
# Where pixels of old classes go: what that is called, and its colour.
FLOWS = {
    "itself": ("itself", "#3b7ea1"),
    "background": ("background", "#a9b0ba"),
    "old": ("another old", "#e0a526"),
    "new": ("a new class", "#8f2d1f"),
}
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "*": "★"}
DASHES = ("-", "--", "-.", ":")
LOOK: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "report",  # the same file each time
    "text.parse_math": False,
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("font.size", "axes.titlesize", "axes.labelsize"), 12),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top"), False),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "grid.color": RULE,
    "legend.frameon": False,
}


class Style(NamedTuple):
    """How a method, or a term of the loss, looks wherever it appears."""

    colour: str
    marker: str
    glyph: str
    dash: str


def method_styles(methods: Iterable[Mapping[str, Any]]) -> dict[str, Style]:
    """A style per label in order of appearance; the first 56 differ in colour or marker.

    Joint training is a bound and no competitor: grey and dashed.
    """
    joint = {method["label"]: bool(method.get("joint")) for method in methods}
    looks: dict[str, Style] = {}
    for label in (label for label in joint if not joint[label]):
        i = len(looks)
        marker = list(MARKERS)[i % len(MARKERS)]
        looks[label] = Style(METHODS[i % 8], marker, MARKERS[marker], DASHES[i // 8 % 4])
    bounds = (label for label in joint if joint[label])
    dashes = itertools.cycle(DASHES[1:])
    return looks | {label: Style(MUTED, "", "╍", next(dashes)) for label in bounds}


def term_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style per term of the loss; `loss`, their sum, is the strong one."""
    others = sorted(set(names) - {"loss"})
    return {"loss": Style(INK, "", "━", "-")} | {
        name: Style(TERMS[i % len(TERMS)], "", "━", DASHES[i // len(TERMS) % 4])
        for i, name in enumerate(others)
    }


@matplotlib.rc_context(LOOK)
def curve(
    methods: Sequence[Mapping[str, Any]],
    classes: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Style],
) -> Markup:
    """mIoU of the classes seen over the steps: a line and a band of ± std per method.

    A method that was tested after one step alone, such as joint training, is a level line.
    Empty where no method has two steps.
    """
    lines = {m["label"]: [p for p in m.get("curve", ()) if p["mean"] is not None] for m in methods}
    lines = {label: points for label, points in lines.items() if points}
    if max(map(len, lines.values()), default=0) < 2:
        return Markup()
    figure, axes = _chart(1050, max(350, 20 * len(lines) + 40), "mIoU in percent")
    for label, points in sorted(lines.items(), key=lambda line: -line[1][-1]["mean"]):
        look = looks[label]
        text = f"{label} {points[-1]['mean']:.2f}"
        style: dict[str, Any] = {"color": look.colour, "ls": look.dash, "label": text}
        steps, mean = [p["step"] for p in points], [p["mean"] for p in points]
        if len(points) == 1:
            axes.axhline(mean[0], linewidth=1.5, **style)
            continue
        axes.plot(steps, mean, marker=look.marker, linewidth=1.8, clip_on=False, **style)
        std = [p.get("std") or 0 for p in points]
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=look.colour, alpha=0.16, linewidth=0)
    axes.set_ylim(0, min(100, axes.get_ylim()[1]))
    axes.yaxis.set_major_locator(MaxNLocator(10))
    steps = sorted({point["step"] for points in lines.values() for point in points})
    seen = [sum(c["step"] <= step for c in classes) for step in steps]
    axes.set_xticks(steps, [f"{step}\n{count}" for step, count in zip(steps, seen, strict=True)])
    axes.set_xlabel("step, and the number of classes seen")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return _image(figure, "Line chart of mIoU in percent over the steps; its numbers stand below.")


@matplotlib.rc_context(LOOK)
def flow(method: Mapping[str, Any]) -> Markup:
    """Where the pixels of old classes go: a stacked bar of percent per step."""
    figure, axes = _chart(220, 150)
    steps, below = [bar["step"] for bar in method["flows"]], [0.0] * len(method["flows"])
    for name, (_, colour) in FLOWS.items():
        shares = [bar.get(name) or 0 for bar in method["flows"]]
        axes.bar(steps, shares, bottom=below, color=colour, width=0.8)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    axes.set(xlim=(steps[0] - 0.6, max(steps[-1], steps[0] + 3) + 0.6), ylim=(0, 100))
    axes.set_xticks(steps[:: math.ceil(len(steps) / 4)])
    axes.set_yticks((0, 50, 100), ("0", "50", "100 %"))
    return _image(figure, f"Stacked bars of {method['label']}; their numbers stand below.")


@matplotlib.rc_context(LOOK)
def loss(label: str, step: Mapping[str, Any], looks: Mapping[str, Style]) -> Markup:
    """The terms of one step's loss over its epochs."""
    figure, axes = _chart(220, 150, f"step {step['step']}")
    terms = {name: points for name, points in step["terms"].items() if points}
    for name, points in terms.items():
        marker = "o" if len(points) == 1 else ""
        look, width = looks[name], 1.8 if name == "loss" else 1.3
        axes.plot(*zip(*points, strict=True), look.dash, c=look.colour, lw=width, marker=marker)
    axes.set_ylim(bottom=min(0, axes.dataLim.y0))
    last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in terms.items())
    text = f"Loss of {label} over the epochs of step {step['step']}; at the end {last}."
    return _image(figure, text)


@matplotlib.rc_context(LOOK)
def bars(
    methods: Sequence[Mapping[str, Any]], key: str, head: str, looks: Mapping[str, Style]
) -> Markup:
    """A bar of `cost[key]` per step and method; empty where nothing was measured."""
    costs = {
        method["label"]: {
            cost["step"]: cost[key]
            for cost in method.get("cost", ())
            if cost.get(key) is not None
        }
        for method in methods
    }  # fmt: skip
    count, steps = sum(map(len, costs.values())), sorted({*itertools.chain(*costs.values())})
    if not count:
        return Markup()
    figure, axes = _chart(min(max(330, 60 + 16 * count), 1050), 230, head)
    thick = 0.84 / len(methods)
    for i, (label, cost) in enumerate(costs.items()):
        places = [steps.index(step) + (i - (len(methods) - 1) / 2) * thick for step in cost]
        axes.bar(places, list(cost.values()), 0.9 * thick, color=looks[label].colour)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("step")
    return _image(figure, f"Bars of {head} per step and method; their numbers stand below.")


def _chart(width: int, height: int, title: str = "") -> tuple[Figure, Axes]:
    """A figure of that many px with one pair of axes."""
    figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure, axes


def _image(figure: Figure, text: str) -> Markup:
    """The figure as an element of a page; `text` is what it shows, for who cannot see it."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    tag = '<img class="chart" src="{}" width="{:.0f}" height="{:.0f}" alt="{}" loading="lazy">'
    source = f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"
    return Markup(tag).format(source, *figure.bbox.size, text)
