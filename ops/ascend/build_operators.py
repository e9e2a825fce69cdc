"""Build the Ascend operators with a CANN toolkit and install them; build.sh calls it.

    python ops/ascend/build_operators.py --cann TOOLKIT --install FOLDER [--units "ascend910b;ascend910_93" | both]

The compiler is MindSpore's own (``custom_compiler/setup.py`` of the installed wheel). It copies CANN's project
template, knows two of the places where CANN has kept it, and ends with a Python traceback when both are gone; so the
template is found and checked here first, in all places, and handed to it. All that can be checked before minutes of
compiling is checked before.
"""
import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import contract  # noqa: E402
import machine  # noqa: E402
import package_check  # noqa: E402
import stage  # noqa: E402
from colora_ms.ascend_package import STAMP, cann_version  # noqa: E402
from colora_ms.errors import ConfigError  # noqa: E402

VENDOR = "colora"
#: Where CANN keeps the template of an operator project: 8.x, 9.x (both names), and the sample of older toolkits.
TEMPLATES = ("tools/op_project_templates/ascendc/customize", "tools/new_op_project_template/custom_op",
             "tools/op_project_templates/op_project_tmpl",
             "tools/msopgen/template/operator_demo_projects/ascendc_operator_sample")
#: What MindSpore's compiler and its start.sh touch in it.
TEMPLATE_FILES = ("CMakePresets.json", "CMakeLists.txt", "build.sh", "op_host/CMakeLists.txt",
                  "op_kernel/CMakeLists.txt")
VARIABLES = ("ASCEND_COMPUTE_UNIT", "ASCEND_CANN_PACKAGE_PATH", "vendor_name")
TOOLS = ("bash", "g++", "cmake", "make")
#: What the front end of CANN's kernel compiler imports.
MODULES = ("attr", "decorator", "numpy", "psutil")
_PLAIN = re.compile(r"[A-Za-z0-9_/.-]+")


def template(cann):
    """The folder of CANN's project template.

    Raises:
        ConfigError: none of the known places holds a whole one; the message names what each lacks, and the version.
    """
    tried = []
    for root in (cann, cann / "toolkit", *sorted(cann.glob("*-linux"))):
        for place in TEMPLATES:
            folder = root / place
            if folder.is_dir():
                lacking = [name for name in TEMPLATE_FILES if not (folder / name).is_file()]
                lacking += [] if "CMakePresets.json" in lacking else _missing_variables(folder / "CMakePresets.json")
                if not lacking:
                    return folder
                tried.append(f"{folder} lacks {', '.join(lacking)}")
    raise ConfigError(f"CANN {cann_version(cann) or '(version unknown)'} in {cann} has no whole operator project "
                      f"template ({'; '.join(tried) or 'none of ' + ', '.join(TEMPLATES)}): install the full toolkit "
                      "with its operator tools (asc-tools), not only the runtime")


def _missing_variables(presets):
    try:
        known = json.loads(presets.read_text(encoding="utf-8"))["configurePresets"][0]["cacheVariables"]
    except (ValueError, LookupError, TypeError):
        return [f"{presets.name} in the form that is known"]
    return [f"{name} in {presets.name}" for name in VARIABLES if not isinstance(known.get(name), dict)
            or "value" not in known[name]]


def compiler_script(python=sys.executable):
    """MindSpore's custom compiler.

    Raises:
        ConfigError: this interpreter has no mindspore that ships one.
    """
    found = importlib.util.find_spec("mindspore")
    path = Path(found.origin).parent / "lib/plugin/ascend/custom_compiler/setup.py" if found and found.origin else None
    if path is None or not path.is_file():
        raise ConfigError(f"{python} has no mindspore with a custom compiler: install mindspore in it or set PYTHON")
    return path


def check_tools():
    """Refuse to begin without the tools, and without the modules in the ``python3`` that CANN will call."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not in the PATH: install "
                          f"{'it' if len(missing) == 1 else 'them'} (apt-get install g++ cmake make, or yum)")
    code, text = machine.output("python3", "-c", "import importlib.util as u; print(*[m for m in "
                                f"{MODULES!r} if u.find_spec(m) is None])")
    if code != 0:
        raise ConfigError(f"python3, which CANN's compiler calls, does not start: {text.strip()[-200:]}")
    if text.strip():
        names = text.strip().replace("attr", "attrs") if "attr" in text.split() else text.strip()
        raise ConfigError(f"{shutil.which('python3')}, which CANN's compiler calls, has no {', '.join(names.split())}: "
                          f"python3 -m pip install {names}")


def plain(path, what, instead):
    """A path with its links resolved, of which MindSpore's compiler and CANN's installer accept every character.

    Args:
        what: the path's name in the message; instead: what to do there.

    Raises:
        ConfigError: it has another one.
    """
    resolved = Path(os.path.realpath(path))
    if not _PLAIN.fullmatch(str(resolved)):
        bad = sorted(set(_PLAIN.sub("", str(resolved))))
        raise ConfigError(f"{what} {str(resolved)!r} has {', '.join(map(repr, bad))}: letters, digits and _ / . - are "
                          f"accepted; {instead}")
    return resolved


def made(folder, what, instead):
    """Make a folder that can be written.

    Raises:
        ConfigError: it cannot be made or written; the message names it and what it is for.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        why = "a file has that name" if isinstance(problem, FileExistsError) else problem.strerror
        raise ConfigError(f"{what} {str(folder)!r} cannot be made: {why}; {instead}") from problem
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{what} {str(folder)!r} cannot be written; {instead}")
    return folder


