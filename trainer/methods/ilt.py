"""ILT: Incremental Learning Techniques for Semantic Segmentation (ICCV workshops 2019)."""

from __future__ import annotations

from dataclasses import dataclass

from base.base_method import Terms, Total, setting
from base.base_model import ModelOutput
from base.batch import Batch
from models.pixels import full_precision
from trainer.methods.lwf import LwF


class ILT(LwF):
    """LwF, and the backbone's features stay near the teacher's; as MiB's code has it."""

    label = "ILT"

    @dataclass(frozen=True)
    class Settings(LwF.Settings):
        """Weights of the terms."""

        mse: float = setting(100.0, "weight of the squared distance of the backbone's features")

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({"backbone_features"} if self.needs_teacher else ())

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        terms = super().losses(batch, student, teacher, total)
        if teacher is not None:
            distance = full_precision(student.require("backbone_features")) - full_precision(
                teacher.require("backbone_features")
            )
            terms["mse"] = distance.square().mean()[None]
        return terms
