"""Clones as people have them: below a folder with a space, and as Git for Windows makes them."""

import os
import shutil
import subprocess

import pytest

from tests.helpers import PROJECT

SETTINGS = sorted((PROJECT / "scripts").glob("*/*/train_*.sh"))
# Notes its own path and arguments. As `python -m venv` it makes an environment of itself, whose pip
# is there unless WITHOUT_PIP is set.
PYTHON = """\
#!/usr/bin/env bash
printf '%s|' "$0" "$@" >>"$CALLS"
echo >>"$CALLS"
case "$*" in
"-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip --version") [ -z "${WITHOUT_PIP:-}" ] ;;
*.py*) [ -f "$1" ] ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A copy of what the scripts need, below a folder with a space and a letter beyond ASCII."""
    folder = tmp_path / "my prøject" / "clone"
    (folder / "tests").mkdir(parents=True)
    shutil.copytree(PROJECT / "scripts", folder / "scripts")
    for name in ("train_voc.py", "train_ade.py", "eval_voc.py", "requirements.txt"):
        shutil.copy(PROJECT / name, folder / name)
    shutil.copy(PROJECT / "tests/requirements.txt", folder / "tests")
    return folder


@pytest.fixture
def run(clone, tmp_path):
    """Run a script of the clone with a stand-in for Python; the calls that it made."""
    tools = tmp_path / "my töols"
    tools.mkdir()
    for name in ("python", "python3"):
        (tools / name).write_text(PYTHON, encoding="utf-8")
        (tools / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(script, *arguments, **variables):
        environment = {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "CALLS": str(calls),
            **{key: text.format(tools=tools) for key, text in variables.items()},
        }
        done = subprocess.run(
            ["bash", str(clone / script), *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert not done.stderr
        return [line.split("|")[:-1] for line in calls.read_text().splitlines()]

    return run


@pytest.mark.parametrize("without_pip", ["", "1"], ids=["pip", "no pip in it"])
@pytest.mark.parametrize("script", ["scripts/demo.sh", "scripts/test.sh"])
def test_set_up_below_a_folder_with_a_space(script, without_pip, run, clone, tmp_path):
    calls = run(script, WITHOUT_PIP=without_pip)
    python = str(clone / ".venv/bin/python")
    pip = [python, "-m", "pip"]
    if without_pip:
        pip = [str(tmp_path / "my töols/python3"), "-m", "pip", "--python", python]
    files = ["requirements.txt"]
    if script == "scripts/test.sh":
        files.append("tests/requirements.txt")
    installed = [call for call in calls if "install" in call]
    assert [call[: len(pip)] for call in installed] == [pip] * len(files)
    assert [call[-1] for call in installed] == files
    assert calls[-1][0] == python
    for file in files:
        stamp = clone / ".venv" / f"installed-{file.replace('/', '-')}"
        assert stamp.read_text() == (clone / file).read_text()


@pytest.mark.parametrize(
    "script",
    [
        *("scripts/demo.sh", "scripts/test.sh", "scripts/compare_methods.sh"),
        *(str(path.relative_to(PROJECT)) for path in SETTINGS),
    ],
)
def test_scripts_below_a_folder_with_a_space(script, run, clone):
    """An interpreter of one's own, arguments and variables with spaces arrive whole."""
    variables = {"OUT": "my out", "SAVE_DIR": "my runs", "DATA_DIR": "my data", "NAME": "my name"}
    arguments = () if script.endswith("demo.sh") else ("--name", "two words")
    calls = run(script, *arguments, PYTHON="{tools}/python", **variables)
    assert calls
    for interpreter, first, *rest in calls:
        assert interpreter.endswith("/my töols/python")
        assert first == "-m" or (clone / first).is_file()
        assert not {"my", "two"} & set(rest)
    if arguments:
        assert any(call[-2:] == list(arguments) for call in calls)


def test_a_clone_of_git_for_windows(tmp_path):
    """With core.autocrlf scripts keep their line ends, and binary files their bytes."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    origin.mkdir()
    for name in ("scripts", ".ci", "configs", "tests/data"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, origin / name, ignore=ignored)
    shutil.copy(PROJECT / ".gitattributes", origin)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for command in (
        ["-C", str(origin), "init", "-q"],
        ["-C", str(origin), "add", "-A"],
        ["-C", str(origin), "commit", "-q", "-m", "all"],
        ["clone", "-q", "-c", "core.autocrlf=true", str(origin), str(clone)],
    ):
        subprocess.run([*git, *command], env=environment, check=True, timeout=60)
    files = [path for path in clone.rglob("*") if path.is_file() and ".git" not in path.parts]
    assert {path.suffix for path in files} >= {".sh", ".py", ".json", ".npz", ".png"}
    for path in files:
        assert path.read_bytes() == (PROJECT / path.relative_to(clone)).read_bytes(), path
