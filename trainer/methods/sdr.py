"""SDR: Continual Semantic Segmentation via Repulsion-Attraction of Sparse and Disentangled Latent
Representations (CVPR 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from base.base_method import Terms, Total, saved_tensor, setting
from base.base_model import BaseModel, ModelOutput
from base.batch import Batch
from models.pixels import exact_products, full_precision, highest_logit, size_of
from trainer.methods.mib import MiB
from utils.errors import UserError
from utils.labels import BACKGROUND

TINY = 1e-15


class SDR(MiB):
    """MiB's losses, and the backbone's features shaped by one prototype per class.

    A prototype is the mean feature of all pixels of its class over the iterations of the step in
    which it is new; from then on it stays. It is part of every checkpoint and is handed on. A new
    head starts at random.
    """

    label = "SDR"
    wants = frozenset({"backbone_features"})

    @dataclass(frozen=True)
    class Settings(MiB.Settings):
        """Weights of the terms."""

        kd: float = setting(100.0, "weight of L_kd, with new classes and background as one")
        match: float = setting(0.01, "weight of L_pm: old classes near their prototypes")
        attract: float = setting(0.001, "weight of L_att: pixels near their class's prototype")
        repulse: float = setting(0.001, "weight of L_rep: mean features of classes far apart")
        sparse: float = setting(0.001, "weight of L_sp: few active channels per pixel")
        official: bool = setting(
            False,
            "as the authors' code has it: void pixels are trained as background, features are "
            "gathered across channels, L_att is divided once per class, every process has its own "
            "prototypes",
        )

    def __init__(self, task: Any, given: Mapping[str, Any]):
        super().__init__(task, given)
        self.channels = 1 + len(task.seen)
        # From the first batch on [channels, features] and [channels].
        self.prototypes = torch.zeros(self.channels, 0)
        self.counts = torch.zeros(self.channels, dtype=torch.float64)

    def start(self, student: BaseModel, earlier: Mapping[str, Any]) -> None:
        """Take over the prototypes of the old classes.

        Raises:
            UserError: the previous step's method keeps none, or they are damaged.
        """
        if self.task.step == 0:
            return
        if "prototypes" not in earlier:
            raise UserError(
                f"'sdr' continues from prototypes, but step {self.task.step - 1} was trained by a "
                "method that keeps none; train step 0 with --method sdr and another --name."
            )
        new = len(self.task.new)
        prototypes, counts = saved_prototypes(earlier, self.channels - new)
        if prototypes.shape[1] == 0:
            raise UserError("method_state.prototypes of the step before is empty; train it anew.")
        self.prototypes = F.pad(prototypes, (0, 0, 0, new))
        self.counts = F.pad(counts, (0, new))

    def losses(
        self, batch: Batch, student: ModelOutput, teacher: ModelOutput | None, total: Total
    ) -> Terms:
        terms = super().losses(batch, student, teacher, total)
        labels = self.labels(batch)
        body = full_precision(student.require("backbone_features"))
        small = nearest(labels, size_of(body))
        groups = ClassFeatures(body, small, self, "features first", total)
        self.update(groups)
        if teacher is None:
            return terms
        seen = highest_logit(teacher.logits, size_of(labels))[1]
        seen = torch.where(small == BACKGROUND, nearest(seen, size_of(body)), BACKGROUND)
        return terms | {
            "match": match(ClassFeatures(body, seen, self, "pixels first", total), self.prototypes),
            "attract": attract(groups, self.prototypes, self.settings.official),
            "repulse": repulse(groups),
            "sparse": sparse(body, small, self.channels),
        }

    @torch.no_grad()
    def update(self, groups: ClassFeatures) -> None:
        """Move each prototype to the mean of all features of its class up to now."""
        finite = groups.sums.isfinite().all(1)  # float16 may overflow; the update is skipped then
        sums = groups.sums.detach().masked_fill(~finite[:, None], 0)
        counts = groups.counts.double() * finite
        if self.prototypes.shape[1] == 0:
            self.prototypes = torch.zeros_like(sums)
        if self.prototypes.shape != sums.shape:
            raise UserError(
                f"method_state.prototypes of the checkpoint has {self.prototypes.shape[1]} "
                f"features for each class, but the network has {sums.shape[1]}."
            )
        if self.task.setting == "overlap" or self.task.step > 0:
            counts[BACKGROUND] = 0
        known = self.counts.to(counts)
        self.counts = known + counts
        share = (counts / self.counts.clamp(min=1)).to(sums)[:, None]
        means = sums / groups.counts.clamp(min=1)[:, None]
        self.prototypes = torch.lerp(self.prototypes.to(sums), means, share)

    def state(self) -> dict[str, Any]:
        return {"prototypes": self.prototypes.cpu(), "counts": self.counts.cpu()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.prototypes, self.counts = saved_prototypes(state, self.channels)
        if self.prototypes.shape[1] == 0 and self.counts.any():
            raise UserError("method_state.prototypes of the checkpoint is empty, but not counts.")


def saved_prototypes(state: Mapping[str, Any], channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prototypes [channels, features] and pixel counts [channels] of a checkpoint.

    Raises:
        UserError: they are missing or something else.
    """
    return (
        saved_tensor(state, "prototypes", (channels, None)),
        saved_tensor(state, "counts", (channels,)),
    )


