"""What a built package of operators must hold on disk: headers, exported functions, op-info, binaries, tiling library.

    python ops/ascend/package_check.py vendors/colora [TOOLKIT]
"""
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import contract  # noqa: E402
import machine  # noqa: E402
from colora_ms.ascend_package import exported, needed  # noqa: E402


def _libraries(folder, pattern):
    return sorted(path for path in folder.rglob(pattern) if path.is_file())


def _json(file, problems):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        problems.append(f"{file} is not there")
    except ValueError as error:
        problems.append(f"{file} is damaged ({error})")
    return {}


def problems(package, definitions, units, cann=None):
    """(sentences on what is missing or wrong, {"exports": names, "binaries": number, "needed": libraries}).

    Args:
        package: the folder vendors/<vendor>. definitions: of :func:`contract.definitions`.
        units: for which chips it must hold binaries. cann: the toolkit, whose own names must not be exported again.
    """
    package, found, binaries = Path(package), [], 0
    for definition in definitions:
        header = package / "op_api" / "include" / f"aclnn_{contract.snake(definition['name'])}.h"
        if not header.is_file():
            found.append(f"{header} is not there")
    tbe = package / "op_impl" / "ai_core" / "tbe"
    for unit in units:
        file = tbe / "config" / unit / f"aic-{unit}-ops-info.json"
        info = _json(file, found)
        for definition in definitions:
            if info:
                _op_info(file, info, definition, found)
            binaries += _binaries(tbe / "kernel" / unit / contract.snake(definition["name"]), definition, found)
    wanted = {f"aclnn{d['name']}{end}" for d in definitions for end in ("", "GetWorkspaceSize")}
    exports = _exports(package, wanted, cann, found)
    if not _libraries(package / "op_impl", "lib*opmaster*.so") + _libraries(package / "op_impl", "lib*optiling*.so"):
        found.append(f"no tiling library (libcust_opmaster_rt2.0.so or liboptiling.so) below {package / 'op_impl'}")
    library = package / "op_api" / "lib" / "libcust_opapi.so"
    return found, {"exports": sorted(exports), "binaries": binaries, "needed": needed(library) or []}


def _op_info(file, info, definition, found):
    name = definition["name"]
    if name not in info:
        found.append(f"{file} does not have {name}")
        return
    # The order of the arguments is what a caller relies on; the names must be those of the definition.
    for side in ("input", "output"):
        names = [n for n, *_ in definition[side + "s"]]
        theirs = [info[name].get(f"{side}{i}", {}).get("name") for i in range(len(names))]
        if theirs != names:
            found.append(f"{file}: {name} has {side}s {theirs}, the source has {names}")


def _binaries(folder, definition, found):
    binaries, dtypes = sorted(folder.glob("*.o")), len(definition["inputs"][0][2])
    if len(binaries) < dtypes:
        found.append(f"{folder} has {len(binaries)} binaries, expected one a dtype ({dtypes})")
    texts = [one.with_suffix(".json") for one in binaries]
    found.extend(f"{text} is not there" for text in texts if not text.is_file())
    return len(binaries)


def _exports(package, wanted, cann, found):
    library = package / "op_api" / "lib" / "libcust_opapi.so"
    if not library.is_file():
        found.append(f"{library} is not there")
        return set()
    names = exported(library)
    if names is None:
        found.append(f"{library} cannot be read by nm -D: install binutils")
        return set()
    if wanted - names:
        found.append(f"{library} does not export {', '.join(sorted(wanted - names))}")
    if names - wanted:
        found.append(f"{library} also exports {', '.join(sorted(names - wanted))}: another package was built into it")
    for link in needed(library) or ():
        if link.startswith("libopapi"):
            found.append(f"{library} is linked against {link}: its operators and CANN's would call one another")
    for theirs in _libraries(Path(cann), "libopapi*.so") if cann else ():
        same = wanted & (exported(theirs) or set())
        if same:
            found.append(f"CANN's own {theirs} exports {', '.join(sorted(same))}, too: a name must be changed")
    return names


def main():
    package = Path(sys.argv[1])
    units = sorted(p.name for p in (package / "op_impl/ai_core/tbe/config").glob("*")) or ["ascend910b"]
    cann = sys.argv[2] if len(sys.argv) > 2 else machine.toolkit()
    found, facts = problems(package, contract.definitions(), units, cann)
    print("\n".join(found) or f"{package} is whole for {', '.join(units)}: {facts['binaries']} binaries, "
          f"{len(facts['exports'])} exported functions")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
