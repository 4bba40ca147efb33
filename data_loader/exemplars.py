"""Memory replay (DKD-M, SSUL-M): which old images a step keeps, and the file that remembers them.

Pure choice and bookkeeping: no model, no ranks, no image. `choose` picks among
candidates; `origins` says from which step an exemplar is, and so which labels it may carry.

The file has the published form, one entry per step, so it may be exchanged with the published code:
`{"step_2": {"memory_candidates": [[name, [label ids]], …], "memory_list": [names, sorted]}, …}`.
Names are those of the published lists, for VOC whole lines; bare image ids are read as well.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from base.base_dataset import bare_id
from utils.config_file import read_json
from utils.config_schema import Key
from utils.errors import UserError, shortened
from utils.files import write_json
from utils.forms import TEXT, fault
from utils.labels import WIDE_VOID

FILE = "memory.json"
LARGEST = 1 << 24  # bytes of the file: of some 100,000 exemplars
LABEL_ID = Key("", (int,), 0, most=WIDE_VOID)
ENTRY = {"memory_candidates": [(TEXT, [LABEL_ID])], "memory_list": [TEXT]}
# The old classes would be replayed no more, or other images than were.
CHOOSE_ANEW = "; put the file of that run there, or train that step anew."


class Candidate(NamedTuple):
    """An image that may be kept: its bare id, and the label ids of the classes that it shows."""

    name: str
    ids: tuple[int, ...]


def merge(kept: Sequence[Candidate], fresh: Sequence[Candidate]) -> list[Candidate]:
    """Candidates of a step: what the last memory holds and the last step's images, each once."""
    ids: dict[str, set[int]] = {}
    for candidate in (*kept, *fresh):
        ids.setdefault(candidate.name, set()).update(candidate.ids)
    return [Candidate(name, tuple(sorted(labels))) for name, labels in ids.items()]


def choose(
    candidates: Sequence[Candidate], classes: Sequence[int], size: int, seed: int
) -> dict[int, list[Candidate]]:
    """Choose exemplars evenly over the old classes.

    Candidates and classes are shuffled; then the classes take turns, each taking the first of the
    candidates left that holds it, until `size` are taken or a whole round finds none.

    Args:
        candidates: each image once.
        classes: label ids of the old classes.
        size: exemplars wanted.

    Returns:
        Old class → the exemplars taken for it, in the order of `classes`.
    """
    generator = random.Random(seed)
    order, turns = list(candidates), list(classes)
    generator.shuffle(order)
    generator.shuffle(turns)
    queues = {label: iter([c for c in order if label in c.ids]) for label in turns}
    taken: dict[int, list[Candidate]] = {label: [] for label in classes}
    names: set[str] = set()
    any_taken = True
    while any_taken:
        any_taken = False
        for label in turns:
            if len(names) == size:
                return taken
            candidate = next((c for c in queues[label] if c.name not in names), None)
            if candidate is not None:
                taken[label].append(candidate)
                names.add(candidate.name)
                any_taken = True
    return taken


def write(
    path: Path,
    step: int,
    kept: Sequence[Candidate],
    earlier: dict[str, Any],
    lines: Mapping[str, str],
) -> None:
    """Write the memory of `step` before those of the earlier steps, atomically.

    Args:
        kept: the exemplars of `step`.
        earlier: the earlier memories, as `read` returns them.
        lines: bare image id → its name in published lists (`Entry.line`).
    """
    entries = {f"step_{step}": kept} | {key: _candidates(entry) for key, entry in earlier.items()}
    memory = {}
    for key, candidates in entries.items():
        named = [(lines.get(c.name, c.name), c.ids) for c in candidates]
        names = sorted(name for name, _ in named)
        memory[key] = {"memory_candidates": named, "memory_list": names}
    write_json(path, memory)


def read(
    path: Path,
    classes: Collection[int] | None = None,
    *,
    step: int | None = None,
    known: Collection[int] | None = None,
) -> dict[str, Any]:
    """The memories in a file, checked.

    Args:
        classes: leave out all other label ids; published files have void among theirs.
        step: whose memory it must hold, with exemplars, and those of all steps before it.
        known: every label id that a mask may hold, void among them.

    Raises:
        UserError: the file is missing, no JSON, or has another form.
    """
    source = f"memory list {path}"
    memory = read_json(path, "memory list", LARGEST)
    if not isinstance(memory, dict):
        raise UserError(f"{source} must hold one JSON object, step_t: {{…}}.")
    for key, entry in memory.items():
        if not re.fullmatch(r"step_[1-9]\d{0,3}", key):
            raise UserError(f"{source}: '{shortened(key)}' is no step_1, step_2, ….")
        if wrong := _fault(entry, key, known):
            raise UserError(
                f'{source}: {wrong}; a step holds "memory_candidates", a list of '
                '[name, [label ids]], and "memory_list", the same names.'
            )
        if classes is not None:
            for _, ids in entry["memory_candidates"]:
                ids[:] = [label for label in ids if label in classes]
    if step is not None:
        for each in range(1, step + 1):
            if f"step_{each}" not in memory:
                raise UserError(f"{source} has no step_{each}{CHOOSE_ANEW}")
        if not stored(memory, step):
            raise UserError(f"{source}: step_{step} is empty{CHOOSE_ANEW}")
    return memory


def _fault(entry: Any, key: str, known: Collection[int] | None) -> str | None:
    """What is wrong with the memory of a step, as text."""
    if wrong := fault(entry, ENTRY, key):
        return wrong
    pairs = entry["memory_candidates"]
    names = [name for name, _ in pairs]
    bare = [bare_id(name) for name in names]
    if twice := [name for name, times in Counter(bare).items() if times > 1]:
        return f"{key} names image {twice[0]} twice"
    if sorted(names) != sorted(entry["memory_list"]):
        return f"{key}.memory_list has other names than memory_candidates"
    for name, ids in pairs:
        if not ids or len({*ids}) < len(ids):
            return f"{key} has no label id, or one twice, in image {name}"
        strange = [label for label in ids if known is not None and label not in known]
        if strange:
            return f"{key} has the label id {strange[0]} in image {name}, which no mask can hold"
    return None


def stored(memory: dict[str, Any], step: int) -> list[Candidate]:
    """What the memory of `step` holds; nothing when there is none, which `read` refuses."""
    return _candidates(memory.get(f"step_{step}", {"memory_candidates": []}))


def _candidates(entry: dict[str, Any]) -> list[Candidate]:
    return [Candidate(bare_id(name), tuple(ids)) for name, ids in entry["memory_candidates"]]


def origins(memory: dict[str, Any], step: int) -> dict[str, int]:
    """Exemplar of `step` → the step of whose training images it was when it was stored.

    An image that was kept over several steps was stored before the first of them.
    """
    steps = {}
    for candidate in stored(memory, step):
        first = step
        while first > 1 and any(c.name == candidate.name for c in stored(memory, first - 1)):
            first -= 1
        steps[candidate.name] = first - 1
    return steps
