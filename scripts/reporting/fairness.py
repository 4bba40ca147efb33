"""Why runs cannot be compared as they are, a sentence for each reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from scripts.reporting.results import Result, Run
from scripts.reporting.sections import Group, Section
from utils.errors import listing

Fact = Callable[[Result], Any]


def _list_of(result: Result, split: str) -> str | None:
    known = result.list_of(split)
    return f"{known['images']} ({known['sha256'][:8]})" if known else None


def _contents(result: Result) -> str | None:
    contents = result.list_of("test").get("contents")
    return contents and contents[:12]


def _network(result: Result) -> str | None:
    keys = [f"arch.args.{key}" for key in ("backbone", "output_stride")]
    names = [str(result.config[key]) for key in keys if key in result.config]
    return ", stride ".join(names) or None


def _own(file: str) -> Fact:
    return lambda result: result.content.get("own_code", {}).get(file)


# What should be the same in all tests of the last step; None where it is not known.
MUST_AGREE: dict[str, Fact] = {
    "test images": lambda result: _list_of(result, "test"),
    "test data (hash of the files)": _contents,
    "training images": lambda result: None if result.joint else _list_of(result, "train"),
    "what pixels of future classes count as": lambda result: result.future,
    "size of the test images": lambda result: result.cropped,
    "network": _network,
    "version of this project": lambda result: result.content.get("version"),
    "source code (hash)": lambda result: result.content.get("code"),
    "torch": lambda result: result.content.get("torch"),
    "precision of the evaluation": lambda result: result.content.get("precision"),
}


def warnings(section: Section) -> list[str]:
    """What is not fair in comparing the runs of a task with each other."""
    lines = []
    if section.last < section.end:
        lines.append(
            f"No run has come to step {section.end}: figures are those of step {section.last}."
        )
    for group in section.groups:
        for run in group.runs:
            lines += _of_run(run, section.last)
        lines += _of_group(group)
    files = {file for _, result in section.ends for file in result.content.get("own_code", {})}
    for what, fact in (
        MUST_AGREE | {f"{file} (hash)": _own(file) for file in sorted(files)}
    ).items():
        labels: dict[Any, dict[str, None]] = {}
        for label, result in section.ends:
            if (value := fact(result)) is not None:
                labels.setdefault(value, {})[label] = None
        if len(labels) > 1:
            each = "; ".join(f"{value}: {listing(labels[value], 4)}" for value in labels)
            lines.append(f"Not the same {what}: {each}.")
    counts = {group.label: len(group.runs) for group in section.groups}
    if len({*counts.values()}) > 1:
        numbers = listing((f"{label} {n}" for label, n in counts.items()), 12)
        lines.append(f"Seeds are not equally many: {numbers}.")
    return lines


def _of_run(run: Run, last: int) -> Iterator[str]:
    missing = sorted({*range(last)} - {*run.results})
    if last not in run.results:
        end = f"ends at step {max(run.results)} of {last}"
        yield f"{run.name} {end}: no figures of the end."
    elif missing and not run.last.joint:
        yield f"{run.name} has no test of step {listing(missing)}: no figures over the steps."
    contents = {result.list_of("test").get("contents") for result in run.results.values()}
    if len(contents - {None}) > 1:
        yield f"{run.name}: what the files of the test data hold changed on the way."
    for step, result in run.results.items():
        if epochs := result.content.get("lengthened"):
            yield (
                f"{run.name}, step {step}, was lengthened after epoch {listing(epochs)}, where its "
                "learning rate rose again: it is no step of that many epochs."
            )


def _of_group(group: Group) -> Iterator[str]:
    seeds = [run.last.seed for run in group.runs if run.last.seed is not None]
    if len({*seeds}) < len(seeds):
        yield f"{group.label} has a seed more than once, so its deviation is too small."
    if not all(run.last.config for run in group.runs):
        yield f"{group.label}: a run's config is not there, so it is known by its name."


def too_close(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the difference of the two best methods, of a task's report, is none to rely on."""
    known = [method for method in methods if not method["joint"] and method["summary"]["all"]]
    if len(known) < 2:
        return []
    best, second, *_ = sorted(known, key=lambda method: -method["summary"]["all"]["mean"])
    if min(len(best["runs"]), len(second["runs"])) == 1:
        return ["One seed is no evidence of a difference of a point or two."]
    first, other = best["summary"]["all"], second["summary"]["all"]
    apart = first["mean"] - other["mean"]
    if apart >= 2 * max(first["std"] or 0, other["std"] or 0):
        return []
    return [
        f"{best['label']} is {apart:.1f} points above {second['label']}, less than twice the "
        "deviation over the seeds: no difference is shown."
    ]
