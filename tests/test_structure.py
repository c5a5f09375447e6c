"""Tests the structure of the repository: allowed imports between packages, no import cycles, and size limits."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GROUND = {
    "chat", "checks", "files", "images", "journal", "media_limits", "processors", "provenance", "report", "videos",
}  # fmt: skip
#: For each room (a folder of mpo_ext) the rooms that it may import, besides the ground stones.
ALLOWED = {
    "answers": set(),
    "data": set(),
    "ops": {"kernels"},
    "loss": {"ops"},
    "generate": {"answers", "data"},
    "train": {"answers", "data", "evaluate", "generate", "loss", "ops"},
    "integrations": {"loss", "train"},
    "plan": {"data", "loss", "ops", "train"},
    "evaluate": {"answers", "data", "generate", "loss"},
    "demo": {"answers", "data", "evaluate", "generate", "loss", "train"},
    "convert": set(),
    "iterate": {"answers", "evaluate", "generate", "train"},
    "cli": {"answers", "convert", "data", "demo", "evaluate", "generate", "iterate", "loss", "ops", "plan", "train"},
    "kernels": set(),
    **{name: set() for name in GROUND},
}
#: Files that start a command (``python -m``), and the package's face, which imports public names when they are used.
ENTRY_POINTS = {
    "mpo_ext/__main__.py": {"cli"},
    "mpo_ext/train/__main__.py": {"cli"},
    "mpo_ext/__init__.py": {"integrations", "loss"},
}
MAX_FILE, MAX_CLASS, MAX_FUNCTION, MAX_PARAMETERS = 500, 300, 80, 12
MAX_LINES = {"mpo_ext/train/loop.py": 400}
#: Functions whose length or number of parameters is that of their contract.
PUBLIC_LOSS = {"check_batch", "mpo_loss", "linear_mpo_loss", "token_logp", "linear_token_logp"}


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[:2] == ("kernels", "mpo_triton"):
        relative = Path("mpo_ext", "kernels", *relative.parts[2:])
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """Yields the modules of mpo_ext and benchmarks that a file imports, also inside functions or by importlib."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = module_name(path) if path.stem == "__init__" else module_name(path).rpartition(".")[0]
            source = f"{package}.{node.module or ''}".rstrip(".") if node.level else str(node.module)
            names = [f"{source}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("mpo_ext."):
            names = [node.value] if node.value.replace(".", "").isidentifier() else []  # for importlib
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("mpo_ext", "benchmarks"))


MODULES = {module_name(path): path for path in python_files("mpo_ext", "kernels", "benchmarks")}


def imported_modules(path: Path) -> set[str]:
    found = set()
    for name in imports(path):
        while name not in MODULES and "." in name:
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "mpo_ext" and len(parts) > 1 else ""


@pytest.mark.parametrize("module", sorted(name for name in MODULES if name.startswith("mpo_ext")))
def test_a_room_imports_only_the_rooms_below_it(module: str) -> None:
    path = MODULES[module]
    name = path.relative_to(ROOT).as_posix()
    allowed = ENTRY_POINTS.get(name) or ALLOWED[room(module)] | GROUND | {room(module)}
    for imported in imported_modules(path) - {"mpo_ext"}:
        assert imported.split(".")[0] == "mpo_ext", f"{name} must not import {imported}: the package stands alone"
        assert room(imported) in allowed, f"{name} must not import {imported}"


def test_only_one_module_imports_the_compiled_one() -> None:
    users = {path.name for path in MODULES.values() if "mpo_ext._C" in set(imports(path))}
    assert users == {"native.py"}


def test_no_rooms_may_import_each_other_in_a_circle() -> None:
    for room in ALLOWED:
        seen: set[str] = set()
        below = {room}
        while below:
            below = set().union(*(ALLOWED[one] for one in below)) - seen
            seen |= below
        assert room not in seen, f"{room} may import itself through other rooms"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name: imported_modules(path) - {name, "mpo_ext"} for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle of imports: {' -> '.join([*trail[trail.index(name) :], name])}"
        if name not in done:
            for imported in sorted(graph.get(name, ())):
                visit(imported, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("path", python_files("mpo_ext", "benchmarks", "kernels"), ids=lambda path: module_name(path))
def test_files_classes_and_functions_are_short(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES.get(name, MAX_FILE), f"{name} has {lines} lines"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_CLASS, f"{name}: class {node.name} is too long"
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name not in PUBLIC_LOSS:
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{name}: {node.name} has {length} lines"
            parameters = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            is_schema = any("custom_op" in ast.unparse(decorator) for decorator in node.decorator_list)
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not is_schema and not is_kernel:
                assert parameters <= MAX_PARAMETERS, f"{name}: {node.name} has {parameters} parameters"


@pytest.mark.parametrize("path", sorted((ROOT / "csrc").rglob("*.*")), ids=lambda path: path.name)
def test_native_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE


def test_a_class_name_names_one_class() -> None:
    homes: dict[str, str] = {}
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                assert node.name not in homes, f"class {node.name} is in {homes[node.name]} and in {module}"
                homes[node.name] = module
