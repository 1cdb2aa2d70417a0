#include "kernels/kernel_set.h"

#if defined(__AVX512VNNI__)
#include <immintrin.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 4;
#include "kernels/vec/avx512.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("avx512_vnni");
}  // namespace
const KernelSet* avx512_vnni_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::avx512_vnni_kernels() { return nullptr; }

#endif
