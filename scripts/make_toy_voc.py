"""Make a small synthetic data set in PASCAL VOC layout: 20 kinds of coloured, patterned shapes.

    python scripts/make_toy_voc.py --out DIR

A small network learns it from scratch on a CPU in minutes.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.toy_data.tree import make_saliency, make_toy_voc
from utils.errors import UserError, one_sentence_errors
from utils.text import path_argument


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels, as in 128x96")
    return int(match[1]), int(match[2])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help).")


def main() -> None:
    parser = _Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--out",
        type=path_argument,
        required=True,
        metavar="DIR",
        help="folder to make; new or empty",
    )
    add("--train", type=int, default=600, metavar="N", help="training images (%(default)s)")
    add("--val", type=int, default=100, metavar="N", help="validation images (%(default)s)")
    add("--size", type=_size, default="128x96", metavar="WxH", help="image size (%(default)s)")
    add("--seed", type=int, default=1, metavar="N", help="same seed, same files (%(default)s)")
    add("--saliency", type=path_argument, metavar="DIR", help="also make saliency maps, for SSUL")
    args = vars(parser.parse_args())
    saliency = args.pop("saliency")
    make_toy_voc(**args)
    if saliency is not None:
        make_saliency(args["out"], saliency)


if __name__ == "__main__":
    with one_sentence_errors():
        main()
