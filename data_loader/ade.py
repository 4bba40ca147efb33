"""ADE20K (the 150-class scene parsing benchmark): all that is known of it."""

from __future__ import annotations

from typing import ClassVar

from base.base_dataset import BaseDataset, Entry, read_list
from data_loader.task_tables import ADE_TASKS
from utils.errors import UserError
from utils.labels import VOID

_ZIP = "ADEChallengeData2016.zip of the MIT scene parsing benchmark"


class ADE(BaseDataset):
    """All images of a folder, sorted by name; 0 = unlabelled, 1..150 = classes.

    Reference quirk: unlabelled is background like any other and is counted in evaluation.
    """

    name = "ade"
    default_root = "/dataset/ADEChallengeData2016"
    root_variable = "DKD_ADE_ROOT"
    tables = ADE_TASKS
    future = VOID
    unlabelled = True
    complete: ClassVar = {"train": 20210, "val": 2000}
    advice: ClassVar = {
        "root": "name the folder with --data_dir, data_loader.args.data_dir or DKD_ADE_ROOT; "
        f"it is what {_ZIP} unpacks to",
        "names": f"take the file from {_ZIP}: a heading and 150 rows of five columns separated "
        "by tabs",
        "list train": f"extract images/training/ (20,210 .jpg files) from {_ZIP}",
        "list val": f"extract images/validation/ (2,000 .jpg files) from {_ZIP}",
        "image": f"extract images/ from {_ZIP}",
        "mask": f"extract annotations/ from {_ZIP}",
    }

    def read_class_names(self) -> tuple[str, ...]:
        path = self.root / "objectInfo150.txt"
        rows = [line.split("\t") for line in read_list(path)[1:] if line.strip()]
        for number, row in enumerate(rows, start=1):
            if len(row) < 5 or row[0].strip() != str(number):
                raise UserError(
                    f"{path}, line {number + 1}: expected the class number {number} and four more "
                    "columns separated by tabs, the last being the name."
                )
        if len(rows) != 150:
            raise UserError(f"{path} has {len(rows)} classes instead of 150.")
        # The first of the synonyms is the name people use.
        return ("background", *(row[4].split(",")[0].strip() for row in rows))

    def read_entries(self) -> list[Entry]:
        part = {"train": "training", "val": "validation"}[self.split]
        folder = self.root / "images" / part
        masks = self.root / "annotations" / part
        return [
            Entry(path.stem, path.stem, path, masks / f"{path.stem}.png", f"{folder}, file {n}")
            for n, path in enumerate(self.list_images(folder), start=1)
        ]
