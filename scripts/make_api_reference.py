"""Writes build/API.md, the reference of all public names and of the command line, from the sources' docstrings.

    python scripts/make_api_reference.py             # write build/API.md
    python scripts/make_api_reference.py --out FILE

The sources are parsed, not imported: neither MindSpore nor mindformers is needed, and the result is the same
everywhere.
"""

import argparse
import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path

from api_sources import FUNCTIONS, ROOT, Sources

OUTPUT = ROOT / "build" / "API.md"

HEAD = """# API reference of colora_ms

Written by `python scripts/make_api_reference.py` from the docstrings; change those, not this file.
README.md shows how the parts are used, colora_ms/EXTENDING.md how to add an adapter or a kernel.
"""


class Page(Sources):
    """The Markdown page."""

    def __init__(self):
        super().__init__()
        self.anchors = {}  # heading -> its fragment; of headings that differ in case alone the later ones get a number
        taken = {}
        for name, parts in self.sections.items():
            described = [entry.name for _, entries in parts for entry in entries
                         if self.home[entry.origin] == entry.name]
            for heading in [name, *described]:
                count = taken[anchor(heading)] = taken.get(anchor(heading), -1) + 1
                self.anchors[heading] = anchor(heading) + (f"-{count}" if count else "")

    def link(self, target):
        """A name of a ``:class:`` role as a link to its section, or as code."""
        target = target.lstrip("~")
        shown = target.rsplit(".", 1)[-1]
        home = self.home.get(target) or (target if target in self.home.values() else self.short.get(shown))
        return f"[`{shown}`](#{self.anchors[home]})" if home else f"`{target}`"

    def inline(self, text):
        """reStructuredText's marks inside a line as Markdown's."""
        parts = re.split(r"(:\w+:`[^`]+`|``.+?``|`[^`\n]+`)", text, flags=re.S)
        done = []
        for part in parts:
            if re.match(r":\w+:`", part):
                done.append(self.link(part.split("`")[1]))
            elif part.startswith("`"):
                done.append("`" + part.strip("`") + "`")
            else:
                part = re.sub(r"^(Semantics|Gradients|Source)(?=[:,])", r"**\1**", part.replace("<", "\\<"), flags=re.M)
                done.append(re.sub(r"(?<![\s*])\*(?=[^\s*])", r"\\*", part))
        return "".join(done)

    def text(self, doc):
        """Paragraphs, lists and indented examples of a docstring (its sections excepted)."""
        done, block = [], []

        def end_block():
            if block:
                text = textwrap.dedent("\n".join(block)).strip("\n")
                done.extend([""] * bool(done and done[-1]) + [f"```{language_of(text)}", *text.splitlines(), "```"])
                block.clear()

        plain = []

        def end_plain():
            if plain:
                done.extend(self.inline("\n".join(plain)).splitlines())
                plain.clear()

        for line in doc.strip("\n").splitlines():
            if line.startswith("    ") and (block or not plain or not plain[-1]):
                end_plain()
                block.append(line)
            elif block and not line:
                block.append(line)
            else:
                if block:
                    end_block()
                    done.append("")
                plain.append(line[:-1] if line.endswith("::") else line)
        end_plain()
        end_block()
        return "\n".join(done).strip("\n")

    def markdown(self, doc):
        """A whole docstring: text, then Args, Returns, Raises and the like."""
        pieces = re.split(r"^(Args|Attributes|Returns|Yields|Raises):$\n((?:(?:    .*)?\n?)*)", doc + "\n", flags=re.M)
        done = [self.text(pieces[0])]
        for title, body, after in zip(pieces[1::3], pieces[2::3], pieces[3::3]):
            body = textwrap.dedent(body).strip("\n")
            done.append(f"**{title}**\n\n" + (self.text(body) if title in ("Returns", "Yields") else self.items(body)))
            done.append(self.text(after))
        return "\n\n".join(one for one in done if one)

    def items(self, body):
        """``name: meaning`` lines, with their continuations, as a list."""
        found = []
        for line in body.splitlines():
            if line.startswith(" ") or not line:
                found[-1].append(line.strip())
            else:
                found.append([line])
        done = []
        for lines in found:
            text = " ".join(one for one in lines if one)
            named = re.match(r"([\w.*, ]{1,80}): (.*)", text, re.S)
            done.append(f"- **{named[1]}**: {self.inline(named[2])}" if named else f"- {self.inline(text)}")
        return "\n".join(done)

    def describe(self, entry):
        """The section of one public name."""
        done = [f"### {entry.name}", ""]
        node, module = entry.node, entry.module
        place = f"`{module.path.relative_to(ROOT)}`"
        if isinstance(node, ast.Assign):
            return "\n".join([*done, f"Constant, in {place}.", "", self.text(entry.doc)])
        last = node.name
        if isinstance(node, FUNCTIONS):
            return "\n".join([*done, fenced(signature(module, node, last)), "", self.markdown(entry.doc), "",
                              f"Defined in {place}."])
        bases = self.bases(entry)
        done += [fenced(self.class_signature(entry, bases)), "", self.markdown(entry.doc), ""]
        table = self.field_table(entry)
        done += [table, ""] if table else []
        for method, doc in self.methods(entry):
            if doc:
                done += [self.describe_method(module, method, doc), ""]
        names = [[method.name for method, doc in self.methods(base) if doc] for base in bases]
        more = [f"{self.link(base.origin)} ({', '.join(f'`{one}`' for one in own)})" if own else self.link(base.origin)
                for base, own in zip(bases, names)]
        done.append((f"Inherits from {'; '.join(more)}. " if more else "") + f"Defined in {place}.")
        return "\n".join(done)

    def describe_method(self, module, node, doc):
        """One method or property of a class, indented below its class."""
        is_property = any(isinstance(one, ast.Name) and one.id in ("property", "cached_property")
                          for one in node.decorator_list)
        head = f"`{node.name}` (property)" if is_property else f"`{signature(module, node, node.name, True)}`"
        return f"#### {head}\n\n{self.markdown(doc)}" if len(head) < 80 else \
            f"#### `{node.name}`\n\n{fenced(signature(module, node, node.name, True))}\n\n{self.markdown(doc)}"

    def class_signature(self, entry, bases):
        """How a class is called: by its fields if it is a dataclass, else by the nearest ``__init__``."""
        if is_dataclass(entry.node):
            parts = []
            for one in [*reversed(bases), entry]:
                for node in fields_of(one.node):
                    value = f"={default_of(one.module, node)}" if node.value is not None else ""
                    parts.append(node.target.id + value)
            return wrapped(f"class {entry.node.name}", parts)
        for one in [entry, *bases]:
            for node in one.node.body:
                if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                    return signature(one.module, node, f"class {entry.node.name}", True)
        return f"class {entry.node.name}"

    def field_table(self, entry):
        """The fields of a dataclass whose comments say what they mean."""
        fields = fields_of(entry.node) if is_dataclass(entry.node) else []
        rows = [(node, entry.module.comment(node)) for node in fields]
        if not any(text for _, text in rows):
            return ""
        lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
        for node, text in rows:
            default = f"`{default_of(entry.module, node)}`" if node.value is not None else ""
            cells = (f"`{node.target.id}`", f"`{entry.module.source(node.annotation)}`", default, self.inline(text))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines)

    def render(self):
        """The whole page."""
        done = [HEAD, "| section | what it is |", "|---|---|"]
        done += [f"| [{name}](#{self.anchors[name]}) | {self.first_sentence(self.module(name).doc)} |"
                 for name in self.sections]
        done += [f"| [The command line](#{anchor('The command line')}) | `colora-ms COMMAND` and the options of each |",
                 ""]
        for name, parts in self.sections.items():
            done += [f"## {name}", "", self.text(self.module(name).doc), ""]
            for part, entries in parts:
                if part != name:
                    done += [f"**{part}**: {self.text(self.module(part).doc)}", ""]
                if entries:
                    done += ["| name | what it is |", "|---|---|"]
                    done += [f"| [`{entry.name.removeprefix(part + '.')}`](#{self.anchors[self.home[entry.origin]]}) | "
                             f"{self.first_sentence(entry.doc)} |" for entry in entries] + [""]
            for _, entries in parts:
                for entry in entries:
                    if self.home[entry.origin] == entry.name:
                        done += [self.describe(entry), ""]
        return "\n".join(done) + "\n" + command_line()

    def first_sentence(self, doc):
        """The first sentence of a docstring, for a table."""
        first = re.split(r"(?<=[.!?])\s+(?=[A-Z`])|:\n", doc.split("\n\n")[0])[0]
        return self.inline(first.replace("\n", " ")).replace("|", "\\|").rstrip(":")


