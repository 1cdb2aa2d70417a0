#include "kernels/kernel_set.h"

#if defined(__AVXVNNI__)
#include <immintrin.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 3;
#include "kernels/vec/avx2.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("avx_vnni");
}  // namespace
const KernelSet* avx_vnni_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::avx_vnni_kernels() { return nullptr; }

#endif
