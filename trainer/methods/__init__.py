"""The methods by name, as `"method"` in a config or `--method` choose them."""

from base.base_method import BaseMethod
from trainer.methods.dkd import DKD
from trainer.methods.finetune import Finetune

METHODS: dict[str, type[BaseMethod]] = {"dkd": DKD, "finetune": Finetune}
