// The 8 bit kernels of instruction sets that may not be at hand: the same source over plain arrays, of the same shape,
// with what their dot-product instructions do.
#include "support.h"

#include "amx_trap.h"
#include "kernels/reference/instructions.h"
#include "kernels/reference/tiles.h"

namespace espalier {
namespace {

namespace avx2 {
constexpr int LANES = 8, MAX_GROUPS = 3;
using Dot = reference::Maddubs;
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated avx2");
}  // namespace avx2

namespace avx_vnni {
constexpr int LANES = 8, MAX_GROUPS = 3;
using Dot = reference::Dpbusd;
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated avx_vnni");
}  // namespace avx_vnni

namespace avx512_vnni {
constexpr int LANES = 16, MAX_GROUPS = 4;
using Dot = reference::Dpbusd;
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated avx512_vnni");
}  // namespace avx512_vnni

namespace avx512_amx {
constexpr int LANES = 16, MAX_GROUPS = 4;
using Dot = reference::DpbusdAndTiles;
struct Tiles {  // as in kernels/vec/amx.h
  static void configure(const void* from) { reference::tile_registers.configure(from); }
  static void release() { reference::tile_registers.release(); }
  template <int T>
  static void zero() {
    reference::tile_registers.zero(T);
  }
  template <int T>
  static void load(const void* from, long stride) {
    reference::tile_registers.load(T, from, stride);
  }
  template <int T>
  static void store(void* to, long stride) {
    reference::tile_registers.store(T, to, stride);
  }
  template <int C, int W, int X>
  static void dot() {
    reference::tile_registers.dot(C, W, X);
  }
};
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated avx512_amx");
}  // namespace avx512_amx

namespace neon {
constexpr int LANES = 4, MAX_GROUPS = 6;
using Dot = reference::Smull;
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated neon");
}  // namespace neon

namespace neon_dot {
constexpr int LANES = 4, MAX_GROUPS = 6;
using Dot = reference::Sdot;
#include "emulated.inl"
constexpr KernelSet kSet = make_emulation("emulated neon_dot");
}  // namespace neon_dot

}  // namespace
}  // namespace espalier

namespace testing {

std::vector<const espalier::KernelSet*> kernel_sets_and_emulations() {
  std::vector<const espalier::KernelSet*> out = kernel_sets();
  out.insert(out.end(), {&espalier::avx2::kSet, &espalier::avx_vnni::kSet, &espalier::avx512_vnni::kSet,
                         &espalier::avx512_amx::kSet, &espalier::neon::kSet, &espalier::neon_dot::kSet});
  if (const espalier::KernelSet* amx = trapped_amx_kernels()) out.push_back(amx);
  return out;
}

}  // namespace testing
