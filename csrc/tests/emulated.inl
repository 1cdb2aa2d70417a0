// The 8 bit kernels over arrays of LANES, with Dot as their dot product; included once per emulation, each time in
// another namespace. The other kernels would take long to compile and say nothing new.

#define UNROLL _Pragma("GCC unroll 16")

#include "kernels/vec/scalar.h"

constexpr int NB = V::lanes * MAX_GROUPS;

#include "kernels/activation/activation.inl"
#include "kernels/quantize/quantize.inl"
#include "kernels/linear/reading.inl"
#include "kernels/linear8/linear8.inl"

constexpr KernelSet make_emulation(const char* name) {
  KernelSet set{};
  set.name = name;
  set.lanes = V::lanes;
  set.max_groups = MAX_GROUPS;
  set.sums_16_bit = I::sums_16_bit;
  set.signed_bytes = I::signed_bytes;
  set.tile_rows = kTileRows;
  set.tile_columns = kTileColumns;
  set.linear8 = &linear8<MAX_GROUPS>;
  set.quantize = &quantize_panel<MAX_GROUPS>;
  set.dequantize = &dequantize_panel;
  set.add8 = &add8_panel<MAX_GROUPS>;
  set.max8 = &max8_panel;
  return set;
}
