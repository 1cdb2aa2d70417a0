// LANES floats or integers in an array: runs anywhere. Who includes it, inside an anonymous namespace, defines LANES
// and Dot, one of kernels/reference/instructions.h.
struct V {
  float r[LANES];
  static constexpr int lanes = LANES;
  static V load(const float* p) {
    V out;
    for (int i = 0; i < LANES; ++i) out.r[i] = p[i];
    return out;
  }
  // p[0], p[2], p[4], ...
  static V load_even(const float* p) {
    V out;
    for (int i = 0; i < LANES; ++i) out.r[i] = p[2 * i];
    return out;
  }
  static V splat(float x) {
    V out;
    for (int i = 0; i < LANES; ++i) out.r[i] = x;
    return out;
  }
  static V broadcast(const float* p) { return splat(*p); }
  static V zero() { return splat(0.0f); }
  void store(float* p) const {
    for (int i = 0; i < LANES; ++i) p[i] = r[i];
  }
};
template <class F>
inline V each(V a, V b, F f) {
  V out = V::zero();
  for (int i = 0; i < LANES; ++i) out.r[i] = f(a.r[i], b.r[i]);
  return out;
}
inline V operator+(V a, V b) {
  return each(a, b, [](float x, float y) { return x + y; });
}
inline V operator-(V a, V b) {
  return each(a, b, [](float x, float y) { return x - y; });
}
inline V operator*(V a, V b) {
  return each(a, b, [](float x, float y) { return x * y; });
}
inline V operator/(V a, V b) {
  return each(a, b, [](float x, float y) { return x / y; });
}
inline V fma(V a, V b, V c) { return a * b + c; }
inline V fnma(V a, V b, V c) { return c - a * b; }
// When either is NaN these return the second operand, as on x86.
inline V max(V a, V b) {
  return each(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline V min(V a, V b) {
  return each(a, b, [](float x, float y) { return x < y ? x : y; });
}
inline V sqrt(V a) {
  return each(a, a, [](float x, float) { return __builtin_sqrtf(x); });
}
inline V abs(V a) {
  return each(a, a, [](float x, float) { return __builtin_fabsf(x); });
}
inline V select_lt(V a, V b, V yes, V no) {
  for (int i = 0; i < LANES; ++i) no.r[i] = a.r[i] < b.r[i] ? yes.r[i] : no.r[i];
  return no;
}
inline V round(V a) {
  return each(a, a, [](float x, float) { return __builtin_nearbyintf(x); });
}
// 2^n for integral n in [-126, 127]. A NaN comes out as 1, so that what it multiplies stays NaN.
inline V pow2(V n) {
  return each(n, n, [](float x, float) {
    const unsigned bits = x == x ? static_cast<unsigned>(static_cast<int>(x) + 127) << 23 : 0x3f800000u;
    return __builtin_bit_cast(float, bits);
  });
}

struct I {
  std::int32_t r[LANES];
  static constexpr bool sums_16_bit = Dot::sums_16_bit;
  static constexpr bool signed_bytes = Dot::signed_bytes;
  static constexpr bool tiles = Dot::tiles;
  static I load(const std::uint8_t* p) {
    I out;
    __builtin_memcpy(out.r, p, sizeof out.r);
    return out;
  }
  static I splat(std::int32_t x) {
    I out;
    for (int i = 0; i < LANES; ++i) out.r[i] = x;
    return out;
  }
  static I zero() { return splat(0); }
  // Four bytes, in every lane.
  static I broadcast(const std::int8_t* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return splat(word);
  }
  void store(std::uint8_t* p) const { __builtin_memcpy(p, r, sizeof r); }
};
// Without a sign, so that sums wrap around as those of processors do.
template <class F>
inline I each(I a, I b, F f) {
  I out = I::zero();
  for (int i = 0; i < LANES; ++i)
    out.r[i] = static_cast<std::int32_t>(f(static_cast<std::uint32_t>(a.r[i]), static_cast<std::uint32_t>(b.r[i])));
  return out;
}
inline I operator+(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x + y; });
}
inline I operator-(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x - y; });
}
inline I operator*(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x * y; });
}
inline I max_bytes(I a, I b) {  // without a sign
  return each(a, b, [](std::uint32_t x, std::uint32_t y) {
    std::uint32_t out = 0;
    for (std::uint32_t mask = 255; mask != 0; mask <<= 8) out |= (x & mask) > (y & mask) ? x & mask : y & mask;
    return out;
  });
}
inline I operator|(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x | y; });
}
inline I operator&(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x & y; });
}
inline I operator^(I a, I b) {
  return each(a, b, [](std::uint32_t x, std::uint32_t y) { return x ^ y; });
}
template <int N>
inline I shift_left(I a) {
  return each(a, a, [](std::uint32_t x, std::uint32_t) { return x << N; });
}
template <int N>
inline I shift_right(I a) {
  return each(a, a, [](std::uint32_t x, std::uint32_t) { return x >> N; });
}
inline I to_int(V a) {  // of integral values
  I out = I::zero();
  for (int i = 0; i < LANES; ++i) out.r[i] = static_cast<std::int32_t>(a.r[i]);
  return out;
}
inline V to_float(I a) {
  V out = V::zero();
  for (int i = 0; i < LANES; ++i) out.r[i] = static_cast<float>(a.r[i]);
  return out;
}
inline I dot(I acc, I x, I w) {
  for (int i = 0; i < LANES; ++i)
    acc.r[i] = Dot::apply(acc.r[i], static_cast<std::uint32_t>(x.r[i]), static_cast<std::uint32_t>(w.r[i]));
  return acc;
}
inline I dot_pair(I acc, I x0, I w0, I x1, I w1) {
  for (int i = 0; i < LANES; ++i)
    acc.r[i] = Dot::apply_pair(acc.r[i], static_cast<std::uint32_t>(x0.r[i]), static_cast<std::uint32_t>(w0.r[i]),
                               static_cast<std::uint32_t>(x1.r[i]), static_cast<std::uint32_t>(w1.r[i]));
  return acc;
}
constexpr int kDenseRows = 4;
