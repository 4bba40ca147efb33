"""What the report says in words, computed from its figures; and which comparisons are not fair."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scripts.reporting.results import Result
from scripts.reporting.sections import Section
from utils.errors import listing

MARKED = 10.0  # points of IoU that a class must lose to be called forgotten


def make(task: Mapping[str, Any]) -> dict[str, list[str]]:
    """Sentences of each part of a task's report (`summary.make_task_report`)."""
    return {
        "summary": _summary(task),
        "curve": _curve(task),
        "classes": _classes(task),
        "flows": _flows(task),
        "cost": _cost(task),
        "conventions": _conventions(task),
        "pictures": [],
    }


def _value(method: Mapping[str, Any], key: str) -> float | None:
    figure = method["summary"][key]
    return figure["mean"] if figure else None


def _ranked(task: Mapping[str, Any], key: str) -> list[tuple[float, Mapping[str, Any]]]:
    """Incremental methods that have a figure, the largest first."""
    known = [
        (v, m) for m in task["methods"] if not m["joint"] and (v := _value(m, key)) is not None
    ]
    return sorted(known, key=lambda pair: -pair[0])


def _points(value: float) -> str:
    return f"{abs(value):.1f} points"


def _signed(value: float) -> str:
    return f"{value:.1f}".replace("-0.0", "0.0").replace("-", "−")


def _summary(task: Mapping[str, Any]) -> list[str]:
    told = []
    best = _ranked(task, "all")
    if len(best) > 1:
        (first, a), (second, b) = best[:2]
        gaps = _gaps(task, a, b)
        where = f"; it gains most in {listing(gaps)}" if gaps else ""
        told.append(
            f"{a['label']} has the highest mIoU of all classes, {first:.2f}, "
            f"{_points(first - second)} above {b['label']}{where}."
        )
        seeds = min(len(a["runs"]), len(b["runs"]))
        if seeds > 1:
            spread = max(m["summary"]["all"]["std"] or 0 for m in (a, b))
            if first - second < 2 * spread:
                told.append(
                    "That is less than twice the deviation over the seeds: no difference is shown."
                )
        else:
            told.append("One seed is no evidence of a difference of a point or two.")
    forgetting = _ranked(task, "forgetting")
    if len(forgetting) > 1:
        (most, a), (least, b) = forgetting[0], forgetting[-1]
        told.append(
            f"{a['label']} forgets most, {_signed(most)} points of IoU per class, "
            f"{b['label']} least, {_signed(least)}."
        )
    elif forgetting:
        value, method = forgetting[0]
        told.append(f"{method['label']} forgets {_signed(value)} points of IoU per class.")
    upper = [v for m in task["methods"] if m["joint"] and (v := _value(m, "all")) is not None]
    if upper and best:
        below = max(upper) - best[0][0]
        word = "below" if below >= 0 else "above"
        told.append(f"{best[0][1]['label']} ends {_points(below)} {word} joint training.")
    return told


