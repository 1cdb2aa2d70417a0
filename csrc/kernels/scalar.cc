#include "kernels/kernel_set.h"
#include "kernels/reference/instructions.h"

namespace espalier {
namespace {
constexpr int LANES = 4;
constexpr int MAX_GROUPS = 4;
using Dot = reference::Dpbusd;
#include "kernels/vec/scalar.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("scalar");
}  // namespace
const KernelSet* scalar_kernels() { return &kSet; }
}  // namespace espalier
