#include "kernels/kernel_set.h"

#if defined(__AVX512F__)
#include <immintrin.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 4;
#include "kernels/vec/avx512.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("avx512");
}  // namespace
const KernelSet* avx512_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::avx512_kernels() { return nullptr; }

#endif
