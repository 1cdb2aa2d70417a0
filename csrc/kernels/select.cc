#include "kernels/select.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <string>

#include "base/error.h"

namespace espalier {

namespace {

const KernelSet* table(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return scalar_kernels();
    case Isa::neon:
      return neon_kernels();
    case Isa::neon_dot:
      return neon_dot_kernels();
    case Isa::avx2:
      return avx2_kernels();
    case Isa::avx_vnni:
      return avx_vnni_kernels();
    case Isa::avx512:
      return avx512_kernels();
    case Isa::avx512_vnni:
      return avx512_vnni_kernels();
    case Isa::avx512_amx:
      return avx512_amx_kernels();
  }
  return nullptr;
}

// Columns so that a chunk of the panel takes at most `bytes`, in equal chunks.
int chunk_for(int columns, int panel_width, int bytes) {
  const int widest = std::min(max_chunk(panel_width), std::max(1, bytes / (panel_width * 4)));
  const int chunks = (columns + widest - 1) / widest;
  return std::max(1, (columns + chunks - 1) / std::max(1, chunks));
}

bool multiplies_tiles(const KernelSet& k) { return k.tile_columns > kFeatureBlock; }

}  // namespace

const KernelSet& kernels_for(Isa isa) {
  const KernelSet* set = table(isa);
  if (set == nullptr) fail("this build has no kernels for " + std::string(isa_name(isa)));
  return *set;
}

std::vector<Isa> built_isas() {
  std::vector<Isa> isas;
  for (Isa isa : known_isas())
    if (table(isa) != nullptr) isas.push_back(isa);
  return isas;
}

Isa select_built(const ArchFlags& flags, std::string_view cap, std::span<const Isa> built) {
  const Isa widest = select_isa(flags, cap);
  Isa best = Isa::scalar;
  for (Isa isa : built)
    if (isa <= widest && select_isa(flags, isa_name(isa)) == isa) best = isa;
  return best;
}

Isa current_isa() {
  const char* cap = std::getenv("ESPALIER_MAX_ISA");
  return select_built(detect_arch(), cap == nullptr ? "" : cap, built_isas());
}

int max_chunk(int panel_width) { return 65535 / panel_width + 1; }

// Share of a weight from which it counts as full.
constexpr double kFull = 0.98;

std::vector<Candidate> candidates(const WeightStats& s, int lanes, int groups) {
  const int width = lanes * groups;
  const double r = groups;
  const double m = s.rows, k = s.columns;
  const double block_cycles = std::max(2.0 * r, (r + 4.0) / 2.0);
  std::vector<Candidate> found;
  const auto add = [&](WeightFormat format, int bytes) {
    const int chunk = chunk_for(s.columns, width, bytes);
    for (const Candidate& c : found)
      if (c.format == format && c.chunk == chunk) return;
    const double chunks = (s.columns + chunk - 1) / std::max(1, chunk);
    // A chunk that outgrows the L1 cache pays for its loads.
    const double spill = static_cast<double>(chunk) * width * 4 > 28.0 * 1024 ? 1.15 : 1.0;
    double cycles = 0.0;
    switch (format) {
      case WeightFormat::dense:
        cycles = block_cycles * k * m / 4.0 + 2.2 * r * m * chunks;
        break;
      case WeightFormat::unstructured:
        cycles = 1.2 * (r + 1.0) / 2.0 * spill * static_cast<double>(s.nonzeros) + 2.2 * r * m * chunks;
        break;
      case WeightFormat::block4x1:
        cycles = block_cycles * spill * static_cast<double>(s.blocks4x1) + 2.2 * r * m * chunks;
        break;
    }
    found.push_back({format, chunk, cycles});
  };
  add(WeightFormat::dense, 24 * 1024);
  // What leaves nothing out computes what dense does, and measuring them would decide by chance.
  const double units = std::ceil(m / kRowBlock);
  const bool entries = static_cast<double>(s.nonzeros) < kFull * m * k;
  const bool blocks = static_cast<double>(s.blocks4x1) < kFull * units * k;
  for (int bytes : {24 * 1024, 36 * 1024, 48 * 1024, 72 * 1024, 144 * 1024}) {
    if (entries) add(WeightFormat::unstructured, bytes);
    if (blocks) add(WeightFormat::block4x1, bytes);
  }
  std::stable_sort(found.begin(), found.end(),
                   [](const Candidate& a, const Candidate& b) { return a.cycles < b.cycles; });
  return found;
}

double block_cost8(const KernelSet& k, WeightFormat8 format) {
  if (format == WeightFormat8::dense8 && multiplies_tiles(k)) return 0.2;  // as candidates8() reckons
  return k.sums_16_bit ? 2.0 : 1.0;
}

std::vector<Candidate8> candidates8(const WeightStats8& s, const KernelSet& k) {
  const double r = k.max_groups, m = s.rows;
  const double all = m * ((s.columns + kFeatureBlock - 1) / kFeatureBlock);
  // Three instructions for two ports, or one; the load of a sparse block is not shared by several rows. A product of
  // tiles is said to take 16 cycles for 256 blocks of one group; loads will not always keep up.
  const double vectors = k.sums_16_bit ? r : 0.55 * r;
  const double dense = multiplies_tiles(k) ? 0.1 * r : vectors;
  const double sparse = std::max(k.sums_16_bit ? r : 0.8 * r, (r + 1.0) / 2.0);
  const double ends = 4.0 * r * m;
  std::vector<Candidate8> found = {{WeightFormat8::dense8, dense * all + ends},
                                   {WeightFormat8::block1x4, sparse * static_cast<double>(s.blocks) + ends}};
  if (found[1].cycles < found[0].cycles) std::swap(found[0], found[1]);
  return found;
}

}  // namespace espalier
