"""Which source files of the project a file needs, as its imports tell, and what they hold.

Files are parsed, never run, so an import by a computed name is not seen.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from utils.files import PROJECT_ROOT

PACKAGES = ("base", "data_loader", "models", "trainer", "utils")
# They import every data set and every method. A run needs the one that it names, so neither the
# entries of such a file nor what they import count for whoever imports the file.
REGISTRIES = ("data_loader/__init__.py", "trainer/methods/__init__.py")


def needed(files: Iterable[Path]) -> set[Path]:
    """The files, and those of `PACKAGES` that they import, also inside functions, and so on."""
    seen, left = {PROJECT_ROOT / name for name in REGISTRIES}, [*files]
    while left:
        file = left.pop()
        if file not in seen:
            seen.add(file)
            left += _imported(file)
    return seen - {PROJECT_ROOT / name for name in REGISTRIES}


def _imported(file: Path) -> Iterator[Path]:
    """The files of modules, and of the packages around them, that a file imports itself."""
    for node in ast.walk(ast.parse(file.read_bytes())):
        root, names = PROJECT_ROOT, []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            root = file.parents[node.level - 1] if node.level else PROJECT_ROOT
            names = [".".join(filter(None, (node.module, alias.name))) for alias in node.names]
        for parts in (name.split(".") for name in names):
            if root == PROJECT_ROOT and parts[0] not in PACKAGES:
                continue
            for end in range(1, len(parts) + 1):
                module = root.joinpath(*parts[:end])
                choices = (module.with_name(f"{module.name}.py"), module / "__init__.py")
                yield from filter(Path.is_file, choices)


def name_of(file: Path) -> str:
    """The file's path in the project; of another one its name."""
    inside = file.is_relative_to(PROJECT_ROOT)
    return file.relative_to(PROJECT_ROOT).as_posix() if inside else file.name


def source_hash(files: Iterable[Path]) -> str:
    """Short SHA-256 of names and contents, whichever line ends a clone has."""
    digest = hashlib.sha256()
    for name, file in sorted((name_of(file), file) for file in files):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(
            b"%s\0%d\0%s" % (name.encode("utf-8", "surrogateescape"), len(content), content)
        )
    return digest.hexdigest()[:12]
