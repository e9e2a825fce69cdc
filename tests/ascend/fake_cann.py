"""A CANN toolkit that compiles nothing, and an npu-smi that knows one card: what is around the operators' build can be
run without either. MindSpore's own custom compiler works on it as on a real one.

    toolkit(folder, version="9.0.0", layout="custom_op")     the folder
    npu_smi(folder, chip="910B3")                            a folder for the PATH
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = {"customize": "tools/op_project_templates/ascendc/customize",
           "custom_op": "tools/new_op_project_template/custom_op",
           "op_project_tmpl": "tools/op_project_templates/op_project_tmpl",
           "sample": "tools/msopgen/template/operator_demo_projects/ascendc_operator_sample"}

#: Lays a package out as CANN's build does (ops/ascend/contract.py) and packs it into an installer.
COMPILE = '''
import json, os, shutil, subprocess, sys
from pathlib import Path
sys.path.insert(0, {root!r} + "/ops/ascend")
import contract
assert "ASCEND_CUSTOM_OPP_PATH" not in os.environ
presets = json.loads(Path("CMakePresets.json").read_text())["configurePresets"][0]["cacheVariables"]
vendor, units = presets["vendor_name"]["value"], presets["ASCEND_COMPUTE_UNIT"]["value"].split(";")
assert presets["ASCEND_CANN_PACKAGE_PATH"]["value"] == os.environ["ASCEND_HOME_PATH"]
assert len(list(Path("op_host").glob("*_def.cpp"))) == len(contract.definitions())
package = Path("build_out/packages/vendors") / vendor
contract.write(package)
for old in (package / "op_impl/ai_core/tbe/config").iterdir():
    if old.name not in units:
        shutil.rmtree(old)
text = ""
for d in contract.definitions():
    for end in ("", "GetWorkspaceSize"):
        text += "int aclnn%s%s(void) {{ return 0; }}\\n" % (d["name"], end)
    for unit in units:
        folder = package / "op_impl/ai_core/tbe/kernel" / unit / contract.snake(d["name"])
        folder.mkdir(parents=True)
        for k in range(len(d["inputs"][0][2])):
            (folder / ("%s_%d.o" % (d["name"], k))).write_bytes(b"")
            (folder / ("%s_%d.json" % (d["name"], k))).write_text("{{}}")
Path("exports.c").write_text(text)
(package / "op_api/lib").mkdir()
subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(package / "op_api/lib/libcust_opapi.so"), "exports.c"], check=True)
tiling = package / "op_impl/ai_core/tbe/op_tiling"
tiling.mkdir()
(tiling / "liboptiling.so").write_bytes(b"")
installer = Path("build_out/custom_opp.run")
installer.write_text("""#!/bin/bash
set -e
case "$ASCEND_CUSTOM_OPP_PATH" in *:*) echo "has multiple path in it"; exit 1;; esac
cp -r %s/vendors "$ASCEND_CUSTOM_OPP_PATH/"
echo "load_priority=%s" > "$ASCEND_CUSTOM_OPP_PATH/vendors/config.ini"
chmod 640 "$ASCEND_CUSTOM_OPP_PATH/vendors/config.ini"
""" % (os.path.abspath("build_out/packages"), vendor))
'''

TABLE = """+------------------------------------------------------------------------------------------------+
| npu-smi 25.5.0                   Version: 25.5.0                                               |
+---------------------------+---------------+----------------------------------------------------+
| NPU   Name                | Health        | Power(W)    Temp(C)           Hugepages-Usage(page)|
| Chip                      | Bus-Id        | AICore(%)   Memory-Usage(MB)  HBM-Usage(MB)        |
+===========================+===============+====================================================+
| 0     {chip:<20}| OK            | 95.2        37                0    / 0             |
| 0                         | 0000:C1:00.0  | 0           0    / 0          3391 / 65536         |
+===========================+===============+====================================================+
| 1     {chip:<20}| Warning       | 96.1        38                0    / 0             |
| 0                         | 0000:C2:00.0  | 0           0    / 0          60001/ 65536         |
+===========================+===============+====================================================+
+---------------------------+---------------+----------------------------------------------------+
| NPU     Chip              | Process id    | Process name             | Process memory(MB)      |
+===========================+===============+====================================================+
| No running processes found in NPU 0                                                            |
+===========================+===============+====================================================+
| 1       0                 | 12345         | python3 serve.py         | 56610                   |
+===========================+===============+====================================================+
"""


def toolkit(folder, version="9.0.0", layout="custom_op"):
    """A toolkit of a version whose template stands in the place of that layout."""
    cann = Path(folder)
    (cann / "compiler").mkdir(parents=True)
    (cann / "compiler" / "version.info").write_text(f"Version={version}\n")
    (cann / "opp" / "built-in" / "op_impl").mkdir(parents=True)
    (cann / "include").mkdir()
    project = cann / LAYOUTS[layout]
    for part in ("op_host", "op_kernel"):
        (project / part).mkdir(parents=True)
        (project / part / "CMakeLists.txt").write_text("")
    (project / "op_host" / "add_custom.cpp").write_text("an example, which must not be built\n")
    (project / "CMakeLists.txt").write_text("")
    values = {name: {"type": "STRING", "value": ""} for name in ("ASCEND_COMPUTE_UNIT", "ASCEND_CANN_PACKAGE_PATH",
                                                                 "vendor_name")}
    (project / "CMakePresets.json").write_text(json.dumps({"configurePresets": [{"cacheVariables": values}]}))
    util = cann / "compile.py"
    if layout == "customize":  # as in CANN: a link that leads out of the template
        util = project.parent / "common" / "util" / "compile.py"
        util.parent.mkdir(parents=True)
        (project / "cmake" / "util").mkdir(parents=True)
        (project / "cmake" / "util" / "linked.py").symlink_to("../../../common/util/compile.py")
    util.write_text(COMPILE.format(root=str(ROOT)))
    used = "cmake/util/linked.py" if layout == "customize" else str(util)
    (project / "build.sh").write_text(f"set -e\nmkdir -p build_out\n{sys.executable} {used}\n")
    (cann / "data" / "platform_config").mkdir(parents=True)
    (cann / "data/platform_config/Ascend910B3.ini").write_text("[SoCInfo]\nai_core_cnt=20\nvector_core_cnt=40\n")
    return cann


def npu_smi(folder, chip="910B3"):
    """A folder with an npu-smi that shows two cards of that chip, the second one in use."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table").write_text(TABLE.format(chip=chip))
    (folder / "npu-smi").write_text(f'#!/bin/bash\n[ "$1" = info ] && cat {folder}/table\n')
    (folder / "npu-smi").chmod(0o755)
    return folder