def _gaps(task: Mapping[str, Any], a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """The classes in which `a` is furthest above `b` after the last step."""
    pairs = zip(task["classes"], a["iou"], b["iou"], strict=True)
    gaps = [
        (mine[-1] - theirs[-1], row["name"])
        for row, mine, theirs in pairs
        if mine[-1] is not None and theirs[-1] is not None
    ]
    top = [gap for gap in sorted(gaps, reverse=True)[:2] if gap[0] > 1]
    return [f"{name} (+{gap:.1f})" for gap, name in top]


def _curve(task: Mapping[str, Any]) -> list[str]:
    told = []
    for method in task["methods"]:
        points = {point["step"]: point for point in method["curve"]}
        if {0, task["last"]} <= points.keys() and task["last"] and not method["joint"]:
            start, end = points[0], points[task["last"]]
            change = end["mean"] - start["mean"]
            verb = "loses" if change < 0 else "gains"
            told.append((change, f"{method['label']} {verb} {_points(change)}"))
    if not told:
        return []
    words = [text for _, text in sorted(told, reverse=True)]
    few = words if len(words) <= 4 else [*words[:2], "…", *words[-2:]]
    return [f"Of the mIoU of all classes seen, from the first step to the last: {', '.join(few)}."]


def lost_of(row: Sequence[float | None]) -> float | None:
    """Points of IoU from the best step before the last one to the last one."""
    *earlier, last = row
    known = [value for value in earlier if value is not None]
    return max(known) - last if known and last is not None else None


def _classes(task: Mapping[str, Any]) -> list[str]:
    told = []
    old = [row["step"] < task["last"] and not row["is_background"] for row in task["classes"]]
    for method in task["methods"]:
        drops = [
            (drop, row["name"])
            for row, values, counts in zip(task["classes"], method["iou"], old, strict=True)
            if counts and (drop := lost_of(values)) is not None
        ]
        if drops:
            gone = sorted((drop for drop in drops if drop[0] >= MARKED), reverse=True)
            told.append((method["label"], len(gone), [f"{n} (−{d:.0f})" for d, n in gone[:3]]))
    if not told:
        return []
    what = f"of {sum(old)} old classes by {MARKED:.0f} points or more"
    if len(told) > 6:
        counts = sorted(((number, label) for label, number, _ in told), reverse=True)
        return [f"Forgotten {what}: {listing(f'{label} {number}' for number, label in counts)}."]
    return [
        f"{label} forgets {number} {what}{': ' if worst else ''}{listing(worst)}."
        for label, number, worst in told
    ]


def _flows(task: Mapping[str, Any]) -> list[str]:
    ends = [
        (bar, m["label"])
        for m in task["methods"]
        for bar in m["flows"]
        if bar["step"] == task["last"]
    ]
    if not ends:
        return []
    share, label = max(ends, key=lambda end: end[0]["background"])
    told = [
        f"After the last step {label} gives {share['background']:.1f} % of the pixels of old "
        "classes to background (background shift)"
    ]
    least, other = min(ends, key=lambda end: end[0]["background"])
    if other != label:
        told[0] += f", {other} {least['background']:.1f} %"
    new, which = max(ends, key=lambda end: end[0]["new"])
    if new["new"] >= 1:
        told.append(f"{which} gives the largest share to new classes, {new['new']:.1f} %")
    return [f"{text}." for text in told]


def _cost(task: Mapping[str, Any]) -> list[str]:
    ends = [
        (cost["seconds_per_epoch"], m["label"])
        for m in task["methods"]
        for cost in m["cost"]
        if not m["joint"] and cost["step"] == task["last"] and cost["seconds_per_epoch"]
    ]
    if len(ends) < 2:
        return []
    (low, fast), (high, slow) = min(ends), max(ends)
    return [
        f"An epoch of the last step takes {low:.1f} s with {fast} and {high:.1f} s with {slow}, "
        f"{high / low:.1f} times as long."
    ]


def _conventions(task: Mapping[str, Any]) -> list[str]:
    told = [convention_sentence(each["method"], each["rows"]) for each in task["conventions"]]
    return [text for text in told if text] if len(told) <= 4 else []


def convention_sentence(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """By how much conventions alone move the figure of all classes."""
    known = [row for row in rows if row["all"] is not None]
    if len(known) < 2:
        return ""
    low = min(known, key=lambda row: row["all"])
    high = max(known, key=lambda row: row["all"])
    return (
        f"The same weights of {label} have an mIoU from {low['all']:.2f} ({low['convention']}) to "
        f"{high['all']:.2f} ({high['convention']}): conventions alone move it by "
        f"{_points(high['all'] - low['all'])}."
    )


# -------------------------------------------------------------------------------------- unfairness
def warnings(section: Section) -> list[str]:
    """Why runs of a task cannot be compared with each other as they are, a sentence each."""
    told = []
    if section.last < section.end:
        told.append(
            f"No run has come to step {section.end}: figures are those of step {section.last}."
        )
    for group in section.groups:
        for run in group.runs:
            missing = sorted({*range(section.last)} - {*run.results})
            if section.last not in run.results:
                end = f"ends at step {max(run.results)} of {section.last}"
                told.append(f"{run.name} {end}: no figures of the end.")
            elif missing and not group.joint:
                told.append(
                    f"{run.name} has no test of step {listing(missing)}: no figures over the steps."
                )
            contents = {result.list_of("test").get("contents") for result in run.results.values()}
            if len(contents - {None}) > 1:
                told.append(f"{run.name}: what the files of the test data hold changed on the way.")
            for step, result in run.results.items():
                if epochs := result.content.get("lengthened"):
                    told.append(
                        f"{run.name}, step {step}, was lengthened after epoch {listing(epochs)}, "
                        "where its learning rate rose again: it is no step of that many epochs."
                    )
        seeds = [run.last.seed for run in group.runs if run.last.seed is not None]
        if len({*seeds}) < len(seeds):
            told.append(f"{group.label} has a seed more than once, so its deviation is too small.")
        if not all(run.last.config for run in group.runs):
            told.append(f"{group.label}: a run's config is not there, so it is known by its name.")
    ends = section.ends
    asked: dict[str, list[tuple[str, Any]]] = {
        "test images": [(label, _list_of(r, "test")) for label, r in ends],
        "test data (hash of the files)": [(label, _contents(r)) for label, r in ends],
        "training images": [(label, _list_of(r, "train")) for label, r in ends if not r.joint],
        "what pixels of future classes count as": [(label, r.future) for label, r in ends],
        "size of the test images": [(label, r.cropped) for label, r in ends],
        "network": [(label, _network(r)) for label, r in ends],
    }
    for key, words in (
        ("version", "version of this project"),
        ("code", "source code (hash)"),
        ("torch", "torch"),
        ("precision", "precision of the evaluation"),
    ):
        asked[words] = [(label, r.content.get(key)) for label, r in ends]
    own = [(label, r.content.get("own_code", {})) for label, r in ends]
    for file in sorted({file for _, hashes in own for file in hashes}):
        asked[f"{file} (hash)"] = [(label, hashes.get(file)) for label, hashes in own]
    for what, pairs in asked.items():
        told += _disagreement(what, pairs)
    counts = {group.label: len(group.runs) for group in section.groups}
    if len({*counts.values()}) > 1:
        numbers = listing((f"{label} {n}" for label, n in counts.items()), 12)
        told.append(f"Seeds are not equally many: {numbers}.")
    return told


def _list_of(result: Result, kind: str) -> str | None:
    found = result.list_of(kind)
    return f"{found['images']} ({found['sha256'][:8]})" if found else None


def _contents(result: Result) -> str | None:
    contents = result.list_of("test").get("contents")
    return contents and contents[:12]


def _network(result: Result) -> str | None:
    keys = [f"arch.args.{key}" for key in ("backbone", "output_stride")]
    names = [str(result.config[key]) for key in keys if key in result.config]
    return ", stride ".join(names) or None


def _disagreement(what: str, told: Iterable[tuple[str, Any]]) -> list[str]:
    """A warning when (label, value) differ in their values; those without one do not disagree."""
    by_value: dict[Any, dict[str, None]] = {}
    for label, value in told:
        if value is not None:
            by_value.setdefault(value, {})[label] = None
    if len(by_value) < 2:
        return []
    each = "; ".join(f"{value}: {listing(labels, 4)}" for value, labels in by_value.items())
    return [f"Not the same {what}: {each}."]
