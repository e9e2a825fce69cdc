"""The plan of the house, held by reading its sources: who imports whom, how long files and lines are, what is
annotated."""

import ast
import collections
import unicodedata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "colora_ms"

#: From the ground up. A room imports from rooms below it, and from those beside it as long as no circle of rooms
#: arises. A name that is no folder is a file of the package: the base of the house, and what stands on the kernels.
FLOORS = (
    ("errors", "files", "versions", "extras", "pictures", "ascend_facts", "ascend_package", "ascend_settings", ""),
    ("kernels",),
    ("graph_cache", "runtime"),
    ("models",),
    ("adapters",),
    ("quantization", "decomposition", "distributed"),
    ("decoding",),
    ("serving", "training", "evaluation"),
    ("recipes",),
    ("cli", "__main__"),
    ("integrations",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
LONGEST_FILE, LONGEST_LINE = 400, 120


def source_files(folder):
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The room, or the file of the package, that a module belongs to; "" for the package itself."""
    return (module.split(".") + [""])[1]


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in source_files(PACKAGE)}


def running_nodes(node):
    """All nodes below one but those that only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield other
                yield from running_nodes(other)
            continue
        yield child
        yield from running_nodes(child)


def imports_of(module, tree):
    """Modules of the package that a module imports, inside functions, too."""
    found = set()
    for node in running_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "colora_ms"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            if (node.module or "").split(".")[0] == "colora_ms":
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {name if name in TREES else node.module for name in full}
    return found - {module}


IMPORTS = {module: imports_of(module, tree) for module, tree in TREES.items()}


def circles(graph):
    """The strongly connected components of more than one node (Tarjan's algorithm)."""
    number, low, stack, found = {}, {}, [], []

    def visit(node):
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in number:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], number[other])
        if low[node] == number[node]:
            members = []
            while not members or members[-1] != node:
                members.append(stack.pop())
            if len(members) > 1:
                found.append(sorted(members))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_the_finder_of_circles_finds_them():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_late_imports_count_and_those_of_type_checkers_do_not():
    tree = ast.parse("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from colora_ms.cli import options\n"
                     "def late():\n    from colora_ms.models import rope\n    import colora_ms.errors\n")
    assert imports_of("colora_ms.x", tree) == {"colora_ms.models.rope", "colora_ms.errors"}


def test_every_room_has_its_floor():
    assert {room_of(module) for module in TREES} - set(FLOOR_OF) == set()


def test_no_circle_of_modules():
    assert circles(IMPORTS) == []


def test_no_circle_of_rooms():
    rooms = collections.defaultdict(set)
    for module, others in IMPORTS.items():
        rooms[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    assert circles({room: rooms[room] for room in FLOOR_OF}) == []


def test_no_arrow_points_upwards():
    upwards = sorted(f"{module} imports {other}" for module, others in IMPORTS.items() for other in others
                     if FLOOR_OF[room_of(other)] > FLOOR_OF[room_of(module)])
    assert upwards == []


def test_nothing_imports_the_integrations():
    found = sorted(f"{module} imports {other}" for module, others in IMPORTS.items() for other in others
                   if room_of(other) == "integrations" != room_of(module))
    assert found == []


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_files_of_the_package_are_of_a_length_to_be_read(floor):
    long = {}
    for path in source_files(PACKAGE):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if FLOOR_OF[room_of(module_name(path))] == floor and lines > LONGEST_FILE:
            long[module_name(path)] = lines
    assert long == {}


def width(line):
    """Columns that a line takes; a wide character takes two."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in line)


@pytest.mark.parametrize("folder", ["colora_ms", "scripts", "tests", "ops"])
def test_lines_end_in_time(folder):
    long = [f"{path.relative_to(ROOT)}:{number}" for path in source_files(ROOT / folder)
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if width(line) > LONGEST_LINE]
    assert long == [], f"{len(long)} lines of more than {LONGEST_LINE} columns; the first: {long[:20]}"


def public_functions(tree):
    """The functions and methods that others may call: no underscore in their names, none of their classes' either."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public_functions(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) \
                and (not node.name.startswith("_") or node.name == "__call__"):
            yield node


def unannotated(tree):
    return [node.name for node in public_functions(tree) if node.returns is None]


def test_seven_of_ten_public_functions_say_what_they_return():
    counts = collections.defaultdict(lambda: [0, 0])
    for module, tree in TREES.items():
        for node in public_functions(tree):
            counts[room_of(module)][0] += node.returns is not None
            counts[room_of(module)][1] += 1
    done, total = (sum(column) for column in zip(*counts.values()))
    shares = {room: f"{good} of {all_}" for room, (good, all_) in sorted(counts.items()) if good < all_}
    assert done >= 0.7 * total, f"{done} of {total} are annotated; not all of {shares}"


def faces():
    """{name: its function} of what ``colora_ms.kernels`` exports."""
    exported = set()
    for node in TREES["colora_ms.kernels"].body:
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "__all__" for target in node.targets):
            exported |= set(ast.literal_eval(node.value))
    found = {}
    for module, tree in TREES.items():
        if room_of(module) == "kernels":
            found.update({node.name: node for node in tree.body
                          if isinstance(node, ast.FunctionDef) and node.name in exported})
    return found


def test_the_faces_of_the_kernels_are_annotated():
    found = faces()
    assert len(found) >= 8, "the faces are found by the names in colora_ms.kernels.__all__"
    bare = {}
    for name, node in found.items():
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        missing = [one.arg for one in arguments if one.annotation is None] + ["return"] * (node.returns is None)
        if missing:
            bare[name] = missing
    assert bare == {}


def test_the_layer_above_the_models_is_annotated():
    bare = {module: unannotated(tree) for module, tree in TREES.items()
            if room_of(module) in ("training", "evaluation", "recipes", "cli", "integrations", "runtime", "graph_cache",
                                   "errors", "files", "pictures", "versions", "ascend_facts", "ascend_package",
                                   "ascend_settings", "") and unannotated(tree)}
    assert bare == {}
