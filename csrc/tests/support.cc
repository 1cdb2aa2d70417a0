#include "support.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/error.h"

namespace testing {

std::vector<const espalier::KernelSet*> kernel_sets() {
  std::vector<const espalier::KernelSet*> out;
  const espalier::ArchFlags flags = espalier::detect_arch();
  for (espalier::Isa isa : espalier::built_isas())
    if (espalier::select_isa(flags, espalier::isa_name(isa)) == isa) out.push_back(&espalier::kernels_for(isa));
  return out;
}

std::vector<LayerShape> layer_shapes() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(ESPALIER_SHAPES))
    if (entry.path().extension() == ".txt") files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  std::vector<LayerShape> shapes;
  for (const auto& file : files) {
    std::ifstream in(file);
    for (std::string line; std::getline(in, line);) {
      std::istringstream words(line.substr(0, line.find('#')));
      LayerShape s;
      if (!(words >> s.name)) continue;
      if (!(words >> s.rows >> s.columns >> s.sparsity >> s.pattern))
        espalier::fail(file.string() + ": expected 'name rows columns sparsity pattern', got '" + line + "'");
      shapes.push_back(s);
    }
  }
  if (shapes.empty()) espalier::fail("no layer shapes in " ESPALIER_SHAPES);
  return shapes;
}

std::vector<float> random_weight(Random& random, int rows, int columns, double sparsity, int pattern) {
  std::vector<float> w(static_cast<std::size_t>(rows) * static_cast<std::size_t>(columns));
  for (int first = 0; first < rows; first += pattern) {
    for (int k = 0; k < columns; ++k) {
      if (random.unit() < sparsity) continue;
      for (int m = first; m < std::min(rows, first + pattern); ++m)
        w[static_cast<std::size_t>(m) * static_cast<std::size_t>(columns) + static_cast<std::size_t>(k)] =
            random.normal() + 1e-6f;
    }
  }
  return w;
}

espalier::reference::Quantized unpack(const espalier::KernelSet& k, const std::uint8_t* panel, int features,
                                      int lanes) {
  const std::size_t nb = static_cast<std::size_t>(k.lanes * k.max_groups), n = static_cast<std::size_t>(lanes);
  const std::uint8_t* end = panel + round_rows(features) * nb;
  espalier::reference::Quantized out;
  for (std::size_t f = 0; f < static_cast<std::size_t>(features); ++f)
    for (std::size_t lane = 0; lane < n; ++lane)
      out.q.push_back(panel[(f / 4 * nb + lane) * 4 + f % 4] ^ (k.signed_bytes ? 128 : 0));
  out.scale.resize(n), out.zero.resize(n);
  std::memcpy(out.scale.data(), end, n * sizeof(float));
  std::memcpy(out.zero.data(), end + nb * sizeof(float), n * sizeof(float));
  for (float& z : out.zero) z += k.signed_bytes ? 128.0f : 0.0f;
  return out;
}

void compare(const char* where, const float* panel, int width, int lanes, int first, int last,
             const espalier::reference::Result& want) {
  for (int f = first; f < last; ++f) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::size_t i =
          static_cast<std::size_t>(f) * static_cast<std::size_t>(lanes) + static_cast<std::size_t>(lane);
      const double got =
          panel[static_cast<std::size_t>(f) * static_cast<std::size_t>(width) + static_cast<std::size_t>(lane)];
      CHECK(agrees(got, want.value[i], want.bound[i]), where, ": feature ", f, " lane ", lane, ": got ", got,
            ", expected ", want.value[i], " within ", want.bound[i]);
    }
  }
}

}  // namespace testing

int main(int argc, char** argv) { return testing::run(argc, argv); }
