// From an instruction set to its kernels, and from a layer's shape and zeros to candidate formats. Pure functions.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "base/arch.h"
#include "kernels/kernel_set.h"

namespace espalier {

// The kernels for `isa`; throws Error when this build does not contain them.
const KernelSet& kernels_for(Isa isa);

// Instruction sets compiled into this build, narrowest first.
std::vector<Isa> built_isas();

// Widest of `built` that `flags` allow and `cap` permits, as select_isa().
Isa select_built(const ArchFlags& flags, std::string_view cap, std::span<const Isa> built);

// The same for this processor, this build and the environment variable ESPALIER_MAX_ISA.
Isa current_isa();

struct WeightStats {
  int rows = 0;
  int columns = 0;
  std::int64_t nonzeros = 0;
  std::int64_t blocks4x1 = 0;  // 4x1 blocks holding at least one nonzero
};

struct Candidate {
  WeightFormat format = WeightFormat::dense;
  int chunk = 0;        // columns per chunk
  double cycles = 0.0;  // estimated, for one full panel
};

// Formats worth measuring, cheapest estimate first. The estimate is a model of loads and multiply-adds per entry:
// unstructured 1.2 (R + 1) / 2 per nonzero and 2.2 R per row and chunk; blocks max(2 R, (R + 4) / 2) per four entries.
std::vector<Candidate> candidates(const WeightStats& stats, int lanes, int groups);

struct WeightStats8 {
  int rows = 0;
  int columns = 0;
  std::int64_t blocks = 0;  // 1x4 blocks holding at least one nonzero
};

struct Candidate8 {
  WeightFormat8 format = WeightFormat8::dense8;
  double cycles = 0.0;  // estimated, for one full panel; comparable with Candidate's
};

// The same for weights of integers, from the constants of `kernels` alone.
std::vector<Candidate8> candidates8(const WeightStats8& stats, const KernelSet& kernels);

// Multiply-adds of a dense float32 layer that take as long as a block of 1 output x 4 inputs.
double block_cost8(const KernelSet& kernels, WeightFormat8 format);

// Widest chunk whose offsets, in floats, fit in 16 bits.
int max_chunk(int panel_width);

}  // namespace espalier
