"""The data doctor: check a data tree before days of training are spent on it.

    python scripts/check_data.py voc --data_dir /dataset/VOC2012
    python scripts/check_data.py ade --config my.json --all

It reads the lists, then every image and mask once, with --saliency_dir also the saliency map of
every training image, and goes on after every fault: the report says what is wrong, where, how often
and what to do. With --config the folders, the classes and the task are that config's, and every
step of the task is judged too. It writes nothing and opens no file outside the root and the folder
of maps. Exit code: 0 good, perhaps with warnings; 1 errors found; 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# Nothing here imports torch: every reading process imports this file, and would wait for it.
from base.base_dataset import BaseDataset
from base.task import make_task
from data_loader import DATA_SETS as registry
from scripts.doctor.findings import SPLIT_NAMES, Finding, collect, failed, printable, report
from scripts.doctor.lists import read_lists
from scripts.doctor.pictures import (
    absent_classes,
    all_void,
    copies,
    extra_maps,
    followed,
    presence_of,
    read_pictures,
    saliency_maps,
)
from scripts.doctor.steps import check_steps, incomplete, published_faults, refusal
from utils.errors import listing, one_sentence_errors
from utils.parse_config import ConfigParser

EXAMPLES = 5  # places shown per finding

# Data set of the command line → its reader
DATA_SETS = {reader.name: reader for reader in registry.values()}


def check_tree(known: type[BaseDataset], config: ConfigParser, steps: bool) -> list[Finding]:
    """Check the tree that a config names; print how large it is.

    Args:
        known: the data set.
        config: its `data_loader.args` say root, classes and task.
        steps: judge the steps of the task, too.

    Raises:
        UserError: an impossible task, setting, step or list of class names.
    """
    args = config["data_loader"]["args"]
    root, own = known.find_root(args["data_dir"]), args["class_names"]
    if not os.path.isdir(root):
        return collect(known, [("root", f"{root}")])
    readers, findings = read_lists(known, root, own, args.get("follow_links", False))
    names = readers["val"].class_names
    block = {key: args["task"][key] for key in ("name", "setting", "step", "steps")}
    block |= {"own_classes": own is not None, "background": known.background}
    task = make_task(known.name, known.tables, names, **block)

    counts = (f"{len(reader)} {SPLIT_NAMES[split]} images" for split, reader in readers.items())
    print(f"{printable(str(root))}: {listing(counts)}, {len(task.classes)} classes")
    maps, fault = saliency_maps(args["saliency_dir"])
    findings += collect(known, [*fault, *extra_maps(maps, readers["train"].entries)])
    inspections, presence = read_pictures(readers, maps), {}
    for split, reader in readers.items():
        presence[split] = presence_of(reader, inspections[split])
        faults = [fault for seen in inspections[split] for fault in seen.faults]
        faults = [*all_void(faults, presence[split], task), *followed(reader)]
        faults += absent_classes(split, presence[split], task)
        findings += collect(known, faults, split)
    findings += collect(known, copies(readers, inspections))

    why = "the classes are the config's own" if own is not None else incomplete(known, readers)
    if not why and failed(findings):
        why = "there are errors"
    if why:
        findings += collect(known, [("not compared", why)])
    else:
        findings += collect(known, published_faults(known, readers, presence, names))
    if not failed(findings):
        findings += collect(known, refusal(config))
    if steps:
        lines, step_faults = check_steps(config, task, readers, presence)
        print("\n".join(lines))
        findings += collect(known, step_faults)
    return findings


def main(argv: Sequence[str] | None = None) -> int:
    """Check, print the report, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data_set", choices=DATA_SETS, help="which data set, or own data in its layout")
    add("--data_dir", metavar="DIR", help="its root; default: that of the config")
    add("--config", metavar="FILE", help="take folders, classes, task from it; judge the steps")
    add("--saliency_dir", metavar="DIR", help="saliency maps ID.png of its training images")
    add("--follow_links", action="store_true", help="read files behind links out of the root")
    add("--all", action="store_true", help="list every place of every finding")
    args = parser.parse_args(argv)
    flags = {name: getattr(args, name) for name in ("config", "data_dir", "saliency_dir")}
    arguments = [
        word for name, value in flags.items() if value is not None for word in (f"--{name}", value)
    ]
    arguments += ["--follow_links"] if args.follow_links else []
    config = ConfigParser.from_args("train", f"configs/config_{args.data_set}.json", argv=arguments)
    findings = check_tree(DATA_SETS[args.data_set], config, steps=args.config is not None)
    print(report(findings, None if args.all else EXAMPLES))
    return int(failed(findings))


if __name__ == "__main__":
    with one_sentence_errors():
        sys.exit(main())
