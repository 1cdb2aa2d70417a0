// Sixteen floats or integers in a ZMM register. Included only by kernels/x86_avx512*.cc, inside their anonymous
// namespaces.
struct V {
  __m512 r;
  static constexpr int lanes = 16;
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
  // p[0], p[2], p[4], ...
  static V load_even(const float* p) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    return {_mm512_permutex2var_ps(_mm512_loadu_ps(p), even, _mm512_loadu_ps(p + lanes))};
  }
  static V splat(float x) { return {_mm512_set1_ps(x)}; }
  static V broadcast(const float* p) { return {_mm512_set1_ps(*p)}; }
  static V zero() { return {_mm512_setzero_ps()}; }
  void store(float* p) const { _mm512_storeu_ps(p, r); }
};
inline V operator+(V a, V b) { return {_mm512_add_ps(a.r, b.r)}; }
inline V operator-(V a, V b) { return {_mm512_sub_ps(a.r, b.r)}; }
inline V operator*(V a, V b) { return {_mm512_mul_ps(a.r, b.r)}; }
inline V operator/(V a, V b) { return {_mm512_div_ps(a.r, b.r)}; }
inline V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.r, b.r, c.r)}; }    // a * b + c
inline V fnma(V a, V b, V c) { return {_mm512_fnmadd_ps(a.r, b.r, c.r)}; }  // c - a * b
// When either is NaN these return the second operand.
inline V max(V a, V b) { return {_mm512_max_ps(a.r, b.r)}; }
inline V min(V a, V b) { return {_mm512_min_ps(a.r, b.r)}; }
inline V sqrt(V a) { return {_mm512_sqrt_ps(a.r)}; }
inline V abs(V a) { return {_mm512_andnot_ps(_mm512_set1_ps(-0.0f), a.r)}; }
inline V select_lt(V a, V b, V yes, V no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.r, b.r, _CMP_LT_OQ), no.r, yes.r)};
}
inline V round(V a) { return {_mm512_roundscale_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for integral n in [-126, 127].
inline V pow2(V n) {
  return {
      _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n.r), _mm512_set1_epi32(127)), 23))};
}

struct I {
  __m512i r;
  static I load(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static I splat(std::int32_t x) { return {_mm512_set1_epi32(x)}; }
  static I zero() { return {_mm512_setzero_si512()}; }
  // Four bytes, in every lane.
  static I broadcast(const std::int8_t* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return splat(word);
  }
  void store(std::uint8_t* p) const { _mm512_storeu_si512(p, r); }
  static constexpr bool signed_bytes = false;
#if defined(__AMX_INT8__)
  static constexpr bool tiles = true;
#else
  static constexpr bool tiles = false;
#endif
#if defined(__AVX512VNNI__)
  static constexpr bool sums_16_bit = false;
#else
  static constexpr bool sums_16_bit = true;
#endif
};
inline I operator+(I a, I b) { return {_mm512_add_epi32(a.r, b.r)}; }
inline I operator-(I a, I b) { return {_mm512_sub_epi32(a.r, b.r)}; }
inline I operator*(I a, I b) { return {_mm512_mullo_epi32(a.r, b.r)}; }
inline I max_bytes(I a, I b) { return {_mm512_max_epu8(a.r, b.r)}; }  // without a sign
inline I operator|(I a, I b) { return {_mm512_or_si512(a.r, b.r)}; }
inline I operator&(I a, I b) { return {_mm512_and_si512(a.r, b.r)}; }
inline I operator^(I a, I b) { return {_mm512_xor_si512(a.r, b.r)}; }
template <int N>
inline I shift_left(I a) {
  return {_mm512_slli_epi32(a.r, N)};
}
template <int N>
inline I shift_right(I a) {
  return {_mm512_srli_epi32(a.r, N)};
}
inline I to_int(V a) { return {_mm512_cvtps_epi32(a.r)}; }
inline V to_float(I a) { return {_mm512_cvtepi32_ps(a.r)}; }
// acc + the four products of bytes in each lane.
inline I dot(I acc, I x, I w) {
#if defined(__AVX512VNNI__)
  return {_mm512_dpbusd_epi32(acc.r, x.r, w.r)};
#else
  return {_mm512_add_epi32(acc.r, _mm512_madd_epi16(_mm512_maddubs_epi16(x.r, w.r), _mm512_set1_epi16(1)))};
#endif
}
// The same of two pairs of vectors.
inline I dot_pair(I acc, I x0, I w0, I x1, I w1) {
#if defined(__AVX512VNNI__)
  return dot(dot(acc, x0, w0), x1, w1);
#else
  const __m512i sum = _mm512_add_epi16(_mm512_maddubs_epi16(x0.r, w0.r), _mm512_maddubs_epi16(x1.r, w1.r));
  return {_mm512_add_epi32(acc.r, _mm512_madd_epi16(sum, _mm512_set1_epi16(1)))};
#endif
}
constexpr int kDenseRows = 4;
