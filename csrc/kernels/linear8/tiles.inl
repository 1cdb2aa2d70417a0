// Sums of dense8 rows by a matrix unit, for sets that have one (I::tiles). Tiles are registers of sixteen rows of 64
// bytes; the set defines them as the type Tiles: configure, release, zero, load, dot, store.
//
// A tile of weights holds 16 outputs x 64 inputs; a tile of activations 16 blocks of 4 inputs x 16 tokens, as they
// stand in the panel; one of sums 16 outputs x 16 tokens in 32 bits. Two tiles of weights meet two of activations, so
// that there is a load for every product. The eight tiles are: sums 0 to 3, weights 4 and 5, activations 6 and 7.

struct Tiles;

constexpr int kUnitRows = 16;  // of one tile
constexpr int kTileRows = I::tiles ? 2 * kUnitRows : kRowBlock;
constexpr int kTileColumns = I::tiles ? 64 : kFeatureBlock;
static_assert(kRowStep % kTileRows == 0);
static_assert(!I::tiles || V::lanes * kFeatureBlock == kTileColumns);

// What the unit reads its configuration from: all eight tiles full.
struct alignas(64) TileConfiguration {
  std::uint8_t palette = 1;
  std::uint8_t start_row = 0;
  std::uint8_t reserved[14] = {};
  std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {kUnitRows, kUnitRows, kUnitRows, kUnitRows, kUnitRows, kUnitRows, kUnitRows, kUnitRows};
};
static_assert(sizeof(TileConfiguration) == 64);
constexpr TileConfiguration kFullTiles;

// A thread has tiles for the length of a call: otherwise the system would save eight kilobytes whenever it switches.
template <class T = Tiles>
inline void take_tiles(const PackedWeight8& w) {
  if constexpr (I::tiles)
    if (w.format == WeightFormat8::dense8) T::configure(&kFullTiles);
}
template <class T = Tiles>
inline void release_tiles(const PackedWeight8& w) {
  if constexpr (I::tiles)
    if (w.format == WeightFormat8::dense8) T::release();
}

// Products of `count` tiles of weights and the activations x of N groups of tokens, to sums: [kTileRows][NB].
template <class T, int N>
inline void multiply_tiles(const std::int8_t* weights, int count, const std::uint8_t* x, std::int32_t* sums) {
  constexpr long kStride = NB * kFeatureBlock;  // of activations and of sums, in bytes
  T::template zero<0>();
  T::template zero<1>();
  if constexpr (N == 2) {
    T::template zero<2>();
    T::template zero<3>();
  }
  for (int i = 0; i < count; ++i, weights += kTileRows * kTileColumns, x += kUnitRows * kStride) {
    T::template load<4>(weights, kTileColumns);
    T::template load<5>(weights + kUnitRows * kTileColumns, kTileColumns);
    T::template load<6>(x, kStride);
    T::template dot<0, 4, 6>();
    T::template dot<1, 5, 6>();
    if constexpr (N == 2) {
      T::template load<7>(x + V::lanes * kFeatureBlock, kStride);
      T::template dot<2, 4, 7>();
      T::template dot<3, 5, 7>();
    }
  }
  T::template store<0>(sums, kStride);
  T::template store<1>(sums + kUnitRows * NB, kStride);
  if constexpr (N == 2) {
    T::template store<2>(sums + V::lanes, kStride);
    T::template store<3>(sums + kUnitRows * NB + V::lanes, kStride);
  }
}

// sum_k q w over whole tiles of inputs, for R groups of tokens and the kTileRows rows that begin at `row`.
template <int R, class T = Tiles>
inline void tile_sums(const PackedWeight8& w, int row, const std::uint8_t* x, std::int32_t (&sums)[kTileRows * NB]) {
  const int count = (w.columns + kFeatureBlock - 1) / kTileColumns;
  const std::int8_t* weights = w.dense + static_cast<long>(row) * count * kTileColumns;
  for (int r = 0; r + 2 <= R; r += 2)
    multiply_tiles<T, 2>(weights, count, x + r * V::lanes * kFeatureBlock, sums + r * V::lanes);
  if constexpr (R % 2 == 1)
    multiply_tiles<T, 1>(weights, count, x + (R - 1) * V::lanes * kFeatureBlock, sums + (R - 1) * V::lanes);
}
