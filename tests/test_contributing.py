"""The contributors' page names what is there."""

import ast
import re

import pytest

from tests.helpers import PROJECT

PAGE = (PROJECT / "docs/contributing.md").read_text(encoding="utf-8")
WALKS = re.findall(r"^\d\. `([\w/]+\.py): (.+?): ", PAGE, re.MULTILINE)


def test_there_are_three_walks_of_five_places():
    assert len(WALKS) == 15


@pytest.mark.parametrize(("file", "names"), WALKS)
def test_a_place_of_a_walk_is_there(file, names):
    tree = ast.parse((PROJECT / file).read_text(encoding="utf-8"))
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {name.strip("`, ") for name in names.split(",")} <= defined


def test_the_files_of_the_rooms_are_there():
    rooms = PAGE.split("## The rooms")[1].split("## Three walks")[0]
    for row in re.findall(r"^\| (`.+?`) \|", rooms, re.MULTILINE):
        paths = re.findall(r"`([\w/.]+)`", row)
        folder = paths[0].rpartition("/")[0]
        for path in paths:
            assert (PROJECT / path).exists() or (PROJECT / folder / path).exists(), path
