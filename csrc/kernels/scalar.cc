#include "kernels/kernel_set.h"

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 4;
#include "kernels/vec/scalar.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("scalar");
}  // namespace
const KernelSet* scalar_kernels() { return &kSet; }
}  // namespace espalier
