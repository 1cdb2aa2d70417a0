// Every kernel over the vector types V (floats) and I (integers of 32 bits), and the table that holds them. An ISA file
// defines them and MAX_GROUPS, includes this inside its anonymous namespace, and exports the table.

// Loops over registers: arrays of vectors stay in memory unless these are unrolled before anything else happens.
#define UNROLL _Pragma("GCC unroll 16")

constexpr int NB = V::lanes * MAX_GROUPS;

#include "kernels/activation/activation.inl"
#include "kernels/norm/norm.inl"
#include "kernels/layout/layout.inl"
#include "kernels/linear/reading.inl"
#include "kernels/linear/linear.inl"
#include "kernels/quantize/quantize.inl"
#include "kernels/linear8/linear8.inl"
#include "kernels/attention/attention.inl"

constexpr KernelSet make_kernel_set(const char* name) {
  KernelSet set{};
  set.name = name;
  set.lanes = V::lanes;
  set.max_groups = MAX_GROUPS;
  set.sums_16_bit = I::sums_16_bit;
  set.signed_bytes = I::signed_bytes;
  set.tile_rows = kTileRows;
  set.tile_columns = kTileColumns;
  set.linear = &linear<MAX_GROUPS>;
  set.linear8 = &linear8<MAX_GROUPS>;
  set.quantize = &quantize_panel<MAX_GROUPS>;
  set.dequantize = &dequantize_panel;
  set.add8 = &add8_panel<MAX_GROUPS>;
  set.max8 = &max8_panel;
  set.layer_norm = &layer_norm_panel<MAX_GROUPS>;
  set.unary = &unary_panel;
  set.binary = &binary_panel;
  set.softmax = &softmax_panel;
  set.l2_normalize = &l2_normalize_panel;
  set.attention = &attention;
  set.attention_scratch = &attention_scratch_floats;
  set.transpose_in = &transpose_in_panel;
  set.copy_lanes = &copy_lanes;
  return set;
}
