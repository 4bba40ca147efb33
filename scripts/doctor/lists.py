"""The data doctor reads both lists and judges them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from base.base_dataset import BaseDataset, Entry
from base.image_files import list_folder
from scripts.doctor.findings import SPLIT_NAMES, Faults, Finding, collect
from utils.errors import UserError


def read_lists(
    known: type[BaseDataset], root: Path, own: Sequence[str] | None, follow_links: bool
) -> tuple[dict[str, BaseDataset], list[Finding]]:
    """Read and judge both lists.

    Returns:
        The readers, with all entries that mean something; the findings.

    Raises:
        UserError: `own`, the names of a config, cannot be those of label ids.
    """
    readers, findings = {}, []
    for split in SPLIT_NAMES:
        errors: list[UserError] = []
        readers[split] = known(split, str(root), own, follow_links, errors)
        # Both splits have the same names.
        faults = [(f.kind, str(f)) for f in errors if f.kind != "names" or split == "val"]
        faults += [*garbled(readers[split].entries), *left_out(readers[split])]
        findings += collect(known, faults, split)
    entries = {split: reader.entries for split, reader in readers.items()}
    outside = {path for reader in readers.values() for path, _, _ in strays(reader)}
    findings += collect(known, [*overlap(**entries), *extra_files(entries, outside)])
    return readers, findings


def garbled(entries: Sequence[Entry]) -> Faults:
    """Names that are no text."""
    for entry in entries:
        if any("\ud800" <= character <= "\udfff" for character in entry.line):
            yield "garbled", f"{entry.where}: {entry.line}"


def overlap(train: Sequence[Entry], val: Sequence[Entry]) -> Faults:
    """Ids that stand in both lists."""
    places = {entry.id: entry.where for entry in val}
    for entry in train:
        if entry.id in places:
            yield "overlap", f"{entry.where}: {entry.id}, also at {places[entry.id]}"


def strays(reader: BaseDataset) -> Iterator[tuple[Path, Entry, str]]:
    """Files that lie outside the root, by their path or by a symbolic link, and where."""
    root = os.path.join(os.path.realpath(reader.root), "")
    for entry in reader.entries:
        for path in (entry.image, entry.mask):
            with contextlib.suppress(OSError, ValueError):  # impossible names: reading will tell
                if not (real := os.path.realpath(path)).startswith(root):
                    yield path, entry, real


def left_out(reader: BaseDataset) -> Faults:
    """What lies in the folders whose images are the list, and is no image."""
    for folder, content in reader.listings.items():
        for name in (*content.others, *content.folders):
            yield "left out", f"{folder / name}"


def extra_files(entries: Mapping[str, Sequence[Entry]], outside: set[Path]) -> Faults:
    """Images that are not listed, and hidden files, in the folders of the listed files."""
    files = {path for listed in entries.values() for e in listed for path in (e.image, e.mask)}
    listed = {os.path.normpath(path) for path in files}
    for folder in sorted({os.path.dirname(os.path.normpath(path)) for path in files - outside}):
        with contextlib.suppress(OSError, ValueError):  # reported where its files are missing
            content = list_folder(folder)
            for kind, names in (("extra", content.images), ("hidden", content.hidden)):
                for path in (os.path.join(folder, name) for name in names):
                    if path not in listed:
                        yield kind, path
