"""The charts of the report page, drawn by matplotlib as SVG that lives inside an HTML page.

A chart takes its colours from the page's CSS variables, so that both colour
schemes work, and its fonts from the page; it refers to nothing outside itself. Numbers arrive
computed; nothing here knows runs, files or data sets.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

# CSS variables of the page by their stand-in: matplotlib draws in #fe0000, #fe0001, …
METHODS = [f"m{i}" for i in range(8)]
TERMS = [f"t{i}" for i in range(5)]
FLOWS = {"itself": "itself", "background": "background", "old": "another old", "new": "a new class"}
VARIABLES = ["ink", "muted", "rule", *METHODS, *TERMS, *(f"f-{flow}" for flow in FLOWS)]
MARKERS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "*": "★"}
DASHES = ["-", "--", "-.", ":"]


class Style(NamedTuple):
    """How a method looks wherever it appears; `css` is the variable of its colour."""

    css: str
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
    return looks | {
        label: Style("muted", "", "╍", dash)
        for label, dash in zip(bounds, itertools.cycle(DASHES[1:]), strict=False)
    }


def curve(
    methods: Sequence[Mapping[str, Any]],
    classes: Sequence[Mapping[str, Any]],
    looks: Mapping[str, Style],
    width: int,
) -> Markup:
    """mIoU of the classes seen over the steps: a line and a band of ± std per method.

    A method that was tested after one step alone, such as joint training, is a level line.
    Empty where no method has two steps. `width` is in px; the height grows with the labels.
    """
    lines = {
        method["label"]: [point for point in method.get("curve", ()) if point["mean"] is not None]
        for method in methods
    }
    lines = {label: points for label, points in lines.items() if points}
    if max(map(len, lines.values()), default=0) < 2:
        return Markup()
    steps = sorted({point["step"] for points in lines.values() for point in points})
    highest = max(
        point["mean"] + (point.get("std") or 0) for points in lines.values() for point in points
    )
    top = min(100, 10 * (int(highest / 10) + 1))
    words = {label: f"{label} {points[-1]['mean']:.2f}" for label, points in lines.items()}
    right = min(30 + 7 * max(map(len, words.values())), width // 2)
    figure, axes = _chart(width, max(350, 17 * len(lines) + 90), (34, right, 26, 52))
    for label, points in lines.items():
        look = looks[label]
        colour = _colour(look.css)
        x, mean = [p["step"] for p in points], [p["mean"] for p in points]
        if len(points) == 1:
            axes.axhline(mean[0], color=colour, linestyle=look.dash, linewidth=1.5)
            continue
        axes.plot(
            x, mean, look.dash, color=colour, marker=look.marker, markersize=6, linewidth=1.8,
            clip_on=False,
        )  # fmt: skip
        std = [p.get("std") or 0 for p in points]
        if any(std):
            low, high = zip(*((m - s, m + s) for m, s in zip(mean, std, strict=True)), strict=True)
            axes.fill_between(x, low, high, color=colour, alpha=0.16, linewidth=0)
    margin = 0.04 * (steps[-1] - steps[0])
    axes.set_xlim(steps[0] - margin, steps[-1] + margin)
    axes.set_ylim(0, top)
    seen = [sum(c["step"] <= step for c in classes) for step in steps]
    axes.set_xticks(steps, [f"{step}\n{count}" for step, count in zip(steps, seen, strict=True)])
    axes.set_xlabel("step, and the number of classes seen", fontsize=12)
    _head(axes, "mIoU in percent")
    _end_labels(axes, {label: (points[-1], words[label]) for label, points in lines.items()}, looks)
    told = "; ".join(
        f"{label}: " + ", ".join(f"{p['mean']:.2f} at step {p['step']}" for p in points)
        for label, points in lines.items()
    )
    return _svg(figure, f"Line chart of mIoU in percent over the steps. {told}.")


def flow(method: Mapping[str, Any]) -> Markup:
    """Where the pixels of old classes go: a stacked bar of percent per step."""
    stacks = method["flows"]
    panel = _Panel(
        (-0.6, max(len(stacks), 4) - 0.4),
        (0, 100),
        {i: str(bar["step"]) for i, bar in enumerate(stacks)},
        {0: "0", 50: "50", 100: "100 %"},
    )
    for i, bar in enumerate(stacks):
        below = 0.0
        for name in FLOWS:
            share = bar.get(name) or 0
            ends = [(i, below), (i, below + share)]
            panel.line(ends, _colour(f"f-{name}"), linewidth=134 / panel.span)
            below += share
    kept = ", ".join(f"{bar['itself'] or 0:.2f} after step {bar['step']}" for bar in stacks)
    return _svg(
        panel.figure,
        f"Stacked bars: shares of the pixels of old classes with {method['label']}. "
        f"Percent predicted as themselves: {kept}.",
    )


def term_styles(names: Iterable[str]) -> dict[str, Style]:
    """A style per term of the loss; `loss`, their sum, is the strong one."""
    others = sorted(set(names) - {"loss"})
    return {"loss": Style("ink", "", "━", "-")} | {
        name: Style(TERMS[i % len(TERMS)], "", "━", DASHES[i // len(TERMS) % 4])
        for i, name in enumerate(others)
    }


def loss(label: str, step: Mapping[str, Any], looks: Mapping[str, Style]) -> Markup:
    """The terms of one step's loss over its epochs."""
    terms = {name: points for name, points in step["terms"].items() if points}
    epochs = sorted({epoch for points in terms.values() for epoch, _ in points}) or [0]
    values = [0.0, *(value for points in terms.values() for _, value in points)]
    ticks = MaxNLocator(3).tick_values(min(values), max(values) or 1.0)
    panel = _Panel(
        (epochs[0], max(epochs[-1], epochs[0] + 1)),
        (ticks[0], ticks[-1]),
        {epoch: str(epoch) for epoch in (epochs[0], epochs[-1])},
        {tick: f"{tick:g}" for tick in ticks},
        f"step {step['step']}",
    )
    for name, points in terms.items():
        look = looks[name]
        panel.line(
            points, _colour(look.css), linestyle=look.dash,
            linewidth=1.8 if name == "loss" else 1.3,
            marker="o" if len(points) == 1 else "", markersize=4,
        )  # fmt: skip
    last = ", ".join(f"{name} {points[-1][1]:.4g}" for name, points in terms.items())
    return _svg(
        panel.figure, f"Loss of {label} over the epochs of step {step['step']}; at the end {last}."
    )


