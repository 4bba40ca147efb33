"""The layering of the house: a lower layer never imports a higher one."""

import ast
import re

import pytest

from tests.helpers import PROJECT

# layer → what it may import of the project, besides itself
ALLOWED = {
    "utils": set(),
    "base": {"utils"},
    "data_loader": {"base", "utils"},
    "models": {"base", "utils"},
    "trainer": {"data_loader", "models", "base", "utils"},
}
FILES = [path for layer in ALLOWED for path in sorted((PROJECT / layer).rglob("*.py"))]


def imported(path):
    """Top-level packages that a file imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module.split(".")[0]


def name_of(path):
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    layer = path.relative_to(PROJECT).parts[0]
    ours = {*ALLOWED, "scripts", "tests", "train_voc", "train_ade", "eval_voc", "eval_ade"}
    breaches = set(imported(path)) & ours - ALLOWED[layer] - {layer}
    assert not breaches, f"{name_of(path)} imports {breaches}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_say_what_they_are(path):
    if path.read_text(encoding="utf-8").strip():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("layer", ["models", "trainer"])
def test_no_data_set_by_name(layer):
    for path in (PROJECT / layer).rglob("*.py"):
        assert not re.search(r"\b(voc|ade20k|ade)\b", path.read_text(encoding="utf-8"), re.I), path


def test_the_loop_knows_no_method():
    text = (PROJECT / "trainer" / "trainer.py").read_text(encoding="utf-8")
    assert not re.search(r"\b(dkd|finetune)\b", text, re.I)


@pytest.mark.parametrize("folder", ["scripts", "tests"])
def test_no_script_and_no_test_imports_another(folder):
    """What they share stands in modules of its own; pytest itself finds fixtures."""
    alone = "conftest|test_" if folder == "tests" else ""
    names = "|".join(
        path.stem for path in (PROJECT / folder).glob("*.py") if re.match(alone, path.stem)
    )
    pattern = rf"^\s*(?:from {folder}\.|import {folder}\.|from {folder} import .*)\b(?:{names})\b"
    for path in sorted((PROJECT / folder).rglob("*.py")):
        breaches = re.findall(pattern, path.read_text(encoding="utf-8"), re.M)
        assert not breaches, f"{name_of(path)}: {breaches}"
