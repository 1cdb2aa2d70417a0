// y = act((sum_k (q - zero) w) scale_x scale_w + bias + residual), over a quantised panel.
//
// Four inputs of a token fill a lane, so four weights of a row are broadcast against vectors of tokens, as single
// weights are in linear.inl. The sum of integers is exact, so its order is free: several accumulators, blocks in any
// order. What follows in floats is the same sequence of operations for every set and width.

constexpr int kOffsetUnit = offset_unit(V::lanes);
static_assert(NB * kFeatureBlock % kOffsetUnit == 0);

#include "kernels/linear8/tiles.inl"

// -zero * (sum of the row's weights), so that the sum of q w becomes that of (q - zero) w.
template <int R>
inline void start_sums(I (&acc)[R], const PackedWeight8& w, int row, const std::uint8_t* x) {
  const float* zeros = zeros_of(x, w.columns);
  const I sum = I::splat(w.sums[row]);
  UNROLL for (int r = 0; r < R; ++r) acc[r] = I::zero() - sum * to_int(V::load(zeros + r * V::lanes));
}

// A pair of blocks at a time: summed in 16 bits where that is how the set multiplies, otherwise to two sets of
// accumulators, since a dot product takes more cycles than there are vectors in a panel.
template <int R>
inline void add_blocks(I (&acc)[R], const PackedWeight8& w, int row, const std::uint8_t* x) {
  I other[R];
  UNROLL for (int r = 0; r < R; ++r) other[r] = I::zero();
  const long begin = w.starts[row], end = w.starts[row + 1];
  const int bytes = static_cast<int>(end - begin) * 2 * kFeatureBlock;
  fetch_ahead<R>(w.blocks + begin * 2 * kFeatureBlock, bytes);
  fetch_ahead<R>(w.offsets + begin * 2, bytes / kFeatureBlock);
  for (long n = begin; n < end; ++n) {
    const std::int8_t* block = w.blocks + n * 2 * kFeatureBlock;
    const std::uint16_t* offset = w.offsets + n * 2;
    const I first = I::broadcast(block), second = I::broadcast(block + kFeatureBlock);
    const std::uint8_t *x0 = x + static_cast<long>(offset[0]) * kOffsetUnit,
                       *x1 = x + static_cast<long>(offset[1]) * kOffsetUnit;
    UNROLL for (int r = 0; r < R; ++r) {
      const I lane0 = I::load(x0 + r * V::lanes * kFeatureBlock), lane1 = I::load(x1 + r * V::lanes * kFeatureBlock);
      if constexpr (I::sums_16_bit) {
        acc[r] = dot_pair(acc[r], lane0, first, lane1, second);
      } else {
        acc[r] = dot(acc[r], lane0, first);
        other[r] = dot(other[r], lane1, second);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r) acc[r] = acc[r] + other[r];
}

// Row `row` to y, from sums that lack what the blocks add.
template <int R>
inline void finish_row(I (&acc)[R], const PackedWeight8& w, int row, const std::uint8_t* x, float* y,
                       const Epilogue& e) {
  add_blocks(acc, w, row, x);
  const float* scales = scales_of(x, w.columns);
  const V scale = V::broadcast(w.scales + row);
  const V bias = e.bias == nullptr ? V::zero() : V::broadcast(e.bias + row);
  UNROLL for (int r = 0; r < R; ++r) {
    V sum = to_float(acc[r]) * V::load(scales + r * V::lanes) * scale + bias;
    if (e.residual != nullptr) sum = sum + V::load(e.residual + static_cast<long>(row) * NB + r * V::lanes);
    sum.store(y + r * V::lanes);
  }
}

// Q neighbouring rows over all inputs. `stride`: bytes from a block of features in x to the next.
template <int R, int Q>
inline void add_dense(I (&acc)[Q][R], const PackedWeight8& w, int row, const std::uint8_t* x, int stride) {
  const int n = (w.columns + kFeatureBlock - 1) / kFeatureBlock;
  const std::int8_t* block =
      w.dense + (static_cast<long>(row / kRowBlock) * n * kRowBlock + row % kRowBlock) * kFeatureBlock;
  for (int i = 0; i < n; ++i, block += kRowBlock * kFeatureBlock, x += stride) {
    __builtin_prefetch(block + kAhead);
    I lane[R];
    UNROLL for (int r = 0; r < R; ++r) lane[r] = I::load(x + r * V::lanes * kFeatureBlock);
    UNROLL for (int q = 0; q < Q; ++q) {
      const I weights = I::broadcast(block + q * kFeatureBlock);
      UNROLL for (int r = 0; r < R; ++r) acc[q][r] = dot(acc[q][r], lane[r], weights);
    }
  }
}

// Rows [begin, end) to y, within kRowStep rows from a multiple of it.
template <int R>
inline void sparse_rows(const PackedWeight8& w, const std::uint8_t* x, int begin, int end, float* y,
                        const Epilogue& e) {
  for (int row = begin; row < end; ++row, y += NB) {
    I acc[R];
    start_sums(acc, w, row, x);
    finish_row(acc, w, row, x, y, e);
  }
}

// `features` is x, or the slice of it that holds its only group.
template <int R>
inline void dense_rows(const PackedWeight8& w, const std::uint8_t* x, const std::uint8_t* features, int begin, int end,
                       float* y, const Epilogue& e) {
  const int stride = (features == x ? NB : V::lanes) * kFeatureBlock;
  for (int row = begin; row < end; row += kDenseRows) {
    I acc[kDenseRows][R];
    UNROLL for (int q = 0; q < kDenseRows; ++q) start_sums(acc[q], w, row + q, x);
    add_dense<R, kDenseRows>(acc, w, row, features, stride);
    UNROLL for (int q = 0; q < kDenseRows; ++q, y += NB) finish_row(acc[q], w, row + q, x, y, e);
  }
}

template <int R>
inline void tile_rows(const PackedWeight8& w, const std::uint8_t* x, int begin, int end, float* y, const Epilogue& e) {
  alignas(64) std::int32_t sums[kTileRows * NB];
  for (int row = begin; row < end; ++row, y += NB) {
    const int within = row % kTileRows;
    if (row == begin || within == 0) tile_sums<R>(w, row - within, x, sums);
    I acc[R];
    start_sums(acc, w, row, x);
    UNROLL for (int r = 0; r < R; ++r) acc[r] =
        acc[r] + I::load(reinterpret_cast<const std::uint8_t*>(sums + within * NB + r * V::lanes));
    finish_row(acc, w, row, x, y, e);
  }
}

constexpr int kSliceBlocks = 1024;

template <int R>
void linear8_panel(const PackedWeight8& w, const std::uint8_t* x, float* y, int first_row, int last_row,
                   const Epilogue& e) {
  alignas(64) float unquantized[kRowStep * NB];
  std::uint8_t* bytes = reinterpret_cast<std::uint8_t*>(y);
  V scale[R], zero[R];
  fixed_parameters(e.quantization != nullptr ? *e.quantization : Quantization{}, scale, zero);
  const int rounded = (last_row + kRowBlock - 1) / kRowBlock * kRowBlock;
  take_tiles(w);
  alignas(64) std::uint8_t slice[R == 1 ? kSliceBlocks * V::lanes * kFeatureBlock : 1];
  const std::uint8_t* features = x;
  const int blocks = (w.columns + kFeatureBlock - 1) / kFeatureBlock;
  if (R == 1 && MAX_GROUPS > 1 && w.format == WeightFormat8::dense8 && !I::tiles && blocks <= kSliceBlocks)
    features = slice_of(x, blocks, slice);
  // What follows the sums happens while these rows are still in the L1 cache.
  for (int begin = first_row, end; begin < rounded; begin = end) {
    end = (begin / kRowStep + 1) * kRowStep < rounded ? (begin / kRowStep + 1) * kRowStep : rounded;
    float* out = e.quantization != nullptr ? unquantized : y + static_cast<long>(begin) * NB;
    if (w.format != WeightFormat8::dense8)
      sparse_rows<R>(w, x, begin, end, out, e);
    else if constexpr (I::tiles)
      tile_rows<R>(w, x, begin, end, out, e);
    else
      dense_rows<R>(w, x, features, begin, end, out, e);
    if (e.act != Unary::identity) unary_panel(e.act, out, out, end - begin, R);
    if (e.quantization != nullptr) quantize_rows(out, bytes + static_cast<long>(begin) * NB, end - begin, scale, zero);
  }
  release_tiles(w);
  if (e.quantization != nullptr && last_row == w.rows) store_parameters(bytes, w.rows, scale, zero);
}

template <int R = MAX_GROUPS>
void linear8(const PackedWeight8& w, const std::uint8_t* x, float* y, int groups, int first_row, int last_row,
             const Epilogue& e) {
  if (groups == R) return linear8_panel<R>(w, x, y, first_row, last_row, e);
  if constexpr (R > 1) linear8<R - 1>(w, x, y, groups, first_row, last_row, e);
}
