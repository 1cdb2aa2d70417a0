// y = act(W x + bias + residual), for W dense, unstructured or 4x1.
//
// R is the number of groups in the panel. A weight is broadcast against R vectors of tokens. Columns are taken in
// chunks whose slice of the panel stays in the L1 cache; between chunks the partial sums rest in y.

template <int R>
inline void start_row(V (&acc)[R], bool first, const float* y, const Epilogue& e, int row) {
  if (!first) {
    UNROLL for (int r = 0; r < R; ++r) acc[r] = V::load(y + static_cast<long>(row) * NB + r * V::lanes);
    return;
  }
  const V bias = e.bias == nullptr ? V::zero() : V::broadcast(e.bias + row);
  UNROLL for (int r = 0; r < R; ++r) acc[r] =
      e.residual == nullptr ? bias : bias + V::load(e.residual + static_cast<long>(row) * NB + r * V::lanes);
}

template <int R>
inline void store_row(const V (&acc)[R], float* y, int row) {
  UNROLL for (int r = 0; r < R; ++r) acc[r].store(y + static_cast<long>(row) * NB + r * V::lanes);
}

// A multiply-add takes four cycles or so: where a panel has fewer vectors than that, entries alternate between two sets
// of accumulators, so that consecutive ones do not wait for each other. Narrow panels do as full ones: the order of the
// sum must not depend on the width.
template <int R>
inline void unstructured_row(const PackedWeight& w, int c, int row, const float* x, float* y, const Epilogue& e) {
  constexpr int kSets = MAX_GROUPS >= 4 ? 1 : 2;
  const std::uint32_t* starts = w.starts + static_cast<long>(c) * (w.units + 1);
  const float* value = w.values + starts[row];
  const std::uint16_t* offset = w.offsets + starts[row];
  const int n = static_cast<int>(starts[row + 1] - starts[row]);
  fetch_ahead<R>(value, n);
  fetch_ahead<R>(offset, n);
  V acc[kSets][R];
  start_row<R>(acc[0], c == 0, y, e, row);
  if constexpr (kSets == 2) UNROLL for (int r = 0; r < R; ++r) acc[1][r] = V::zero();
  int i = 0;
  for (; i + kSets <= n; i += kSets) {
    UNROLL for (int set = 0; set < kSets; ++set) {
      const V weight = V::broadcast(value + i + set);
      const float* xi = x + offset[i + set];
      UNROLL for (int r = 0; r < R; ++r) acc[set][r] = fma(weight, V::load(xi + r * V::lanes), acc[set][r]);
    }
  }
  if constexpr (kSets == 2) {
    if (i < n) {
      const V weight = V::broadcast(value + i);
      const float* xi = x + offset[i];
      UNROLL for (int r = 0; r < R; ++r) acc[0][r] = fma(weight, V::load(xi + r * V::lanes), acc[0][r]);
    }
    UNROLL for (int r = 0; r < R; ++r) acc[0][r] = acc[0][r] + acc[1][r];
  }
  store_row<R>(acc[0], y, row);
}

template <int R>
inline void block4x1_rows(const PackedWeight& w, int c, int row, const float* x, float* y, const Epilogue& e) {
  const std::uint32_t* starts = w.starts + static_cast<long>(c) * (w.units + 1) + row / kRowBlock;
  const float* value = w.values + static_cast<long>(starts[0]) * kRowBlock;
  const std::uint16_t* offset = w.offsets + starts[0];
  const int n = static_cast<int>(starts[1] - starts[0]);
  fetch_ahead<R>(value, n * kRowBlock);
  fetch_ahead<R>(offset, n);
  V acc[kRowBlock][R];
  UNROLL for (int q = 0; q < kRowBlock; ++q) start_row<R>(acc[q], c == 0, y, e, row + q);
  for (int i = 0; i < n; ++i, value += kRowBlock) {
    const float* xi = x + offset[i];
    V lane[R];
    UNROLL for (int r = 0; r < R; ++r) lane[r] = V::load(xi + r * V::lanes);
    UNROLL for (int q = 0; q < kRowBlock; ++q) {
      const V wq = V::broadcast(value + q);
      UNROLL for (int r = 0; r < R; ++r) acc[q][r] = fma(wq, lane[r], acc[q][r]);
    }
  }
  UNROLL for (int q = 0; q < kRowBlock; ++q) store_row<R>(acc[q], y, row + q);
}

// `stride`: floats from a feature in x to the next.
template <int R>
inline void dense_rows(const PackedWeight& w, int c, int row, const float* x, int stride, float* y, const Epilogue& e) {
  const int first = c * w.chunk;
  const int n = w.columns - first < w.chunk ? w.columns - first : w.chunk;
  const float* value = w.values + static_cast<long>(first) * w.units * kRowBlock + static_cast<long>(row) * n;
  V acc[kRowBlock][R];
  UNROLL for (int q = 0; q < kRowBlock; ++q) start_row<R>(acc[q], c == 0, y, e, row + q);
  for (int i = 0; i < n; ++i, value += kRowBlock, x += stride) {
    __builtin_prefetch(value + kAhead / sizeof(float));
    V lane[R];
    UNROLL for (int r = 0; r < R; ++r) lane[r] = V::load(x + r * V::lanes);
    UNROLL for (int q = 0; q < kRowBlock; ++q) {
      const V wq = V::broadcast(value + q);
      UNROLL for (int r = 0; r < R; ++r) acc[q][r] = fma(wq, lane[r], acc[q][r]);
    }
  }
  UNROLL for (int q = 0; q < kRowBlock; ++q) store_row<R>(acc[q], y, row + q);
}

constexpr int kSliceColumns = 256;

template <int R>
void linear_panel(const PackedWeight& w, const float* x, float* y, int first_row, int last_row, const Epilogue& e) {
  constexpr int kActRows = 32;  // the activation follows while these rows are still in the L1 cache
  alignas(64) float slice[R == 1 ? kSliceColumns * V::lanes : 1];
  const bool sliced = R == 1 && MAX_GROUPS > 1 && w.format == WeightFormat::dense && w.chunk <= kSliceColumns;
  const int stride = sliced ? V::lanes : NB;
  for (int c = 0; c < w.chunks; ++c) {
    const float* xc = x + static_cast<long>(c) * w.chunk * NB;
    const int left = w.columns - c * w.chunk;
    if (sliced) xc = slice_of(xc, left < w.chunk ? left : w.chunk, slice);
    for (int begin = first_row; begin < last_row; begin += kActRows) {
      const int end = begin + kActRows < last_row ? begin + kActRows : last_row;
      switch (w.format) {
        case WeightFormat::unstructured:
          for (int row = begin; row < end; ++row) unstructured_row<R>(w, c, row, xc, y, e);
          break;
        case WeightFormat::block4x1:
          for (int row = begin; row < end; row += kRowBlock) block4x1_rows<R>(w, c, row, xc, y, e);
          break;
        case WeightFormat::dense:
          for (int row = begin; row < end; row += kRowBlock) dense_rows<R>(w, c, row, xc, stride, y, e);
          break;
      }
      if (c + 1 == w.chunks && e.act != Unary::identity)
        unary_panel(e.act, y + static_cast<long>(begin) * NB, y + static_cast<long>(begin) * NB, end - begin, R);
    }
  }
}

template <int R = MAX_GROUPS>
void linear(const PackedWeight& w, const float* x, float* y, int groups, int first_row, int last_row,
            const Epilogue& e) {
  if (groups == R) return linear_panel<R>(w, x, y, first_row, last_row, e);
  if constexpr (R > 1) linear<R - 1>(w, x, y, groups, first_row, last_row, e);
}