def nearest(labels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Labels [N, H, W] at feature resolution: [N, h, w] int64."""
    return F.interpolate(labels[:, None].double(), size, mode="nearest")[:, 0].long()


class ClassFeatures:
    """The features of a batch by class, over all ranks.

    Attributes:
        pixels: [P, D], the features of every pixel.
        of: [P] int64, its class; as many as there are classes where it has none (void).
        sums: [K, D] over the pixels of each class; this rank's have a gradient.
        counts: [K] of its pixels.
        world: how many ranks.
    """

    def __init__(
        self, body: torch.Tensor, labels: torch.Tensor, method: SDR, order: str, total: Total
    ):
        """
        Args:
            backbone_features: [N, D, h, w].
            labels: [N, h, w] int64.
            method: says how many classes, and whether to do as the authors' code does.
            order: how that code reads the values of a class, "features first" or "pixels first".
            total: sum over ranks.
        """
        channels = method.channels
        if method.settings.official:
            body = scrambled(body, labels, order)
        self.pixels = body.permute(0, 2, 3, 1).flatten(0, 2)
        self.of = labels.flatten().clamp(max=channels)
        members = F.one_hot(self.of, channels + 1)[:, :channels].to(self.pixels)
        with exact_products():
            self.sums = members.t() @ self.pixels
        counts = members.sum(0)
        own = torch.cat([self.sums.detach(), counts[:, None]], 1)
        summed, self.world = own, own.new_ones(())
        if not method.settings.official:
            summed, self.world = total(own), total(self.world)
        self.sums = self.sums + (summed - own)[:, :-1]
        self.counts = summed[:, -1]

    @property
    def means(self) -> torch.Tensor:
        """[K, D]: mean features; 0 of a class without a pixel."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def term(self, value: torch.Tensor) -> torch.Tensor:
        """[1]: a value that every rank computes alike, with the gradient of which each has a part.

        Gradients are averaged over ranks, so each must be as many times larger.
        """
        return torch.lerp(value.detach(), value, self.world)[None]


def scrambled(body: torch.Tensor, labels: torch.Tensor, order: str) -> torch.Tensor:
    """Reference quirk: the features as the authors' code gathers them, which mixes their channels.

    The values of a class, taken image by image and channel by channel, are read as if its pixels
    came after the features ("features first", right for one image alone) or before ("pixels
    first").
    """
    mixed = body.clone()
    for label in labels.unique().tolist():
        inside = labels == label  # [N, h, w]
        values = body[inside[:, None].expand_as(body)]
        count = int(inside.sum())
        rows = values.view(-1, count).t() if order == "features first" else values.view(count, -1)
        mixed = (
            mixed.permute(0, 2, 3, 1).masked_scatter(inside[..., None], rows).permute(0, 3, 1, 2)
        )
    return mixed


def match(groups: ClassFeatures, prototypes: torch.Tensor) -> torch.Tensor:
    """L_pm: squared distance of an old class's mean feature from its prototype, averaged. [1]."""
    present = groups.counts > 0
    present[BACKGROUND] = False
    distance = (groups.means - prototypes).square().mean(1)
    return groups.term(torch.where(present, distance, 0).sum() / present.sum().clamp(min=1))


def attract(groups: ClassFeatures, prototypes: torch.Tensor, official: bool) -> torch.Tensor:
    """L_att: squared distance of each pixel's feature from its class's prototype, averaged. [1].

    Per class, then over the classes that are there, background (whose prototype may be 0) included.
    Reference quirk ("official"): the sum is divided by their number once per class, so that those
    with a small id count next to nothing.
    """
    present = groups.counts > 0
    number = present.sum()
    power = number + 1 - present.cumsum(0) if official else 1
    weight = present / number.clamp(min=1).double() ** power / groups.counts.clamp(min=1)
    weight = weight.to(groups.pixels)
    weight, prototypes = F.pad(weight, (0, 1)), F.pad(prototypes, (0, 0, 0, 1))  # void: none
    distance = (groups.pixels - prototypes[groups.of]).square().mean(1)
    return groups.world * (weight[groups.of] * distance).sum()[None]


def repulse(groups: ClassFeatures) -> torch.Tensor:
    """L_rep: mean over ordered pairs of classes of 1 / ‖distance of their mean features‖. [1]."""
    present = groups.counts > 0
    pairs = (present[:, None] & present).fill_diagonal_(False)
    means = groups.means
    distance = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist")
    pairs &= distance > 0  # as in the authors' code
    inverse = distance.masked_fill(~pairs, 1).reciprocal() * pairs
    return groups.term(inverse.sum() / pairs.sum().clamp(min=1))


def sparse(body: torch.Tensor, labels: torch.Tensor, channels: int) -> torch.Tensor:
    """L_sp: Σ exp(f) / Σ f over the features f of a pixel, relative to the largest of its class.

    Void counts as a class; of a batch with background alone the loss is 0. The largest is that of
    the images of this process.

    Returns:
        [1].
    """
    pixels = body.permute(0, 2, 3, 1).flatten(0, 2)  # [P, D]
    of = labels.flatten().clamp(max=channels)
    largest = pixels.new_zeros(channels + 1)
    largest = largest.scatter_reduce(0, of, pixels.amax(1), "amax", include_self=False)
    relative = pixels / (largest[of] + TINY)[:, None]
    loss = (relative.exp().sum(1) / (relative.sum(1) + TINY)).mean()
    return (loss * (of != BACKGROUND).any())[None]
