// The compiled AMX kernels on processors that have AVX-512-VNNI alone: each tile instruction traps, and a signal
// handler does what kernels/reference/tiles.h says it means. So encodings, operands and the configuration are tested
// too.
#pragma once

#include "kernels/kernel_set.h"

namespace testing {

// Null where they cannot run even so, or need no help.
const espalier::KernelSet* trapped_amx_kernels();

}  // namespace testing
