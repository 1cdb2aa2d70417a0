// What the dot-product instructions of each instruction set do to one lane of 32 bits: four bytes of activations `x`
// times four signed bytes of weights `w`, added to `acc`. The plain kernels are made of Dpbusd; tests run all kernels
// over each of them, for processors that are not at hand.
#pragma once

#include <algorithm>
#include <cstdint>

namespace espalier::reference {

inline std::int32_t unsigned_byte(std::uint32_t word, int i) { return static_cast<std::uint8_t>(word >> (8 * i)); }
inline std::int32_t signed_byte(std::uint32_t word, int i) { return static_cast<std::int8_t>(word >> (8 * i)); }

// Sums of 32 bits wrap around.
inline std::int32_t wrapping_add(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}

// x86 vpmaddubsw, vpmaddwd with ones, vpaddd. The first adds two products in 16 bits, with saturation.
struct Maddubs {
  static constexpr bool pairs_saturate = true;
  static constexpr bool signed_bytes = false;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; i += 2) {
      const std::int32_t pair =
          unsigned_byte(x, i) * signed_byte(w, i) + unsigned_byte(x, i + 1) * signed_byte(w, i + 1);
      acc = wrapping_add(acc, std::clamp(pair, -32768, 32767));
    }
    return acc;
  }
};

// x86 vpdpbusd, of AVX-VNNI, AVX-512-VNNI and, over tiles, AMX.
struct Dpbusd {
  static constexpr bool pairs_saturate = false;
  static constexpr bool signed_bytes = false;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; ++i) acc = wrapping_add(acc, unsigned_byte(x, i) * signed_byte(w, i));
    return acc;
  }
};

// aarch64 smull, smull2, addp, sadalp. The third adds two products in 16 bits and wraps around.
struct Smull {
  static constexpr bool pairs_saturate = true;
  static constexpr bool signed_bytes = true;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; i += 2) {
      const std::int32_t pair = signed_byte(x, i) * signed_byte(w, i) + signed_byte(x, i + 1) * signed_byte(w, i + 1);
      acc = wrapping_add(acc, static_cast<std::int16_t>(pair));
    }
    return acc;
  }
};

// aarch64 sdot.
struct Sdot {
  static constexpr bool pairs_saturate = false;
  static constexpr bool signed_bytes = true;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; ++i) acc = wrapping_add(acc, signed_byte(x, i) * signed_byte(w, i));
    return acc;
  }
};

}  // namespace espalier::reference
