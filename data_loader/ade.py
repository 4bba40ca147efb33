"""ADE20K (the 150-class scene parsing benchmark): file lists, root, class names."""

from __future__ import annotations

from base.base_dataset import BaseDataset, Entry, read_list
from utils.misc import UserError


class ADE(BaseDataset):
    """All images of a folder, sorted by name; 0 = unlabelled, 1..150 = classes.

    Reference quirk: unlabelled is background like any other and is counted in evaluation.
    """

    name = "ade"
    default_root = "/dataset/ADEChallengeData2016"
    root_variable = "DKD_ADE_ROOT"

    def read_class_names(self) -> tuple[str, ...]:
        path = self.root / "objectInfo150.txt"
        rows = [line.split("\t") for line in read_list(path)[1:] if line.strip()]
        for number, row in enumerate(rows, start=1):
            if len(row) < 5 or row[0].strip() != str(number):
                raise UserError(
                    f"{path}, line {number + 1}: expected the class number {number} and four more "
                    "columns separated by tabs, the last being the name."
                )
        # The first of the synonyms is the name people use.
        return ("background", *(row[4].split(",")[0].strip() for row in rows))

    def read_entries(self) -> list[Entry]:
        part = {"train": "training", "val": "validation"}[self.split]
        folder = self.root / "images" / part
        masks = self.root / "annotations" / part
        if not folder.is_dir():
            raise UserError(f"the image folder {folder} does not exist.")
        images = sorted(path for path in folder.iterdir() if path.suffix.lower() == ".jpg")
        return [
            Entry(path.stem, path.stem, path, masks / f"{path.stem}.png", f"{folder}, file {n}")
            for n, path in enumerate(images, start=1)
        ]
