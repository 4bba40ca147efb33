"""PASCAL VOC 2012 and every data set in its layout: file lists, root, class names."""

from __future__ import annotations

from pathlib import Path

from base.base_dataset import BaseDataset, Entry, read_list
from utils.misc import UserError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)


class VOC(BaseDataset):
    """`train_aug.txt` (image and mask path per line) and `val.txt` (bare ids).

    Reference quirk: the paths of `train_aug.txt` are relative to the root in spite of their leading
    slash. A line
    with a bare id, as other copies of that list have, means the usual two paths.
    """

    name = "voc"
    default_root = "/dataset/VOC2012"
    root_variable = "DKD_VOC_ROOT"

    def read_class_names(self) -> tuple[str, ...]:
        return VOC_CLASSES

    def list_file(self) -> Path:
        """The list of the split."""
        name = {"train": "train_aug.txt", "val": "val.txt"}[self.split]
        return self.root / "ImageSets" / "Segmentation" / name

    def read_entries(self) -> list[Entry]:
        path = self.list_file()
        lines = enumerate(read_list(path), start=1)
        return [self.parse(line, f"{path}, line {n}") for n, line in lines if line.split()]

    def parse(self, line: str, where: str) -> Entry:
        """The entry of one line.

        Raises:
            UserError: the line is malformed.
        """
        fields = line.split()
        bare = len(fields) == 1
        if bare and "/" not in fields[0]:
            masks = {"train": "SegmentationClassAug", "val": "SegmentationClass"}[self.split]
            fields = [f"JPEGImages/{fields[0]}.jpg", f"{masks}/{fields[0]}.png"]
        if len(fields) != 2:
            raise UserError(f"{where}: '{line}' is neither an id nor 'IMAGE_PATH MASK_PATH'.")
        image, mask = (self.root / field.lstrip("/") for field in fields)
        if not bare or self.split == "train":  # published lists of val have bare ids
            line = " ".join("/" + field.lstrip("/") for field in fields)
        return Entry(image.stem, line.strip(), image, mask, where)
