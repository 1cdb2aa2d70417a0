// The tile registers of AMX and what its instructions do to them, from Intel's description of ldtilecfg, tilerelease,
// tilezero, tileloadd, tilestored and tdpbsud. Where a processor would refuse an instruction, this ends the process.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/reference/instructions.h"

namespace espalier::reference {

class TileRegisters {
 public:
  // 64 bytes: palette, first row, bytes of a row of each tile (16 bits each, from byte 16), rows (8 bits, from byte
  // 48).
  void configure(const void* configuration) {
    std::uint8_t bytes[64];
    std::memcpy(bytes, configuration, sizeof bytes);
    require(bytes[0] == 1 && bytes[1] == 0, "ldtilecfg: palette 1 from row 0 is the one known");
    for (int i = 2; i < 16; ++i) require(bytes[i] == 0, "ldtilecfg: reserved bytes are not zero");
    for (int i = 2 * kCount; i < 32; ++i) require(bytes[16 + i] == 0, "ldtilecfg: there are eight tiles");
    for (int i = kCount; i < 16; ++i) require(bytes[48 + i] == 0, "ldtilecfg: there are eight tiles");
    for (int t = 0; t < kCount; ++t) {
      Tile& tile = tiles_[t] = {};
      tile.row_bytes = bytes[16 + 2 * t] + 256 * bytes[17 + 2 * t];
      tile.rows = bytes[48 + t];
      require(tile.rows <= kRows && tile.row_bytes <= kRowBytes,
              "ldtilecfg: a tile is larger than 16 rows of 64 bytes");
      require((tile.rows == 0) == (tile.row_bytes == 0),
              "ldtilecfg: a tile has rows without bytes or bytes without rows");
    }
    configured_ = true;
  }

  void release() { *this = {}; }

  void zero(int t) { std::memset(used(t).bytes, 0, sizeof tiles_[t].bytes); }

  void load(int t, const void* from, long stride) {
    zero(t);
    for (int row = 0; row < tiles_[t].rows; ++row)
      std::memcpy(tiles_[t].bytes[row], static_cast<const char*>(from) + row * stride,
                  static_cast<std::size_t>(tiles_[t].row_bytes));
  }

  void store(int t, void* to, long stride) {
    for (int row = 0; row < used(t).rows; ++row)
      std::memcpy(static_cast<char*>(to) + row * stride, tiles_[t].bytes[row],
                  static_cast<std::size_t>(tiles_[t].row_bytes));
  }

  // tdpbsud: c[m][n] += the products of the four signed bytes w[m][k] and the four unsigned bytes x[k][n], for every k.
  void dot(int c, int w, int x) {
    require(c != w && c != x && w != x, "tdpbsud: the three tiles must differ");
    require(used(c).rows == used(w).rows && used(c).row_bytes == used(x).row_bytes &&
                tiles_[w].row_bytes == 4 * tiles_[x].rows,
            "tdpbsud: the sizes of the tiles do not fit together");
    for (int m = 0; m < tiles_[c].rows; ++m)
      for (int n = 0; n < tiles_[c].row_bytes; n += 4)
        for (int k = 0; k < tiles_[x].rows; ++k) {
          const std::uint32_t sum = word(c, m, n);
          const std::int32_t next = Dpbusd::apply(static_cast<std::int32_t>(sum), word(x, k, n), word(w, m, 4 * k));
          std::memcpy(tiles_[c].bytes[m] + n, &next, sizeof next);
        }
  }

 private:
  static constexpr int kCount = 8, kRows = 16, kRowBytes = 64;
  struct Tile {
    int rows = 0;
    int row_bytes = 0;
    std::uint8_t bytes[kRows][kRowBytes] = {};
  };

  static void require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "a processor with AMX would refuse this: %s\n", what);
    std::abort();
  }

  Tile& used(int t) {
    require(configured_ && tiles_[t].rows > 0, "a tile without a configuration");
    return tiles_[t];
  }

  std::uint32_t word(int t, int row, int byte) const {
    std::uint32_t out;
    std::memcpy(&out, tiles_[t].bytes[row] + byte, sizeof out);
    return out;
  }

  Tile tiles_[kCount];
  bool configured_ = false;
};

// Those of the calling thread.
inline thread_local TileRegisters tile_registers;

}  // namespace espalier::reference