def work_folder():
    """``COLORA_BUILD`` or build/ beside this file; a temporary folder (which stays, with its logs) where the latter's
    path is not plain or cannot be written."""
    if os.environ.get("COLORA_BUILD"):
        instead = "set COLORA_BUILD to another one, such as /tmp/colora"
        return made(plain(os.environ["COLORA_BUILD"], "COLORA_BUILD", instead), "the folder COLORA_BUILD", instead)
    try:
        return made(plain(HERE / "build", "the folder", ""), "the folder", "")
    except ConfigError:
        pass
    return plain(tempfile.mkdtemp(prefix="colora-build-"), "the temporary folder", "set COLORA_BUILD or TMPDIR")


def load_compiler(script, source):
    """MindSpore's compiler as a class that works in a folder and takes the template that was found."""
    spec = importlib.util.spec_from_file_location("colora_custom_compiler", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    class Compiler(module.CustomOOC):
        def copy_compile_project(self):
            # Links lead out of the template (cmake/util -> ../common/util); the copy holds what they point at. (With
            # ignore_dangling_symlinks Python would drop relative links: it asks for them in the current folder.)
            shutil.copytree(source, self.custom_project, symlinks=False)
            shared = source.parent / "common" / "util"
            for file in sorted(shared.rglob("*")) if shared.is_dir() else ():
                target = Path(self.custom_project) / "cmake" / "util" / file.relative_to(shared)
                if file.is_file() and not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(file, target)
            for part in ("op_host", "op_kernel"):
                (Path(self.custom_project) / part).mkdir(exist_ok=True)

    return Compiler


def compile_all(cann, install, units, folder):
    """Run the compiler in ``folder`` and install below ``install``; returns the package's folder."""
    script, source = compiler_script(), template(cann)
    for part in ("stage", "compiler"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "compiler").mkdir()
    stage.stage(folder / "stage")
    for file in script.parent.iterdir():  # it makes its project beside itself; a copy keeps site-packages clean
        if file.is_file():
            shutil.copy2(file, folder / "compiler" / file.name)
    made = load_compiler(folder / "compiler" / "setup.py", source)
    # Importing MindSpore may have set it, with a colon, which CANN's installer refuses.
    os.environ.pop("ASCEND_CUSTOM_OPP_PATH", None)
    os.environ["ASCEND_HOME_PATH"] = str(cann)
    arguments = argparse.Namespace(
        op_host_path=str(folder / "stage" / "op_host"), op_kernel_path=str(folder / "stage" / "op_kernel"),
        soc_version=";".join(units), ascend_cann_package_path=str(cann), vendor_name=VENDOR,
        install_path=str(install), clear=False, install=True)
    before = os.getcwd()
    os.chdir(folder / "compiler")  # build.log and install.log go here
    try:
        made(arguments).compile()
    except (RuntimeError, ValueError, OSError, subprocess.SubprocessError) as problem:
        raise ConfigError(f"MindSpore's compiler ended with {type(problem).__name__}: {problem} (template {source}; "
                          f"build.log and install.log in {folder / 'compiler'}){log_end(folder)}") from problem
    finally:
        os.chdir(before)
    return install / "vendors" / VENDOR


def log_end(folder, lines=12):
    """The last lines of the newest log, for the message."""
    for name in ("install.log", "build.log"):
        file = folder / "compiler" / name
        if file.is_file() and file.stat().st_size:
            text = file.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
            return f"\n--- the end of {name}\n" + "\n".join(text)
    return ""


def finish(package, cann, units):
    """Check what was installed, make it readable to all, write the stamp.

    Raises:
        ConfigError: lists all that is not there or not right.
    """
    definitions = contract.definitions()
    problems, facts = package_check.problems(package, definitions, units, cann)
    if problems:
        raise ConfigError(f"the build ended, but {package} is not whole: " + "; ".join(problems[:6])
                          + (f"; and {len(problems) - 6} more" if len(problems) > 6 else ""))
    for path in [package.parent, *package.parent.rglob("*")]:  # vendors/config.ini is made with mode 640
        if not path.is_symlink():
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    mindspore = importlib.util.find_spec("mindspore")
    version = machine.version_file(Path(mindspore.origin).parent / "version.py") if mindspore else None
    text = {"cann": cann_version(cann), "units": units, "operators": sorted(d["name"] for d in definitions),
            "exports": facts["exports"], "mindspore": (version or "").strip("'\"") or None,
            "built": time.strftime("%Y-%m-%d %H:%M")}
    (package / STAMP).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cann", required=True, type=Path)
    parser.add_argument("--install", required=True, type=Path)
    parser.add_argument("--units", default=os.environ.get("COLORA_SOC") or None)
    options = parser.parse_args(arguments)
    try:
        cann = plain(options.cann, "the CANN toolkit's folder", "install the toolkit in a folder without, and set "
                     "ASCEND_HOME_PATH to it (a link does not help: links are resolved)")
        template(cann)
        compiler_script()
        check_tools()
        units = machine.units(options.units)
        if cann_version(cann) is None:
            print(f"build.sh: warning: no file in {cann} says the version of CANN; whether the operators fit the CANN "
                  "of a later process cannot be checked then, and each will warn of it", file=sys.stderr)
        instead = "give another one: bash ops/ascend/build.sh /opt/colora"
        install = made(plain(options.install, "the install folder", instead), "the install folder", instead)
        work = work_folder()
        began = time.time()
        package = compile_all(cann, install, units, work)
        finish(package, cann, units)
    except (ConfigError, OSError) as problem:
        print(f"build.sh: {problem}", file=sys.stderr)
        return 1
    print(f"built for {' and '.join(units)} with CANN {cann_version(cann) or '(version unknown)'} in "
          f"{time.time() - began:.0f} s: {package}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
