"""PASCAL VOC 2012 and every data set in its layout: all that is known of it."""

from __future__ import annotations

from typing import ClassVar

from base.base_dataset import BaseDataset, Entry, read_list
from data_loader.task_tables import VOC_TASKS
from utils.misc import UserError

VOC_CLASSES = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
    *("chair", "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant"),
    *("sheep", "sofa", "train", "tvmonitor"),
)

_TAR = "VOCtrainval_11-May-2012.tar of the PASCAL VOC site"
_AUGMENTED = "SegmentationClassAug (the augmented masks, from the Semantic Boundaries Dataset)"


class VOC(BaseDataset):
    """`train_aug.txt` (image and mask path per line) and `val.txt` (bare ids).

    Reference quirk: the paths of `train_aug.txt` are relative to the root in spite of their leading
    slash. A line with a bare id, as other copies of that list have, means the usual two paths.
    """

    name = "voc"
    default_root = "/dataset/VOC2012"
    root_variable = "DKD_VOC_ROOT"
    tables = VOC_TASKS
    complete: ClassVar = {"train": 10582, "val": 1449}
    advice: ClassVar = {
        "root": "name the folder with --data_dir, data_loader.args.data_dir or DKD_VOC_ROOT; "
        f"it is VOCdevkit/VOC2012 of {_TAR}, with {_AUGMENTED} and train_aug.txt added",
        "names": "name the classes in data_loader.args.class_names, background first",
        "list train": "put it there: 10,582 lines '/JPEGImages/ID.jpg "
        f"/SegmentationClassAug/ID.png' or bare ids; copies come with {_AUGMENTED}",
        "list val": f"put it there: 1,449 bare ids; it is in {_TAR}",
        "line": "write '/JPEGImages/ID.jpg /SegmentationClassAug/ID.png' (paths from the root, "
        "without spaces) or a bare id",
        "image": f"extract JPEGImages/ from {_TAR}; for own images, correct the list",
        "mask train": f"put {_AUGMENTED} into the root; for own masks, correct the list",
        "mask val": f"extract SegmentationClass/ from {_TAR}; for own masks, add the file",
    }

    def read_class_names(self) -> tuple[str, ...]:
        return VOC_CLASSES

    def read_entries(self) -> list[Entry]:
        name = {"train": "train_aug.txt", "val": "val.txt"}[self.split]
        path, entries = self.root / "ImageSets" / "Segmentation" / name, []
        for number, line in enumerate(read_list(path), start=1):
            if line.split():
                try:
                    entries.append(self.parse(line, f"{path}, line {number}"))
                except UserError as fault:
                    self.tell(fault, "line")
        return entries

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
