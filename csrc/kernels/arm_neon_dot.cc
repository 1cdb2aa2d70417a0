#include "kernels/kernel_set.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 6;
#include "kernels/vec/neon.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("neon_dot");
}  // namespace
const KernelSet* neon_dot_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::neon_dot_kernels() { return nullptr; }

#endif
