// Host stand-in for the Ascend C header of the same name: the subset that this project's kernels use, with checks.
// Written from the documented behaviour for Atlas A2/A3 (Ascend910B, Ascend910_93); see ops/emulator/README.md.
#pragma once
#define COLORA_EMULATOR 1
#define __aicore__
#define __global__
#define __gm__
#define GM_ADDR __gm__ uint8_t*
#include "emulator/types.h"
#include "emulator/machine.h"
#include "emulator/tensor.h"
#include "emulator/sync.h"
#include "emulator/copy.h"
#include "emulator/vector.h"
#include "emulator/arithmetic.h"
#include "emulator/convert.h"
#include "emulator/compare.h"
#include "emulator/reduce.h"

// Tiling data is a plain struct, named by the build for each kernel; kernel types mean nothing on the host.
#define GET_TILING_DATA(name, address) \
    EMULATOR_TILING name;              \
    std::memcpy(&name, address, sizeof(name))
#define KERNEL_TASK_TYPE_DEFAULT(type)
namespace AscendC {
// On the device the system's own workspace comes first in the same allocation.
inline GM_ADDR GetUserWorkspace(GM_ADDR workspace) { return workspace; }
}  // namespace AscendC

// Names that the device's compiler has as macros or builtin variables: nothing in a kernel can be called so.
#define block_idx (::get_block_idx())
#define block_num (::get_block_num())