def language_of(text):
    """"python" if an indented example can be parsed as such, else "text" (a formula, a table)."""
    try:
        ast.parse(text)
    except SyntaxError:
        return "text"
    return "python"


def anchor(heading):
    """The fragment that Markdown readers make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def is_dataclass(node):
    """Whether a class has the decorator ``dataclass``."""
    names = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return any(getattr(one, "attr", getattr(one, "id", "")) == "dataclass" for one in names)


def fields_of(node):
    """The public fields of a dataclass."""
    return [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            and not one.target.id.startswith("_")]


def default_of(module, node):
    """A field's default as it is written; ``dict()`` for ``field(default_factory=dict)``."""
    text = module.source(node.value)
    made = re.match(r"(?:dataclasses\.)?field\(default_factory=(\w+)\)", text)
    return f"{made[1]}()" if made else text


def signature(module, node, name, is_method=False):
    """``name(arguments)`` of a function, wrapped."""
    spec = node.args
    plain = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(plain) - len(spec.defaults)) + list(spec.defaults)
    parts = [_argument(module, one, default) for one, default in zip(plain, defaults)]
    static = any(isinstance(one, ast.Name) and one.id == "staticmethod" for one in node.decorator_list)
    parts = parts[1:] if is_method and not static else parts
    if spec.vararg or spec.kwonlyargs:
        parts.append("*" + (spec.vararg.arg if spec.vararg else ""))
    parts += [_argument(module, one, default) for one, default in zip(spec.kwonlyargs, spec.kw_defaults)]
    if spec.kwarg:
        parts.append("**" + spec.kwarg.arg)
    return wrapped(name, parts)


