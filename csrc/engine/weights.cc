#include "engine/weights.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <string>
#include <vector>

#include "base/error.h"

namespace espalier {

namespace {

// Calls visit(row, values of that row) for every row, reading memory in the order it lies in.
template <class Visit>
void for_each_row(const DenseView& view, Visit visit) {
  if (view.column_stride == 1) {
    for (int m = 0; m < view.rows; ++m) visit(m, view.data + m * view.row_stride);
    return;
  }
  // A transposed view: gather a band of rows at a time, so that each cache line is read once per band.
  constexpr int kBand = 64;
  std::vector<float> band(static_cast<std::size_t>(kBand) * static_cast<std::size_t>(view.columns));
  for (int first = 0; first < view.rows; first += kBand) {
    const int count = std::min(kBand, view.rows - first);
    for (int k = 0; k < view.columns; ++k) {
      const float* source = view.data + k * view.column_stride + first * view.row_stride;
      for (int i = 0; i < count; ++i)
        band[static_cast<std::size_t>(i) * static_cast<std::size_t>(view.columns) + static_cast<std::size_t>(k)] =
            source[i * view.row_stride];
    }
    for (int i = 0; i < count; ++i)
      visit(first + i, band.data() + static_cast<std::size_t>(i) * static_cast<std::size_t>(view.columns));
  }
}

int round_up(int n, int step) { return (n + step - 1) / step * step; }

}  // namespace

SparseMatrix compress(const DenseView& view) {
  if (view.columns > kMaxColumns)
    fail("a weight has " + std::to_string(view.columns) + " columns; the engine takes at most " +
         std::to_string(kMaxColumns));
  SparseMatrix out;
  out.rows = view.rows;
  out.columns = view.columns;
  out.starts.resize(static_cast<std::size_t>(view.rows) + 1);
  out.starts[0] = 0;
  std::vector<std::uint16_t> indices;
  std::vector<float> values;
  for_each_row(view, [&](int m, const float* row) {
    const std::size_t before = values.size();
    indices.resize(before + static_cast<std::size_t>(view.columns));
    values.resize(before + static_cast<std::size_t>(view.columns));
    std::size_t n = before;
    for (int k = 0; k < view.columns; ++k) {  // branch-free: a zero is overwritten by the next entry
      indices[n] = static_cast<std::uint16_t>(k);
      values[n] = row[k];
      n += !(row[k] == 0.0f);
    }
    if (n > UINT32_MAX) fail("a weight has more than 2^32 nonzeros");
    indices.resize(n);
    values.resize(n);
    out.starts[static_cast<std::size_t>(m) + 1] = static_cast<std::uint32_t>(n);
  });
  out.indices.resize(indices.size());
  out.values.resize(values.size());
  std::copy(indices.begin(), indices.end(), out.indices.data());
  std::copy(values.begin(), values.end(), out.values.data());
  return out;
}

SparseMatrix decode(const EncodedMatrix& e) {
  require(
      e.rows > 0 && e.columns > 0 && e.columns <= kMaxColumns && e.counts.size() == static_cast<std::size_t>(e.rows),
      "encoded weight: impossible shape");
  const std::size_t n = e.low.size();
  require(e.middle.size() == n && e.top.size() == n && n <= UINT32_MAX,
          "encoded weight: the values' bytes differ in number");
  SparseMatrix out;
  out.rows = e.rows;
  out.columns = e.columns;
  out.starts.resize(static_cast<std::size_t>(e.rows) + 1);
  out.indices.resize(n);
  out.values.resize(n);
  out.starts[0] = 0;
  std::size_t gap = 0, at = 0;
  for (std::size_t m = 0; m < e.counts.size(); ++m) {
    int column = -1;
    require(e.counts[m] <= n - at, "encoded weight: more nonzeros counted than stored");
    for (const std::size_t end = at + e.counts[m]; at < end; ++at) {
      for (;; ++gap) {
        require(gap < e.gaps.size() && column < e.columns, "encoded weight: a row runs past its end");
        if (e.gaps[gap] != 255) break;
        column += 255;
      }
      column += e.gaps[gap++] + 1;
      require(column < e.columns, "encoded weight: a column index is out of range");
      out.indices[at] = static_cast<std::uint16_t>(column);
      out.values[at] =
          std::bit_cast<float>(static_cast<std::uint32_t>(e.low[at]) | static_cast<std::uint32_t>(e.middle[at]) << 16 |
                               static_cast<std::uint32_t>(e.top[at]) << 24);
    }
    out.starts[m + 1] = static_cast<std::uint32_t>(at);
  }
  require(at == n && gap == e.gaps.size(), "encoded weight: nonzeros are left over");
  return out;
}

void check(const SparseMatrix& s) {
  require(s.rows >= 0 && s.columns >= 0 && s.columns <= kMaxColumns, "sparse weight: impossible shape");
  require(s.starts.size() == static_cast<std::size_t>(s.rows) + 1 && s.starts[0] == 0,
          "sparse weight: row starts do not fit the rows");
  for (int m = 0; m < s.rows; ++m) {
    const std::uint32_t begin = s.starts[static_cast<std::size_t>(m)], end = s.starts[static_cast<std::size_t>(m) + 1];
    require(begin <= end && end <= s.values.size() && end <= s.indices.size(),
            "sparse weight: row starts are not ascending");
    for (std::uint32_t i = begin; i < end; ++i) {
      require(s.indices[i] < s.columns, "sparse weight: a column index is out of range");
      require(i == begin || s.indices[i - 1] < s.indices[i], "sparse weight: column indices are not ascending");
    }
  }
}

WeightStats stats(const SparseMatrix& s) {
  WeightStats out{s.rows, s.columns, s.nonzeros(), 0};
  std::vector<std::int32_t> seen(static_cast<std::size_t>(s.columns), -1);
  for (int m = 0; m < s.rows; ++m) {
    for (std::uint32_t i = s.starts[static_cast<std::size_t>(m)]; i < s.starts[static_cast<std::size_t>(m) + 1]; ++i) {
      std::int32_t& unit = seen[s.indices[i]];
      out.blocks4x1 += unit != m / kRowBlock;
      unit = m / kRowBlock;
    }
  }
  return out;
}

Weight::Weight(const SparseMatrix& matrix, WeightFormat format, int chunk, int panel_width)
    : nonzeros_(matrix.nonzeros()) {
  require(chunk > 0 && chunk <= max_chunk(panel_width), "weight chunk out of range");
  packed_.format = format;
  packed_.rows = matrix.rows;
  packed_.columns = matrix.columns;
  packed_.chunk = chunk;
  packed_.chunks = std::max(1, (matrix.columns + chunk - 1) / chunk);
  switch (format) {
    case WeightFormat::dense:
      pack_dense(matrix);
      break;
    case WeightFormat::unstructured:
      pack_unstructured(matrix, panel_width);
      break;
    case WeightFormat::block4x1:
      pack_blocks(matrix, panel_width);
      break;
  }
  packed_.values = values_.data();
  packed_.offsets = offsets_.data();
  packed_.starts = starts_.data();
}

void Weight::pack_dense(const SparseMatrix& s) {
  packed_.units = round_up(s.rows, kRowBlock) / kRowBlock;
  values_.resize(static_cast<std::size_t>(packed_.units) * kRowBlock * static_cast<std::size_t>(s.columns));
  values_.zero();
  std::vector<std::uint32_t> next(s.starts.data(), s.starts.data() + s.rows);
  float* chunk = values_.data();
  for (int c = 0; c < packed_.chunks; ++c) {
    const int first = c * packed_.chunk, last = std::min(s.columns, first + packed_.chunk);
    const std::size_t width = static_cast<std::size_t>(last - first) * kRowBlock;
    for (int m = 0; m < s.rows; ++m) {
      float* quad = chunk + static_cast<std::size_t>(m / kRowBlock) * width + m % kRowBlock;
      std::uint32_t& i = next[static_cast<std::size_t>(m)];
      for (; i < s.starts[static_cast<std::size_t>(m) + 1] && s.indices[i] < last; ++i)
        quad[(s.indices[i] - first) * kRowBlock] = s.values[i];
    }
    chunk += static_cast<std::size_t>(packed_.units) * width;
  }
}

void Weight::pack_unstructured(const SparseMatrix& s, int panel_width) {
  packed_.units = s.rows;
  const std::size_t n = static_cast<std::size_t>(s.nonzeros());
  values_.resize(n);
  offsets_.resize(n);
  starts_.resize(static_cast<std::size_t>(packed_.chunks) * (static_cast<std::size_t>(s.rows) + 1));
  std::vector<std::uint32_t> next(s.starts.data(), s.starts.data() + s.rows);
  std::uint32_t at = 0;
  for (int c = 0; c < packed_.chunks; ++c) {
    const int first = c * packed_.chunk, last = std::min(s.columns, first + packed_.chunk);
    std::uint32_t* starts = starts_.data() + static_cast<std::size_t>(c) * (static_cast<std::size_t>(s.rows) + 1);
    for (int m = 0; m < s.rows; ++m) {
      starts[m] = at;
      std::uint32_t& i = next[static_cast<std::size_t>(m)];
      for (; i < s.starts[static_cast<std::size_t>(m) + 1] && s.indices[i] < last; ++i, ++at) {
        values_[at] = s.values[i];
        offsets_[at] = static_cast<std::uint16_t>((s.indices[i] - first) * panel_width);
      }
    }
    starts[s.rows] = at;
  }
}

void Weight::pack_blocks(const SparseMatrix& s, int panel_width) {
  packed_.units = round_up(s.rows, kRowBlock) / kRowBlock;
  const std::size_t blocks = static_cast<std::size_t>(stats(s).blocks4x1);
  values_.resize(blocks * kRowBlock);
  values_.zero();
  offsets_.resize(blocks);
  starts_.resize(static_cast<std::size_t>(packed_.chunks) * (static_cast<std::size_t>(packed_.units) + 1));
  std::vector<std::uint32_t> next(s.starts.data(), s.starts.data() + s.rows);
  std::uint32_t at = 0;
  for (int c = 0; c < packed_.chunks; ++c) {
    const int first = c * packed_.chunk, last = std::min(s.columns, first + packed_.chunk);
    std::uint32_t* starts =
        starts_.data() + static_cast<std::size_t>(c) * (static_cast<std::size_t>(packed_.units) + 1);
    for (int u = 0; u < packed_.units; ++u) {
      starts[u] = at;
      const int rows = std::min(kRowBlock, s.rows - u * kRowBlock);
      for (;;) {  // merge the rows' ascending columns
        int column = last;
        for (int q = 0; q < rows; ++q) {
          const std::size_t m = static_cast<std::size_t>(u * kRowBlock + q);
          if (next[m] < s.starts[m + 1]) column = std::min<int>(column, s.indices[next[m]]);
        }
        if (column >= last) break;
        offsets_[at] = static_cast<std::uint16_t>((column - first) * panel_width);
        for (int q = 0; q < rows; ++q) {
          const std::size_t m = static_cast<std::size_t>(u * kRowBlock + q);
          if (next[m] < s.starts[m + 1] && s.indices[next[m]] == column)
            values_[static_cast<std::size_t>(at) * kRowBlock + static_cast<std::size_t>(q)] = s.values[next[m]++];
        }
        ++at;
      }
    }
    starts[packed_.units] = at;
  }
}

double time_linear(const KernelSet& kernels, const Weight& weight) {
  const PackedWeight& w = weight.packed();
  const std::size_t nb = static_cast<std::size_t>(kernels.lanes) * static_cast<std::size_t>(kernels.max_groups);
  const std::size_t rows = (static_cast<std::size_t>(w.rows) + kRowBlock - 1) / kRowBlock * kRowBlock;
  Buffer<float> x(static_cast<std::size_t>(w.columns) * nb), y(rows * nb);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 17) * 0.0625f - 0.5f;
  double best = 1e30;
  for (int repeat = 0; repeat < 5; ++repeat) {
    const auto start = std::chrono::steady_clock::now();
    kernels.linear(w, x.data(), y.data(), kernels.max_groups, 0, w.rows, {});
    best = std::min(best, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return best;
}

}  // namespace espalier
