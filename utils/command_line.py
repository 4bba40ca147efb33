"""The command line of an entry script: its flags, what they ask for, the values they give keys."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from utils.config_file import check_value, flatten
from utils.config_schema import FLAGS, SCHEMA, StepRange, key_of
from utils.errors import UserError, did_you_mean
from utils.text import path_of

SETTINGS_HINT = "settings of a method, the block hyperparameter: --method NAME --help"


@dataclass(frozen=True)
class Call:
    """What a command line asks to be done with a configuration.

    Attributes:
        mode: "train" or "eval".
        resume: the checkpoint of `-r`, or None.
        auto: `-r auto` was given: go on with whatever is left.
        base: the step folder of `--base`, or None.
        device: the text of `-d`, or None.
        test: evaluate, do not train.
        steps: what `--task_step` names when it is not one step, also in the call of one of them.
    """

    mode: str = "train"
    resume: Path | None = None
    auto: bool = False
    base: Path | None = None
    device: str | None = None
    test: bool = False
    steps: StepRange | None = None

    @classmethod
    def of(cls, mode: str, options: Mapping[str, Any]) -> Call:
        """The call that `read_options` gives, but for its steps.

        Raises:
            UserError: there is no such file.
        """
        named, base = options["resume"], options.get("base")
        auto = mode == "train" and named == "auto"
        resume = None
        if named is not None and not auto:
            resume = Path(path_of(named, "-r/--resume"))
            if not resume.is_file():
                raise UserError(f"-r/--resume: there is no file {resume}.")
        base = None if base is None else Path(path_of(base, "--base"))
        test = options["test"] or mode == "eval"
        return cls(mode, resume, auto, base, options["device"], test)

    def at_step(self, step: int) -> Call:
        """Of one of several steps, which starts or goes on by itself; only step 0 has a base."""
        base = None if step else self.base
        return replace(self, auto=self.resume is None, base=base)


def read_options(
    mode: str,
    description: str | None,
    argv: Sequence[str] | None,
    settings_help: Callable[[str], str] | None,
) -> dict[str, Any]:
    """Flag → value; arguments as of `ConfigParser.from_args`.

    Raises:
        UserError: an unknown flag, or a value of another type.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    epilog = None
    if settings_help is not None and {"-h", "--help"} & {*arguments}:
        named = [after for word, after in pairwise(arguments) if word == "--method"]
        epilog = settings_help(named[-1]) if named else SETTINGS_HINT
    options = vars(_argument_parser(mode, description, epilog).parse_args(arguments))
    _check_local_rank(options["local_rank"])
    return options


class _ArgumentParser(argparse.ArgumentParser):
    """argparse that reports in one sentence instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            message += did_you_mean(message.split()[2].split("=")[0], self._option_string_actions)
        raise UserError(f"{message[:1].lower()}{message[1:]}; see {self.prog} --help.")


def _argument_parser(
    mode: str, description: str | None, epilog: str | None
) -> argparse.ArgumentParser:
    parser = _ArgumentParser(
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    metavars: dict[Callable[[str], Any], str] = {int: "N", float: "X", str: "TEXT"}
    add(
        "-c",
        "--config",
        metavar="FILE",
        help="JSON config, over the one beside the weights of -r and over the shipped one",
    )
    if mode == "train":
        add(
            "-r",
            "--resume",
            metavar="FILE|auto",
            help="checkpoint to continue from; auto: the "
            "newest good one of the step, or a fresh start; a finished step is left alone",
        )
        add(
            "--base",
            metavar="DIR",
            help="take the finished step 0 of another run from its folder "
            "DIR, when everything that decides its weights is equal",
        )
        add("--test", action="store_true", help="evaluate the trained step, do not train")
    else:
        add("-r", "--resume", metavar="FILE", required=True, help="weights to evaluate")
        add("--test", action="store_true", help="accepted for old scripts: this always tests")
    add(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="any key of the config, such as hyperparameter.kd=10, as often as needed",
    )
    add("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    add("-d", "--device", metavar="IDS", help="GPU ids, such as 0 or 0,1; cpu: no GPU")
    for flag in FLAGS:
        if mode == "eval" and not flag.eval_too:
            continue
        doc = f"{flag.key}: {key_of(flag.key).doc}".replace("%", "%%")
        if flag.convert is None:
            add(*flag.names, dest=flag.key, help=doc, action=argparse.BooleanOptionalAction)
        else:
            metavar = metavars.get(flag.convert, "N|all|N-N")
            add(*flag.names, dest=flag.key, help=doc, type=flag.convert, metavar=metavar)
    return parser


def typed_values(args: Mapping[str, Any]) -> tuple[dict[str, Any], StepRange | None]:
    """The values of the typed flags, and the steps where `--task_step` names several."""
    values: dict[str, Any] = {}
    steps = None
    for given in args["set"]:
        values |= _assigned(given)
    for flag in FLAGS:
        value = args.get(flag.key)
        if isinstance(value, StepRange):
            steps, value = value, value.first
        if value is not None:
            values[flag.key] = check_value(flag.key, value, f"flag {flag.names[-1]}")
    if steps is not None and args.get("resume") not in (None, "auto"):
        raise UserError(
            "-r FILE is of one step, but --task_step names several; in training every one of them "
            "goes on by itself where it stands, so leave -r out."
        )
    return values, steps


def _assigned(given: str) -> dict[str, Any]:
    """The key and the value of a `--set`; what is no JSON is text."""
    dotted, sign, text = given.partition("=")
    if not sign:
        raise UserError(f"--set {given}: give KEY=VALUE, such as hyperparameter.kd=10.")
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if dotted in SCHEMA and str in SCHEMA[dotted].types and not SCHEMA[dotted].accepts(value):
        value = text  # a name such as 2012
    tree = value
    for name in reversed(dotted.split(".")):
        tree = {name: tree}
    return flatten(tree, f"--set {given}", strict=True)[0]


def _check_local_rank(number: int | None) -> None:
    """What the old launcher, torch.distributed.launch, gives each process besides variables.

    Raises:
        UserError: there are no such variables, or they say something else.
    """
    variable = os.environ.get("LOCAL_RANK")
    if number is not None and variable != str(number):
        there = "is not set" if variable is None else f"is {variable}"
        raise UserError(
            f"--local-rank is {number}, but the variable LOCAL_RANK, which decides, {there}; start "
            f"the processes with torchrun --nproc_per_node N {Path(sys.argv[0]).name} …, without "
            "--local-rank."
        )