def _argument(module, node, default):
    kind = f": {module.source(node.annotation)}" if node.annotation else ""
    if default is None:
        return node.arg + kind
    return f"{node.arg}{kind} = {module.source(default)}" if kind else f"{node.arg}={module.source(default)}"


def wrapped(name, parts):
    """name(parts) in lines of at most 110 columns."""
    lines, indent = [f"{name}("], " " * (len(name) + 1)
    for i, part in enumerate(parts):
        part += ")" if i == len(parts) - 1 else ","
        if len(lines[-1]) + len(part) > 108 and lines[-1].strip() != f"{name}(":
            lines.append(indent + part)
        else:
            lines[-1] += ("" if lines[-1].endswith("(") and i == 0 else " ") + part
    return "\n".join(lines) + ("" if parts else ")")


def fenced(text):
    """A block of Python."""
    return f"```python\n{text}\n```"


def command_line():
    """The commands and their options, from the parsers themselves (argparse's own help differs between Pythons)."""
    sys.path.insert(0, str(ROOT))
    try:
        from colora_ms.cli import COMMANDS, build_parser
    finally:
        sys.path.pop(0)
    parser = build_parser()
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction)).choices
    done = ["## The command line", "", "`colora-ms COMMAND --help` prints the same.", "", "| command | what it does |",
            "|---|---|"]
    done += [f"| [`{name}`](#{anchor('colora-ms ' + name)}) | {COMMANDS[name]} |" for name in commands]
    for name, command in commands.items():
        done += ["", f"### colora-ms {name}", "", command.description, "", "| argument | default | meaning |",
                 "|---|---|---|"]
        for action in command._actions:
            if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
                continue
            cells = (f"`{_written(action)}`", _default(action),
                     (action.help or "") % {**vars(action), "prog": command.prog})
            done.append("| " + " | ".join(re.sub(r"\s+", " ", cell).replace("|", "\\|").replace("<", "\\<")
                                          for cell in cells) + " |")
    return "\n".join(done) + "\n"


def _written(action):
    """An argument as one types it."""
    if action.nargs == 0:
        return ", ".join(action.option_strings)
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest)
    value = " ".join(value) if isinstance(value, tuple) else value if action.option_strings else value
    if action.option_strings:
        value = value if action.metavar or action.choices else value.upper()
        many = " ..." if action.nargs in ("*", "+") else ""
        return f"{', '.join(action.option_strings)} {value}{many}"
    return f"[{value} ...]" if action.nargs == "*" else f"[{value}]" if action.nargs == "?" else \
        f"{value} ..." if action.nargs == "+" else value


def _default(action):
    if action.default in (None, argparse.SUPPRESS, False, [], "") or action.required:
        return ""
    return f"`{action.default}`"


def main():
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUTPUT, help="file to write; its folder is made if it is not there")
    arguments = parser.parse_args()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(Page().render(), encoding="utf-8")
    print(arguments.out)


if __name__ == "__main__":
    main()
