"""The methods by name, as `"method"` in a config or `--method` choose them."""

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