def bars(
    methods: Sequence[Mapping[str, Any]], key: str, head: str, looks: Mapping[str, Style]
) -> Markup:
    """A bar of `cost[key]` per step and method; empty where nothing was measured."""
    found = {
        (i, cost["step"]): cost[key]
        for i, method in enumerate(methods)
        for cost in method.get("cost", ())
        if cost.get(key) is not None
    }
    if not found:
        return Markup()
    steps = sorted({step for _, step in found})
    figure, axes = _chart(min(max(330, 60 + 16 * len(found)), 1050), 230, (50, 4, 26, 34))
    thick = 0.84 / len(methods)
    for i, method in enumerate(methods):
        mine = [(steps.index(step), value) for (j, step), value in found.items() if i == j]
        if mine:
            x, height = zip(*mine, strict=True)
            offset = (i - (len(methods) - 1) / 2) * thick
            colour = _colour(looks[method["label"]].css)
            axes.bar([at + offset for at in x], height, 0.9 * thick, color=colour, linewidth=0)
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
    axes.set_xlabel("step", fontsize=12)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    _head(axes, head)
    told = "; ".join(
        f"{method['label']}: "
        + ", ".join(f"{v:.2f} at step {step}" for (j, step), v in found.items() if i == j)
        for i, method in enumerate(methods)
    )
    return _svg(figure, f"Bars of {head} per step and method. {told}.")


class _Panel:
    """One of many small charts: lines in a frame of its own.

    matplotlib's axes cost four times as much as everything that such a panel holds.
    """

    LEFT, RIGHT, TOP, BOTTOM = 40, 208, 128, 22  # of the frame, in px from the lower left corner

    def __init__(
        self,
        xs: tuple[float, float],
        ys: tuple[float, float],
        x_ticks: Mapping[float, str],
        y_ticks: Mapping[float, str],
        head: str = "",
    ):
        self.figure = Figure(figsize=(220 / 72, 150 / 72), dpi=72)
        self.figure.patch.set_visible(False)
        self.xs, self.ys = xs, ys
        self.span = xs[1] - xs[0]
        for value, words in y_ticks.items():
            self.line([(x, value) for x in xs], _colour("rule" if value else "muted"), linewidth=1)
            self._text(self.LEFT - 5, self._y(value), words, ha="right", va="center_baseline")
        for value, words in x_ticks.items():
            self._text(self._x(value), 6, words, ha="center")
        self._text(self.LEFT, self.TOP + 9, head)

    def line(self, points: Iterable[tuple[float, float]], colour: str, **looks: Any) -> None:
        """A line through (x, y), …; a bar is a thick one."""
        x, y = zip(*((self._x(x), self._y(y)) for x, y in points), strict=True)
        looks = {"color": colour, "transform": None, "solid_capstyle": "butt"} | looks
        self.figure.add_artist(Line2D(x, y, **looks))

    def _x(self, value: float) -> float:
        return self.LEFT + (value - self.xs[0]) / self.span * (self.RIGHT - self.LEFT)

    def _y(self, value: float) -> float:
        low, high = self.ys
        return self.BOTTOM + (value - low) / (high - low) * (self.TOP - self.BOTTOM)

    def _text(self, x: float, y: float, words: str, **place: Any) -> None:
        self.figure.text(x, y, words, fontsize=11, transform=None, **place)


