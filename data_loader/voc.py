"""PASCAL VOC 2012 and every data set in its layout: all that is known of it."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from base.base_dataset import BaseDataset, Entry, read_list
from base.image_files import ENDINGS
from data_loader.task_tables import VOC_TASKS
from utils.errors import UserError

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
    Quotes, backslashes, `ID.jpg` and absolute paths below the root are taken as they are meant.
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
        fields = [self._plain(field, where) for field in line.split()]
        bare = len(fields) == 1
        if bare and "/" not in fields[0]:
            name = line = self._id(fields[0], where)
            masks = {"train": "SegmentationClassAug", "val": "SegmentationClass"}[self.split]
            fields = [f"JPEGImages/{name}.jpg", f"{masks}/{name}.png"]
        if len(fields) != 2:
            raise UserError(f"{where}: '{line}' is neither an id nor 'IMAGE_PATH MASK_PATH'.")
        if not any("/" in f or os.path.exists(self.root / f) for f in fields):
            raise UserError(
                f"{where}: '{line}' is neither an id, which has no blanks, nor 'IMAGE_PATH "
                f"MASK_PATH': paths begin at {self.root}, such as /JPEGImages/ID.jpg."
            )
        image, mask = (self.root / field.lstrip("/") for field in fields)
        if not bare or self.split == "train":  # published lists of val have bare ids
            line = " ".join("/" + field.lstrip("/") for field in fields)
        return Entry(image.stem, line, image, mask, where)

    def _plain(self, field: str, where: str) -> str:
        """A field without quotes and backslashes, from the root on, unless a file is called so.

        Raises:
            UserError: it is the path of a file outside of the root.
        """
        if field[0] in "'\"" or "\\" in field:
            if os.path.exists(self.root / field) or os.path.exists(self._image(field)):
                return field
            field = field.strip("'\"").replace("\\", "/") or field
        top = field.split("/")[1] if field.startswith("/") else ""
        if not top or top in self._tops:
            return field
        for root in (self.root.absolute(), self.root.resolve()):
            if Path(field).is_relative_to(root):
                return f"/{Path(field).relative_to(root)}"
        if os.path.exists(field):
            raise UserError(
                f"{where}: {field} lies outside of the data set's folder {self.root}, from which "
                "the paths of a list begin; put it there, or name its folder as the root."
            )
        return field

    @cached_property
    def _tops(self) -> frozenset[str]:
        """What lies in the root, with which the paths of a list begin."""
        try:
            return frozenset(os.listdir(self.root))
        except OSError:  # it may be entered only
            return frozenset()

    def _image(self, name: str) -> Path:
        return self.root / "JPEGImages" / f"{name}.jpg"

    def _id(self, name: str, where: str) -> str:
        """The id that a line without a path names; with the ending of its image as well.

        Raises:
            UserError: the ending of another file.
        """
        stem, ending = os.path.splitext(name)
        if ending.lower() not in ENDINGS or os.path.exists(self._image(name)):
            return name
        if ending == ".jpg":
            return stem
        raise UserError(
            f"{where}: '{name}' has an ending, but an id has none: '{stem}' stands for "
            f"JPEGImages/{stem}.jpg; write that, or 'IMAGE_PATH MASK_PATH' from the root on."
        )
