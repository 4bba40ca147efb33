"""What only some settings need is tried before anything is trained: TensorBoard, a compiler."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

from utils.errors import UserError
from utils.parse_config import ConfigParser

SECONDS = 120  # for a compiler; a good one takes one
# Of what torch.compile writes, all that may be missing: the library, Python's headers.
PROGRAM = '#include <cmath>\n#include <Python.h>\nextern "C" int answer() { return 42; }\n'


def try_optional(config: ConfigParser) -> None:
    """Use once what the switches of the config need.

    Raises:
        UserError: it is missing, or does not work; with the reason.
    """
    if config["trainer"]["tensorboard"] and not config.call.test:
        _try_tensorboard()
    if config["fast"]["compile"] and sys.platform != "win32":
        _try_compiler()


def _try_tensorboard() -> None:
    try:
        from torch.utils.tensorboard import SummaryWriter

        with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
            writer.add_scalar("try", 0.0, 0)
            writer.add_text("try", "")
            writer.add_image("try", np.zeros((2, 2, 3), np.uint8), dataformats="HWC")
    except Exception as error:  # versions that do not fit each other fail in any way
        raise UserError(
            f"trainer.tensorboard is true, but TensorBoard does not work ({_first_line(error)}); "
            "install it anew (pip install --upgrade tensorboard protobuf), or set it to false."
        ) from None


def _try_compiler() -> None:
    """As torch.compile calls it: CXX, else the usual one."""
    usual = "clang++" if sys.platform == "darwin" else "g++"
    command = shlex.split(os.environ.get("CXX") or usual)
    if shutil.which(command[0]) is None:
        raise UserError(
            f"fast.compile needs a C++ compiler, but there is no {command[0]} here; install it, "
            "name another in the variable CXX, or set it to false."
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "try.cpp", Path(folder) / "try.so"
            source.write_text(PROGRAM, encoding="utf-8")
            headers = f"-I{sysconfig.get_path('include')}"
            subprocess.run(
                [*command, "-shared", "-fPIC", headers, str(source), "-o", str(library)],
                capture_output=True,
                check=True,
                timeout=SECONDS,
            )
            ctypes.CDLL(str(library))  # a folder may allow no programs
    except (subprocess.SubprocessError, OSError) as error:
        said = getattr(error, "stderr", None) or b""
        lines = said.decode(errors="replace").splitlines()
        why = next((line for line in lines if "error" in line), None) or _first_line(error)
        raise UserError(
            f"fast.compile needs a C++ compiler that works, with Python's headers (python3-dev), "
            f"but {shlex.join(command)} fails: {why.strip()}; mend it, name another in the "
            "variable CXX, or set it to false."
        ) from None


def _first_line(error: Exception) -> str:
    text = (str(error).strip() or "without a reason").splitlines()[0].rstrip(".")
    return f"{type(error).__name__}: {text}"