def _colour(variable: str) -> str:
    """The stand-in of a CSS variable."""
    return f"#fe00{VARIABLES.index(variable):02x}"


def _chart(width: int, height: int, margins: tuple[int, int, int, int]) -> tuple[Figure, Axes]:
    """A figure of that many px with plain axes; margins: left, right, top, bottom in px."""
    left, right, above, below = margins
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    axes = figure.add_axes(
        (
            left / width,
            below / height,
            (width - left - right) / width,
            (height - above - below) / height,
        )
    )
    axes.patch.set_visible(False)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_colour("muted"))
    axes.tick_params(length=0, labelsize=12)
    axes.grid(axis="y", color=_colour("rule"), linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _head(axes: Axes, words: str) -> None:
    """What the vertical axis tells, above it, where it need not be turned."""
    x, y = axes.get_position().x0, axes.get_position().y1
    axes.figure.text(
        0 if len(words) > 8 else x, y + 10 / axes.figure.bbox.height, words, fontsize=12
    )


def _end_labels(
    axes: Axes, ends: Mapping[str, tuple[Mapping[str, Any], str]], looks: Mapping[str, Style]
) -> None:
    """Name every line at its end, level with it or as near as its neighbours allow."""
    box, gap = axes.get_window_extent(), 16.0
    at = {label: axes.transData.transform((p["step"], p["mean"])) for label, (p, _) in ends.items()}
    order = sorted(at, key=lambda label: at[label][1])
    blocks: list[
        list[float]
    ] = []  # labels that touch: where the lowest would lie, for each of them
    for i, label in enumerate(order):
        blocks.append([at[label][1] - i * gap])
        while len(blocks) > 1 and fmean(blocks[-2]) > fmean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    highest = box.y1 - (len(order) - 1) * gap
    lowest = [max(min(fmean(block), highest), box.y0) for block in blocks for _ in block]
    heights = [low + i * gap for i, low in enumerate(lowest)]
    x = box.x1 + 16
    for label, y in zip(order, heights, strict=True):
        look, colour = looks[label], _colour(looks[label].css)
        axes.plot(
            [at[label][0] + 6, x - 7], [at[label][1], y], color=colour, linewidth=0.8,
            transform=None, clip_on=False,
        )  # fmt: skip
        axes.plot(
            [x], [y], color=colour, marker=look.marker or "_", markersize=6, transform=None,
            clip_on=False,
        )  # fmt: skip
        axes.figure.text(
            x + 8, y, ends[label][1], fontsize=12, va="center_baseline", transform=None,
            parse_math=False,
        )  # fmt: skip


_NEXT = itertools.count()


def _svg(figure: Figure, words: str) -> Markup:
    """The figure as an element of a page; `words` is what it shows, for who cannot see it."""
    number = next(_NEXT)  # ids are unique in a page
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(
            file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = file.getvalue()
    text = re.sub(r".*?</style>\s*</defs>", "", text, count=1, flags=re.S)  # up to its own style
    used = set(re.findall(r'url\(#(.+?)\)|href="#(.+?)"', text))
    names = {name for pair in used for name in pair if name}

    def own(tag: re.Match[str]) -> str:
        """A tag as the page needs it; what stands between tags is a label and stays as it is."""
        text = re.sub(
            r' id="(.+?)"', lambda m: f' id="c{number}-{m[1]}"' if m[1] in names else "", tag[0]
        )
        text = re.sub(
            r"url\(#|xlink:href=\"#", lambda m: f"{m[0].removeprefix('xlink:')}c{number}-", text
        )
        text = re.sub(r"#fe00(..)", lambda m: f"var(--{VARIABLES[int(m[1], 16)]})", text)
        text = re.sub(r'font: ([\d.]+px) [^;"]*', r"font-size: \1", text)  # matplotlib up to 3.10
        return re.sub(r' transform="rotate\(-0 .*?\)"| font-family: [^;"]*;?', "", text)

    text = re.sub(r"<[^>]*>", own, text)
    text = re.sub(r"\s*\n\s*", " ", text)
    width, height = figure.bbox.size
    head = (
        '<svg class="chart" viewBox="0 0 {0:.0f} {1:.0f}" width="{0:.0f}" height="{1:.0f}" '
        'role="img" aria-label="{2}">'
    )
    return Markup(head).format(width, height, words) + Markup(text)
