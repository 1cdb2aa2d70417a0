// Weights: compression, packing, sharing out of rows, and decoding of what may be corrupt.
#include <algorithm>
#include <bit>

#include "base/error.h"
#include "support.h"

using namespace testing;
using espalier::KernelSet;
using espalier::SparseMatrix;
using espalier::Weight;
using espalier::WeightFormat;

namespace {

constexpr WeightFormat kFormats[] = {WeightFormat::dense, WeightFormat::unstructured, WeightFormat::block4x1};

std::vector<float> dense(const SparseMatrix& s) {
  std::vector<float> out(static_cast<std::size_t>(s.rows) * static_cast<std::size_t>(s.columns));
  for (int m = 0; m < s.rows; ++m)
    for (std::uint32_t i = s.starts[static_cast<std::size_t>(m)]; i < s.starts[static_cast<std::size_t>(m) + 1]; ++i)
      out[static_cast<std::size_t>(m) * static_cast<std::size_t>(s.columns) + s.indices[i]] = s.values[i];
  return out;
}

struct Encoded {
  std::vector<std::uint32_t> counts;
  std::vector<std::uint8_t> gaps;
  std::vector<std::uint16_t> low;
  std::vector<std::uint8_t> middle, top;
  SparseMatrix decode(int rows, int columns) const {
    return espalier::decode({rows, columns, counts, gaps, low, middle, top});
  }
};

Encoded encode(const SparseMatrix& s) {
  Encoded e;
  for (int m = 0; m < s.rows; ++m) {
    const std::uint32_t begin = s.starts[static_cast<std::size_t>(m)], end = s.starts[static_cast<std::size_t>(m) + 1];
    e.counts.push_back(end - begin);
    int last = -1;
    for (std::uint32_t i = begin; i < end; ++i) {
      int gap = s.indices[i] - last - 1;
      for (; gap >= 255; gap -= 255) e.gaps.push_back(255);
      e.gaps.push_back(static_cast<std::uint8_t>(gap));
      last = s.indices[i];
      const auto bits = std::bit_cast<std::uint32_t>(s.values[i]);
      e.low.push_back(static_cast<std::uint16_t>(bits));
      e.middle.push_back(static_cast<std::uint8_t>(bits >> 16));
      e.top.push_back(static_cast<std::uint8_t>(bits >> 24));
    }
  }
  return e;
}

}  // namespace

TEST(compress_keeps_every_bit_whatever_the_strides) {
  Random random(40);
  for (int rows : {1, 3, 64, 65, 130}) {
    for (int columns : {1, 5, 300}) {
      std::vector<float> w = random_weight(random, rows, columns, 0.6, 1);
      w[0] = kNan;
      if (w.size() > 2) w[1] = -0.0f, w[2] = 1e-45f;
      std::vector<float> transposed(w.size());
      for (int m = 0; m < rows; ++m)
        for (int k = 0; k < columns; ++k)
          transposed[static_cast<std::size_t>(k * rows + m)] = w[static_cast<std::size_t>(m * columns + k)];
      const SparseMatrix a = espalier::compress({w.data(), rows, columns, columns, 1}),
                         b = espalier::compress({transposed.data(), rows, columns, 1, rows});
      espalier::check(a);
      espalier::check(b);
      const std::vector<float> back = dense(a), again = dense(b);
      for (std::size_t i = 0; i < w.size(); ++i) {
        const auto want = std::bit_cast<std::uint32_t>(w[i] == 0.0f ? 0.0f : w[i]);
        CHECK(std::bit_cast<std::uint32_t>(back[i]) == want && std::bit_cast<std::uint32_t>(again[i]) == want);
      }
    }
  }
  const std::vector<float> wide(65537, 1.0f);
  CHECK(espalier::compress({wide.data(), 1, 65536, 65536, 1}).nonzeros() == 65536);
  CHECK_THROWS(espalier::compress({wide.data(), 1, 65537, 65537, 1}), "at most 65536");
}

// A packed weight times the unit vectors gives the matrix back, exactly.
TEST(packing_and_multiplying_by_identity_gives_the_matrix_back) {
  Random random(41);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int rows : {1, 4, 6, 35}) {
      for (int columns : {1, 3, 50, 123}) {
        for (double sparsity : {0.0, 0.8, 1.0}) {
          const std::vector<float> w = random_weight(random, rows, columns, sparsity, 1);
          const SparseMatrix s = espalier::compress({w.data(), rows, columns, columns, 1});
          for (WeightFormat format : kFormats) {
            for (int chunk : {1, 7, 50, espalier::max_chunk(nb)}) {
              const Weight weight(s, format, chunk, nb);
              for (int first = 0; first < columns; first += nb) {
                std::vector<float> x(static_cast<std::size_t>(columns * nb)),
                    y(round_rows(rows) * static_cast<std::size_t>(nb));
                for (int lane = 0; lane < nb && first + lane < columns; ++lane)
                  x[static_cast<std::size_t>((first + lane) * nb + lane)] = 1.0f;
                k->linear(weight.packed(), x.data(), y.data(), k->max_groups, 0, rows, {});
                bool same = true;
                for (int m = 0; m < rows; ++m)
                  for (int lane = 0; lane < nb && first + lane < columns; ++lane)
                    same = same && y[static_cast<std::size_t>(m * nb + lane)] ==
                                       w[static_cast<std::size_t>(m * columns + first + lane)];
                CHECK(same, k->name, " ", rows, "x", columns, " format ", static_cast<int>(format), " chunk ", chunk);
              }
            }
          }
        }
      }
    }
  }
}

