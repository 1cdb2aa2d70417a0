#include "kernels/kernel_set.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 3;
#include "kernels/vec/avx2.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("avx2");
}  // namespace
const KernelSet* avx2_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::avx2_kernels() { return nullptr; }

#endif
