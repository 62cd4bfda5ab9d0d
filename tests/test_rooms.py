"""One technique, one room: who may import what."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import lightning_compress

PACKAGE = Path(lightning_compress.__file__).parent
CALLBACKS = {"callback.py", "learning_rate.py", "regularization.py", "guard.py"}
SHARED = {"__init__.py", "training.py"}  # the public names; what a callback may ask of a Trainer


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def is_callback(path: Path) -> bool:
    return path.name in CALLBACKS or path.relative_to(PACKAGE).as_posix() == "distillation/module.py"


def test_only_callbacks_import_lightning() -> None:
    for path in PACKAGE.rglob("*.py"):
        if not is_callback(path) and path.name not in SHARED:
            assert not [name for name in imports(path) if name.split(".")[0] in ("lightning", "pytorch_lightning")], (
                path
            )


def test_callbacks_do_not_import_each_other() -> None:
    rooms = {
        "lightning_compress." + path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
        for path in PACKAGE.rglob("*.py")
        if is_callback(path)
    }
    assert len(rooms) >= 4
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            strangers = [other for other, file in rooms.items() if file.parent != path.parent or path.parent == PACKAGE]
            assert not [name for name in imports(path) for other in strangers if name.startswith(other)], path


def test_nothing_uses_what_torch_is_about_to_delete() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not [name for name in imports(path) if name.startswith(("torch.ao", "torch.quantization"))], path
