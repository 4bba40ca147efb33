"""The methods by name, as `"method"` in a config or `--method` choose them."""

from collections.abc import Iterable
from inspect import getattr_static

from base.base_method import BaseMethod
from trainer.methods.dkd import DKD
from trainer.methods.finetune import Finetune
from trainer.methods.ft import FT
from trainer.methods.ilt import ILT
from trainer.methods.lwf import LwF
from trainer.methods.lwf_mc import LwFMC
from trainer.methods.mib import MiB
from trainer.methods.plop import PLOP
from trainer.methods.sdr import SDR
from trainer.methods.ssul import SSUL

METHODS: dict[str, type[BaseMethod]] = {
    "dkd": DKD,
    "finetune": Finetune,
    "ft": FT,
    "lwf": LwF,
    "lwf_mc": LwFMC,
    "ilt": ILT,
    "mib": MiB,
    "plop": PLOP,
    "sdr": SDR,
    "ssul": SSUL,
}


def display_name(name: str, memory: bool = False) -> str:
    """What tables call a method, known or not; one that replays old images is called NAME-M."""
    kind = METHODS.get(name)
    own = vars(kind).get("label", name) if kind else name
    return f"{own}-M" if memory else own


def in_order(names: Iterable[str]) -> list[str]:
    """Methods as tables have them: lower bounds, which never need a teacher, first; then `METHODS`
    in its order, but for the first one, which is compared with all; then unknown ones."""
    given = {*names}
    bounds = [name for name in METHODS if getattr_static(METHODS[name], "needs_teacher") is False]
    main, *others = (name for name in METHODS if name not in bounds)
    known = [name for name in (*bounds, *others, main) if name in given]
    return known + sorted(given - METHODS.keys())


def of_family(family: str) -> list[str]:
    """The methods whose steps continue from one another's, as far as their states go."""
    return [name for name, kind in METHODS.items() if kind.family == family]
