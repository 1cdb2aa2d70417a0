// What the dot-product instructions of each instruction set do to one lane of 32 bits: four bytes of activations `x`
// times four signed bytes of weights `w`, added to `acc`; and the same for two blocks at once. The plain kernels are
// made of Dpbusd; tests run all kernels over each of them, for processors that are not at hand.
#pragma once

#include <algorithm>
#include <cstdint>

namespace espalier::reference {

inline std::int32_t unsigned_byte(std::uint32_t word, int i) { return static_cast<std::uint8_t>(word >> (8 * i)); }
inline std::int32_t signed_byte(std::uint32_t word, int i) { return static_cast<std::int8_t>(word >> (8 * i)); }

// Sums wrap around, unless an instruction says otherwise.
inline std::int32_t wrapping_add(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) + static_cast<std::uint32_t>(b));
}

// Sums in 16 bits come from Products::pair(x, w, i), the products of bytes i and i + 1.
template <class Products>
struct Sums16 {
  static constexpr bool sums_16_bit = true;
  static constexpr bool tiles = false;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; i += 2) acc = wrapping_add(acc, Products::pair(x, w, i));
    return acc;
  }
  static std::int32_t apply_pair(std::int32_t acc, std::uint32_t x0, std::uint32_t w0, std::uint32_t x1,
                                 std::uint32_t w1) {
    for (int i = 0; i < 4; i += 2)
      acc = wrapping_add(acc, static_cast<std::int16_t>(Products::pair(x0, w0, i) + Products::pair(x1, w1, i)));
    return acc;
  }
};

// x86 vpmaddubsw, which adds two products with saturation, vpaddw for two blocks, vpmaddwd with ones, vpaddd.
struct Maddubs : Sums16<Maddubs> {
  static constexpr bool signed_bytes = false;
  static std::int32_t pair(std::uint32_t x, std::uint32_t w, int i) {
    const std::int32_t sum = unsigned_byte(x, i) * signed_byte(w, i) + unsigned_byte(x, i + 1) * signed_byte(w, i + 1);
    return std::clamp(sum, -32768, 32767);
  }
};

// aarch64 smull, smlal for two blocks, addp, sadalp.
struct Smull : Sums16<Smull> {
  static constexpr bool signed_bytes = true;
  static std::int32_t pair(std::uint32_t x, std::uint32_t w, int i) {
    return static_cast<std::int16_t>(signed_byte(x, i) * signed_byte(w, i) +
                                     signed_byte(x, i + 1) * signed_byte(w, i + 1));
  }
};

// Sums in 32 bits of products of single bytes.
template <class Products>
struct Sums32 {
  static constexpr bool sums_16_bit = false;
  static constexpr bool tiles = false;
  static std::int32_t apply(std::int32_t acc, std::uint32_t x, std::uint32_t w) {
    for (int i = 0; i < 4; ++i) acc = wrapping_add(acc, Products::activation(x, i) * signed_byte(w, i));
    return acc;
  }
  static std::int32_t apply_pair(std::int32_t acc, std::uint32_t x0, std::uint32_t w0, std::uint32_t x1,
                                 std::uint32_t w1) {
    return apply(apply(acc, x0, w0), x1, w1);
  }
};

// x86 vpdpbusd, of AVX-VNNI and AVX-512-VNNI.
struct Dpbusd : Sums32<Dpbusd> {
  static constexpr bool signed_bytes = false;
  static std::int32_t activation(std::uint32_t x, int i) { return unsigned_byte(x, i); }
};

// The same where tiles.h multiplies whole tiles.
struct DpbusdAndTiles : Dpbusd {
  static constexpr bool tiles = true;
};

// aarch64 sdot.
struct Sdot : Sums32<Sdot> {
  static constexpr bool signed_bytes = true;
  static std::int32_t activation(std::uint32_t x, int i) { return signed_byte(x, i); }
};

}  // namespace espalier::reference
