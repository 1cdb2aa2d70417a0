// Four floats in an array: runs anywhere. Included only by kernels/scalar.cc, inside its anonymous namespace.
struct V {
  float r[4];
  static constexpr int lanes = 4;
  static V load(const float* p) { return {{p[0], p[1], p[2], p[3]}}; }
  static V splat(float x) { return {{x, x, x, x}}; }
  static V broadcast(const float* p) { return splat(*p); }
  static V zero() { return splat(0.0f); }
  void store(float* p) const {
    for (int i = 0; i < 4; ++i) p[i] = r[i];
  }
};
template <class F>
inline V each(V a, V b, F f) {
  V out = V::zero();
  for (int i = 0; i < 4; ++i) out.r[i] = f(a.r[i], b.r[i]);
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
  for (int i = 0; i < 4; ++i) no.r[i] = a.r[i] < b.r[i] ? yes.r[i] : no.r[i];
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
