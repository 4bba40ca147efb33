"""The contract between the training loop and a method.

The loop never asks which method is running; a method never touches optimizer, scaler or ranks. A
method lives in one file of `trainer/methods/`. What is called when, in a step:

    start → begin_step (a fresh start only) or load_state (a resumed one)
          → losses, every iteration → end_step, after the last epoch → state, in every checkpoint
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch

from base.base_model import BaseModel, HeadPlan, ModelOutput
from base.batch import Batch
from base.task import Task
from utils.checkpoint_form import without_values
from utils.config_schema import NUMBER, Key
from utils.errors import UserError, choose
from utils.forms import shown

# What channel 0 of a family's networks is; a step continues from one of its own family.
FAMILIES = {
    "auxiliary": "an auxiliary head",
    "background": "the background class",
    "unknown": "the background class, beside an unknown head",
}

Total = Callable[[torch.Tensor], torch.Tensor]  # sum over all ranks
Terms = dict[str, torch.Tensor]  # name of a loss term → per-class values


def setting(default: float | bool | str, doc: str, **limits: Any) -> Any:
    """A field of a method's `Settings`.

    Args:
        default: its type is the field's; a number may be given for a float.
        doc: what it means, for `--help` and the reference.
        limits: `least`, `above`, `most`, `choices` of a `Key`; numbers are at least 0 by default.
    """
    number = isinstance(default, NUMBER) and not isinstance(default, bool)
    types = NUMBER if isinstance(default, float) else (type(default),)
    if number and "above" not in limits:
        limits.setdefault("least", 0)
    return field(default=default, metadata={"key": Key(doc, types, **limits)})


@dataclass(frozen=True)
class Settings:
    """The settings of a method, the block `hyperparameter` of a config.

    A subclass has a field, made by `setting`, for each; one with the name of a loss term is the
    weight of that term.
    """

    @classmethod
    def rules(cls) -> dict[str, Key]:
        """What each setting may hold."""
        return {each.name: each.metadata["key"] for each in fields(cls)}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Settings:
        """The values of a config over the defaults.

        Raises:
            UserError: an unknown setting, a wrong type or a value out of range.
        """
        rules = cls.rules()
        values = {}
        for name, value in given.items():
            key = rules[choose("a key of hyperparameter", name, rules)]
            if not key.accepts(value):
                raise UserError(
                    f"hyperparameter.{name} is {value!r}, but must be {key.expected()}."
                )
            values[name] = float(value) if key.types == NUMBER else value
        return cls(**values)


def saved_tensor(state: Mapping[str, Any], name: str, shape: Sequence[int | None]) -> torch.Tensor:
    """A tensor of what `BaseMethod.state` returned and a checkpoint gave back.

    Args:
        state: the method's state.
        name: of the tensor.
        shape: None where any size is right.

    Raises:
        UserError: it is missing or something else.
    """
    value: Any = state.get(name)
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    what = f"must be a tensor of real numbers [{sizes}]"
    if without_values(value) is not None or not value.is_floating_point():
        raise UserError(f"method_state.{name} of the checkpoint is {shown(value)}, but {what}.")
    fits = zip(value.shape, shape, strict=False)
    if value.dim() != len(shape) or any(there != size for there, size in fits if size is not None):
        raise UserError(
            f"method_state.{name} of the checkpoint is a tensor {list(value.shape)}, but {what}."
        )
    return value


@dataclass(frozen=True)
class StepContext:
    """What `begin_step` and `end_step` may use: models in eval mode, no gradients, no autocast.

    Attributes:
        student: the model itself.
        teacher: the previous step's, None unless the method needs it.
        batches: this rank's training batches of an epoch; the epochs of the step are 1 … E, so 0
            and E + 1 are nobody's. The same after a resume.
        epochs: E.
        total: sum of a tensor over all ranks; every rank must call it alike.
        previous_state: the previous step's weights by name, as they were loaded, on the CPU; None
            unless `needs_previous_state`. To average, measure or penalise weights use these: those
            of the teacher are rewritten (frozen BatchNorm is a part of its convolutions).
    """

    student: BaseModel
    teacher: BaseModel | None
    batches: Callable[[int], Iterator[Batch]]
    epochs: int
    total: Total
    previous_state: Mapping[str, torch.Tensor] | None = None


class BaseMethod(ABC):
    """One way to train a step.

    Attributes:
        Settings: its settings.
        family: what channel 0 of its networks is, a key of `FAMILIES`.
        learns_old: whether a loss term reads the labels of old classes.
        replay_confidence: score from which a background pixel of a replay candidate counts as the
            class that the previous model sees; None: the method has no replay.
        answers_from: names of the outputs that `predict` and `confident` read beside logits.
        label: what tables call it, such as LwF-MC; not inherited. A class without one is called by
            its name in `METHODS`.
        task: the step.
        settings: the config's values over the defaults.
    """

    Settings: ClassVar[type[Settings]] = Settings
    family: ClassVar[str]
    learns_old: ClassVar[bool]
    replay_confidence: ClassVar[float | None] = 0.9
    answers_from: ClassVar[frozenset[str]] = frozenset()
    label: ClassVar[str]

    def __init__(self, task: Task, given: Mapping[str, Any]):
        """
        Args:
            task: the step.
            given: the block `hyperparameter`.

        Raises:
            UserError: as `Settings.read`.
        """
        self.task = task
        self.settings: Any = self.Settings.read(given)

    @property
    def weights(self) -> dict[str, Any]:
        """Settings by name; those named as a loss term are its weight."""
        return asdict(self.settings)

    # --------------------------------------------------------------------- what the step is made of
    @property
    def needs_teacher(self) -> bool:
        """Whether the loop shall run the previous step's model beside the student."""
        return self.task.step > 0

    @property
    def needs_previous_state(self) -> bool:
        """Whether `begin_step` and `end_step` get the previous step's weights as they were loaded.

        They stay in memory then for the whole step.
        """
        return False

    @property
    def reads_saliency(self) -> bool:
        """Whether it reads `Batch.saliency`, so that every training image needs a map."""
        return False

    @property
    def dropout(self) -> bool:
        """Whether dropout is on in training."""
        return True

    @property
    def wants(self) -> frozenset[str]:
        """Names of the outputs that the method wants beside logits, out of `OUTPUTS`."""
        return frozenset()

    @abstractmethod
    def heads(self) -> HeadPlan:
        """Which heads the model has."""

    @abstractmethod
    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """Prepare the student: how a new head starts, what is not trained.

        Called with the previous step's weights loaded and nothing folded, before the optimizer is
        made and before a resumed checkpoint is loaded: what a loss compares weights with is cloned
        here, from the student.

        Args:
            earlier: what `state` returned at the end of the previous step; empty at step 0, and
                after a step that had none.
        """

    @abstractmethod
    def parameter_groups(
        self, student: BaseModel, lr: float, weight_decay: float
    ) -> list[dict[str, Any]]:
        """Optimizer groups `{"name", "params", "lr", "weight_decay"}`.

        Every trainable parameter is in exactly one; the caller asserts it.
        """

    # ------------------------------------------------------------------------------------- the step
    def begin_step(self, context: StepContext) -> None:
        """Before the first epoch of a fresh start; a resumed one calls `load_state` instead."""

    @abstractmethod
    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        """The loss terms of a batch.

        Args:
            batch: images and labels.
            student: outputs at feature resolution.
            teacher: the previous step's outputs without gradient; None unless `needs_teacher`.
            total: sum of a tensor over all ranks, without gradient; every rank must call it alike.

        Returns:
            Term name → per-class values; each name is a setting, its weight.
        """

    def end_step(self, context: StepContext) -> None:
        """After the last epoch, also one ended early, and before the final checkpoint."""

    # ----------------------------------------------------------------------------------- its answer
    @abstractmethod
    def predict(self, output: ModelOutput, size: tuple[int, int] | None = None) -> torch.Tensor:
        """Class of every pixel.

        Args:
            output: logits [N, 1 + C, h, w].
            size: H and W of the image, to which they are upsampled; h and w when None.

        Returns:
            preds [N, H, W] int64 channels, 0 = background.
        """

    @abstractmethod
    def confident(
        self, output: ModelOutput, size: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The likeliest class of every pixel, for pseudo-labels.

        Returns:
            channels [N, H, W] int64, never background, and their scores [N, H, W], 0 … 1.
        """

    # ------------------------------------------------------------------------------------ its state
    def state(self) -> dict[str, Any]:
        """What goes into every checkpoint and to the next step: finite tensors and plain values."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned, inside the same step; `saved_tensor` checks a tensor."""
