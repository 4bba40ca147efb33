"""Which source files count for a run: what it needs, and no file that merely lies there."""

import json

import pytest

from tests.helpers import PROJECT
from trainer.methods import METHODS, display_name, in_order
from trainer.provenance import remarks
from utils import sources
from utils.sources import name_of, needed, source_hash

RUN = "trainer/run.py"
FILES = {
    RUN: "import trainer.loop\nfrom trainer.methods import A\nfrom utils import (\n    misc,\n)\n",
    "trainer/__init__.py": "",
    "trainer/loop.py": "def train():\n    from models.net import Net\n",
    "trainer/methods/__init__.py": "from trainer.methods.b import B\n",
    "trainer/methods/a.py": "from . import common\nfrom ..loop import train\n",
    "trainer/methods/b.py": "from trainer.methods.a import A\n",
    "trainer/methods/common.py": "import torch\n",
    "models/net.py": "import numpy.random\n",
    "models/spare.py": "1 +\n",
    "utils/misc.py": "# a circle\nimport trainer.run\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(sources, "PROJECT_ROOT", tmp_path)
    return tmp_path


def test_a_run_needs_what_it_imports_and_no_method_but_its_own(project):
    common = {RUN, "trainer/__init__.py", "trainer/loop.py", "models/net.py", "utils/misc.py"}
    assert {*map(name_of, needed([project / RUN]))} == common
    own = {"trainer/methods/a.py", "trainer/methods/common.py"}
    files = needed([project / "trainer/methods/b.py"]) - needed([project / RUN])
    assert {*map(name_of, files)} == own | {"trainer/methods/b.py"}


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("models/net.py", True),
        ("utils/misc.py", True),
        ("models/spare.py", False),
        ("trainer/methods/a.py", False),
        ("trainer/methods/__init__.py", False),
        ("data_loader/new.py", False),
    ],
)
def test_a_changed_or_added_file_counts_when_it_is_needed(project, name, counts):
    before = source_hash(needed([project / RUN]))
    (project / name).parent.mkdir(exist_ok=True)
    (project / name).write_text("changed = True\n")
    assert (source_hash(needed([project / RUN])) != before) is counts


def test_line_ends_of_a_clone_do_not_count(project):
    before = source_hash(needed([project / RUN]))
    for path in project.rglob("*.py"):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert source_hash(needed([project / RUN])) == before


def test_methods_share_the_files_that_both_import():
    def own(name):
        common = needed([PROJECT / RUN])
        return {*map(name_of, needed([PROJECT / f"trainer/methods/{name}.py"]) - common)}

    assert not [name for name in map(name_of, needed([PROJECT / RUN])) if "methods/" in name]
    assert "trainer/methods/mib.py" in own("sdr") - own("dkd")
    assert "models/fast/losses.py" in own("sdr") & own("dkd")


def test_records_of_other_own_files_are_told():
    here = {"code": "a", "torch": "1", "own_code": {"trainer/methods/dkd.py": "b", "x.py": "c"}}
    there = here | {"own_code": {"trainer/methods/dkd.py": "d", "y.py": "e"}}
    assert remarks(here, there) == ["trainer/methods/dkd.py (hash): b here, d there"]
    older = {key: here[key] for key in ("code", "torch")}
    assert remarks(here, older) == remarks(json.loads(json.dumps(here)), here) == []


def test_names_and_order_come_from_the_classes(monkeypatch):
    class Mine(METHODS["mib"]):
        pass

    monkeypatch.setitem(METHODS, "mine", Mine)
    assert display_name("mine") == "mine", "a label is not inherited"
    Mine.label = "Mine"
    assert display_name("mine", memory=True) == "Mine-M"
    assert display_name("of a later version") == "of a later version"
    order = in_order(["of a later version", "dkd", "mine", "mib", "ft"])
    assert order == ["ft", "mib", "mine", "dkd", "of a later version"]
