"""The data sets, by what `data_loader.type` of a config names. Their modules need no torch."""

from base.base_dataset import BaseDataset
from data_loader.ade import ADE
from data_loader.voc import VOC

DATA_SETS: dict[str, type[BaseDataset]] = {
    "VOCIncrementalDataLoader": VOC,
    "ADEIncrementalDataLoader": ADE,
}


def data_set(name: str) -> type[BaseDataset] | None:
    """The data set of a short name, where it is known."""
    return next((each for each in DATA_SETS.values() if each.name == name), None)