// Offsets are 16 bits wide: the last column of the widest chunk must still be reached.
TEST(widest_chunk) {
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, columns = espalier::max_chunk(nb) + 3;
    std::vector<float> w(static_cast<std::size_t>(columns) * 5);
    for (int m = 0; m < 5; ++m)
      for (int c : {0, columns - 5, columns - 4, columns - 1})
        w[static_cast<std::size_t>(m * columns + c)] = static_cast<float>(m + c);
    const SparseMatrix s = espalier::compress({w.data(), 5, columns, columns, 1});
    std::vector<float> x(static_cast<std::size_t>(columns) * static_cast<std::size_t>(nb), 0.5f);
    for (WeightFormat format : kFormats) {
      const Weight weight(s, format, espalier::max_chunk(nb), nb);
      std::vector<float> y(round_rows(5) * static_cast<std::size_t>(nb));
      k->linear(weight.packed(), x.data(), y.data(), k->max_groups, 0, 5, {});
      for (int m = 0; m < 5; ++m)
        CHECK(y[static_cast<std::size_t>(m * nb)] == 0.5f * static_cast<float>(4 * m + 3 * columns - 10), k->name);
    }
    CHECK_THROWS(Weight(s, WeightFormat::unstructured, espalier::max_chunk(nb) + 1, nb), "chunk");
    CHECK_THROWS(Weight(s, WeightFormat::dense, 0, nb), "chunk");
  }
}

TEST(decode_undoes_encoding) {
  Random random(43);
  for (int columns : {1, 254, 255, 256, 257, 700, 65536}) {
    for (double sparsity : {0.0, 0.5, 0.999}) {
      std::vector<float> w = random_weight(random, 7, columns, sparsity, 1);
      std::fill_n(w.begin() + columns, columns, 0.0f);
      w[w.size() - 1] = kNan;
      const SparseMatrix s = espalier::compress({w.data(), 7, columns, columns, 1});
      const SparseMatrix back = encode(s).decode(7, columns);
      espalier::check(back);
      bool same =
          back.nonzeros() == s.nonzeros() && std::equal(s.starts.data(), s.starts.data() + 8, back.starts.data());
      for (std::size_t i = 0; same && i < s.values.size(); ++i)
        same = s.indices[i] == back.indices[i] &&
               std::bit_cast<std::uint32_t>(s.values[i]) == std::bit_cast<std::uint32_t>(back.values[i]);
      CHECK(same, "columns ", columns, " sparsity ", sparsity);
    }
  }
}

// Whatever the bytes, decoding throws Error or gives a matrix that check() accepts.
TEST(decode_survives_corruption) {
  Random random(44);
  int refused = 0, accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    int rows = 1 + random.below(6), columns = 1 + random.below(600);
    const std::vector<float> w = random_weight(random, rows, columns, 0.8, 1);
    Encoded e = encode(espalier::compress({w.data(), rows, columns, columns, 1}));
    for (int change = random.below(3); change >= 0; --change) {
      const auto spoil = [&](auto& v) {
        using T = typename std::remove_reference_t<decltype(v)>::value_type;
        if (v.empty() || random.below(3) == 0)
          return v.resize(static_cast<std::size_t>(random.below(50)), static_cast<T>(random.bits()));
        v[static_cast<std::size_t>(random.below(static_cast<int>(v.size())))] =
            static_cast<T>(random.below(2) ? ~T{0} : static_cast<T>(random.bits()));
      };
      switch (random.below(7)) {
        case 0:
          spoil(e.counts);
          break;
        case 1:
          spoil(e.gaps);
          break;
        case 2:
          spoil(e.low);
          break;
        case 3:
          spoil(e.middle);
          break;
        case 4:
          spoil(e.top);
          break;
        case 5:
          rows = random.below(9) - 1;
          break;
        case 6:
          columns = random.below(3) ? random.below(600) - 1 : random.below(200000);
          break;
      }
    }
    try {
      espalier::check(e.decode(rows, columns));
      ++accepted;
    } catch (const espalier::Error&) {
      ++refused;
    }
  }
  CHECK(refused > 1000 && accepted > 100, "refused ", refused, ", accepted ", accepted);
}

TEST(check_refuses_what_is_out_of_order) {
  const auto make = [](std::vector<std::uint32_t> starts, std::vector<std::uint16_t> indices, int columns) {
    SparseMatrix s;
    s.rows = 2, s.columns = columns;
    s.starts.resize(starts.size()), s.indices.resize(indices.size()), s.values.resize(indices.size());
    std::copy(starts.begin(), starts.end(), s.starts.data());
    std::copy(indices.begin(), indices.end(), s.indices.data());
    std::fill_n(s.values.data(), indices.size(), 1.0f);
    espalier::check(s);
  };
  make({0, 1, 3}, {2, 0, 1}, 3);
  CHECK_THROWS(make({0, 2, 1}, {0, 1, 2}, 3), "ascending");
  CHECK_THROWS(make({1, 2, 3}, {0, 1, 2}, 3), "row starts");
  CHECK_THROWS(make({0, 1}, {0}, 3), "row starts");
  CHECK_THROWS(make({0, 1, 9}, {0, 1, 2}, 3), "ascending");
  CHECK_THROWS(make({0, 1, 2}, {0, 3}, 3), "out of range");
  CHECK_THROWS(make({0, 2, 2}, {1, 1}, 3), "ascending");
}
