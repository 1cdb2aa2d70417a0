#include "kernels/kernel_set.h"

#if defined(__AVX512VNNI__) && defined(__AMX_INT8__)
#include <immintrin.h>

namespace espalier {
namespace {
constexpr int MAX_GROUPS = 4;
#include "kernels/vec/avx512.h"
#include "kernels/vec/amx.h"
#include "kernels/kernels.inl"
constexpr KernelSet kSet = make_kernel_set("avx512_amx");
}  // namespace
const KernelSet* avx512_amx_kernels() { return &kSet; }
}  // namespace espalier

#else

const espalier::KernelSet* espalier::avx512_amx_kernels() { return nullptr; }

#endif
