"""The public names of colora_ms, read from its sources without importing them; for ``make_api_reference.py``."""

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Packages and modules with a section of their own. The public names are ``__all__``; without one they are those of the
#: modules that the package's docstring lists, or, in a module, all that have no leading underscore.
SECTIONS = (
    "colora_ms", "colora_ms.decoding", "colora_ms.adapters", "colora_ms.decomposition", "colora_ms.quantization",
    "colora_ms.distributed", "colora_ms.models", "colora_ms.kernels",
    "colora_ms.training", "colora_ms.training.split", "colora_ms.evaluation", "colora_ms.serving",
    "colora_ms.serving.http", "colora_ms.integrations.mindformers", "colora_ms.errors",
)

#: Methods that MindSpore defines for all Cells: a Cell's class docstring may say what they do.
CELL_METHODS = ("construct", "extend_repr")

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module:
    """One source file: its tree, and where the names in it come from."""

    def __init__(self, name):
        self.name = name
        base = ROOT / Path(*name.split("."))
        self.path = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
        self.is_package = base.is_dir()
        self.text = self.path.read_text(encoding="utf-8")
        self.lines = self.text.splitlines()
        self.tree = ast.parse(self.text)
        self.doc = ast.get_docstring(self.tree) or ""
        self.defined, self.imported, self.constants = {}, {}, {}
        for node in self.tree.body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                self.defined[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                self.constants[node.targets[0].id] = node
            elif isinstance(node, ast.ImportFrom):
                self.imported.update({one.asname or one.name: (node.module, one.name) for one in node.names})
        self.late = {key: value if value.startswith("colora_ms") else f"{name}.{value}"
                     for key, value in (self._literal("_EXPORTS") or {}).items()}

    def _literal(self, name):
        node = self.constants.get(name)
        return ast.literal_eval(node.value) if node is not None else None

    def public(self):
        """Names of ``__all__`` (a list, or ``sorted(_EXPORTS)``), or None."""
        node = self.constants.get("__all__")
        if node is None:
            return None
        return sorted(self.late if isinstance(node.value, ast.Call) else ast.literal_eval(node.value), key=str.lower)

    def listed(self):
        """Full names of the modules that the docstring lists in an indented table."""
        found = re.findall(r"^    (\w+)  +\w", self.doc, re.M)
        return [f"{self.name}.{one}" for one in found if (self.path.parent / f"{one}.py").is_file()]

    def source(self, node):
        """The text of an expression, as it is written."""
        return re.sub(r"\s+", " ", ast.get_source_segment(self.text, node))

    def comment(self, node):
        """The ``#:`` comment above a statement."""
        found, line = [], node.lineno - 2
        while line >= 0 and self.lines[line].strip().startswith("#:"):
            found.insert(0, self.lines[line].strip()[2:].strip())
            line -= 1
        return " ".join(found)


@dataclass(frozen=True)
class Entry:
    """A public name: where it is used from, and the statement that defines it."""

    name: str
    module: Module
    node: ast.AST

    @property
    def origin(self):
        """Full name at the place of its definition."""
        last = self.node.targets[0].id if isinstance(self.node, ast.Assign) else self.node.name
        return f"{self.module.name}.{last}"

    @property
    def doc(self):
        """The docstring, or a constant's comment."""
        if isinstance(self.node, ast.Assign):
            return self.module.comment(self.node)
        return ast.get_docstring(self.node) or ""


class Sources:
    """All that is public, found in the sources."""

    def __init__(self, sections=SECTIONS):
        self._modules = {}
        self.sections = {}
        self.home = {}  # origin -> the name under which it is described
        for name in sections:
            module = self.module(name)
            self.sections[name] = [(one, self.names(self.module(one))) for one in [name, *self._parts(module)]]
        for name in sorted(sections, key=lambda one: one == "colora_ms"):  # the root only points to the others
            for _, entries in self.sections[name]:
                for entry in entries:
                    self.home.setdefault(entry.origin, entry.name)
        lasts = [name.rsplit(".", 1)[-1] for name in self.home.values()]
        self.short = {name.rsplit(".", 1)[-1]: name for name in self.home.values()
                      if lasts.count(name.rsplit(".", 1)[-1]) == 1}

    def module(self, name):
        """The parsed module of a full name."""
        if name not in self._modules:
            self._modules[name] = Module(name)
        return self._modules[name]

    def _parts(self, module):
        return module.listed() if module.is_package and module.public() is None else []

    def names(self, module):
        """The public entries of one module."""
        names = module.public()
        if names is None:
            names = [] if module.is_package else [one for one in module.defined if not one.startswith("_")]
        return [self.resolve(module, one, f"{module.name}.{one}") for one in names]

    def resolve(self, module, name, public=""):
        """The Entry of a name in a module, followed through imports; None outside the package."""
        for _ in range(10):
            node = module.defined.get(name) or module.constants.get(name)
            if node is not None:
                return Entry(public, module, node)
            source, name = module.imported.get(name) or (module.late.get(name), name)
            if source is None or not source.startswith("colora_ms"):
                return None
            module = self.module(source)
        raise ValueError(f"{public} cannot be found in the sources")

    def bases(self, entry):
        """The classes of this package that a class comes from, nearest first."""
        found = []
        for base in entry.node.bases:
            one = self.resolve(entry.module, base.id, base.id) if isinstance(base, ast.Name) else None
            if one is not None:
                found += [one, *self.bases(one)]
        return found

    def methods(self, entry):
        """[(FunctionDef, its docstring or "")] of the public methods that a class defines itself."""
        return [(node, ast.get_docstring(node) or "") for node in entry.node.body
                if isinstance(node, FUNCTIONS) and not node.name.startswith("_") and not _is_setter(node)]

    def inherited_doc(self, entry, name):
        """Whether a base class of this package says what a method does."""
        return any(node.name == name and doc for base in self.bases(entry) for node, doc in self.methods(base))

    def entries(self):
        """All public entries, each once."""
        found = {}
        for parts in self.sections.values():
            for _, entries in parts:
                found.update({entry.origin: entry for entry in entries})
        return list(found.values())

    def undocumented(self):
        """Names of public objects and of their methods that nothing is said about."""
        found = [name for name in self.sections if not self.module(name).doc]
        for entry in self.entries():
            if not entry.doc:
                found.append(entry.origin)
            if isinstance(entry.node, ast.ClassDef):
                found += [f"{entry.origin}.{node.name}" for node, doc in self.methods(entry)
                          if not doc and node.name not in CELL_METHODS and not self.inherited_doc(entry, node.name)]
        return found


def _is_setter(node):
    return any(isinstance(one, ast.Attribute) and one.attr == "setter" for one in node.decorator_list)
