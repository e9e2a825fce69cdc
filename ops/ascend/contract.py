"""What a build of ops/ascend registers, read from the OpDef sources: the op-info JSON and the aclnn headers in the form
in which CANN generates them, so that MindSpore's own parser can be tried without a toolkit.

    python ops/ascend/contract.py FOLDER
"""
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
DTYPES = {"DT_FLOAT16": "float16", "DT_BF16": "bfloat16", "DT_FLOAT": "float32", "DT_INT32": "int32",
          "DT_UINT8": "uint8"}
ACL_TYPES = {"int": "int64_t", "bool": "bool", "float": "double"}


def parse_definition(text):
    """One *_def.cpp -> {"name", "inputs": [(name, param type, dtypes)], "outputs", "attributes", "units"}."""
    tensors = re.compile(r'this->(Input|Output)\("(\w+)"\)\.ParamType\((\w+)\)'
                         r"\.DataType\(\{(.*?)\}\)\.Format\(\{(.*?)\}\)", re.S)
    parsed = {"name": re.search(r"OP_ADD\((\w+)\)", text).group(1), "inputs": [], "outputs": [], "attributes": []}
    for kind, name, presence, types, formats in tensors.findall(text):
        types = [DTYPES[t.strip().removeprefix("ge::")] for t in types.split(",")]
        assert len(types) == len(formats.split(","))
        parsed[kind.lower() + "s"].append((name, presence.lower(), types))
    for name, presence, kind, default in re.findall(r'this->Attr\("(\w+)"\)\.AttrType\((\w+)\)\.(\w+)\((.*?)\);', text):
        parsed["attributes"].append((name, presence.lower(), kind.lower(), default))
    parsed["units"] = re.findall(r'AddConfig\("(\w+)"\)', text)
    return parsed


def definitions():
    return [parse_definition(p.read_text()) for p in sorted(HERE.glob("*/op_host/*_def.cpp"))]


def snake(name):
    return re.sub(r"(?<=[a-z0-9])([A-Z])", r"_\1", name).lower()


def op_info(definition):
    """The operator's entry of aic-<chip>-ops-info.json."""
    entry = {"opFile": {"value": snake(definition["name"])}, "opInterface": {"value": snake(definition["name"])},
             "coreType": {"value": "AiCore"}, "dynamicShapeSupport": {"flag": "true"}}
    for side in ("input", "output"):
        for i, (name, presence, types) in enumerate(definition[side + "s"]):
            entry[f"{side}{i}"] = {"name": name, "paramType": presence, "dtype": ",".join(types),
                                   "format": ",".join(["ND"] * len(types)), "shape": "all"}
    if definition["attributes"]:
        entry["attr"] = {"list": ",".join(name for name, *_ in definition["attributes"])}
        for name, presence, kind, default in definition["attributes"]:
            entry[f"attr_{name}"] = {"type": kind, "paramType": presence, "defaultValue": default, "value": "all"}
    return entry


def header(definition):
    """aclnn_<operator>.h, as far as MindSpore reads it."""
    name = definition["name"]
    arguments = [f"const aclTensor *{n}" for n, *_ in definition["inputs"]]
    arguments += [f"{ACL_TYPES[kind]} {n}" for n, _, kind, _ in definition["attributes"]]
    arguments += [f"const aclTensor *{n}" for n, *_ in definition["outputs"]]
    arguments += ["uint64_t *workspaceSize", "aclOpExecutor **executor"]
    return (f"aclnnStatus aclnn{name}GetWorkspaceSize(\n    " + ",\n    ".join(arguments) + ");\n\n"
            f"aclnnStatus aclnn{name}(void *workspace, uint64_t workspaceSize, aclOpExecutor *executor, aclrtStream "
            "stream);\n")


def write(folder):
    """Lay the files out as vendors/<vendor> has them."""
    folder = Path(folder)
    (folder / "op_api" / "include").mkdir(parents=True, exist_ok=True)
    found = definitions()
    for unit in sorted({unit for d in found for unit in d["units"]}):
        config = folder / "op_impl" / "ai_core" / "tbe" / "config" / unit
        config.mkdir(parents=True, exist_ok=True)
        entries = {d["name"]: op_info(d) for d in found if unit in d["units"]}
        (config / f"aic-{unit}-ops-info.json").write_text(json.dumps(entries, indent=4, sort_keys=True) + "\n")
    for d in found:
        (folder / "op_api" / "include" / f"aclnn_{snake(d['name'])}.h").write_text(header(d))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python ops/ascend/contract.py FOLDER")
    write(sys.argv[1])
