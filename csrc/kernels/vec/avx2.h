// Eight floats or integers in a YMM register. Included only by kernels/x86_avx2.cc and x86_avx_vnni.cc, inside their
// anonymous namespaces.
struct V {
  __m256 r;
  static constexpr int lanes = 8;
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
  // p[0], p[2], p[4], ...
  static V load_even(const float* p) {
    const __m256 pairs = _mm256_shuffle_ps(_mm256_loadu_ps(p), _mm256_loadu_ps(p + lanes), 0x88);
    return {_mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8))};
  }
  static V splat(float x) { return {_mm256_set1_ps(x)}; }
  static V broadcast(const float* p) { return {_mm256_broadcast_ss(p)}; }
  static V zero() { return {_mm256_setzero_ps()}; }
  void store(float* p) const { _mm256_storeu_ps(p, r); }
};
inline V operator+(V a, V b) { return {_mm256_add_ps(a.r, b.r)}; }
inline V operator-(V a, V b) { return {_mm256_sub_ps(a.r, b.r)}; }
inline V operator*(V a, V b) { return {_mm256_mul_ps(a.r, b.r)}; }
inline V operator/(V a, V b) { return {_mm256_div_ps(a.r, b.r)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.r, b.r, c.r)}; }    // a * b + c
inline V fnma(V a, V b, V c) { return {_mm256_fnmadd_ps(a.r, b.r, c.r)}; }  // c - a * b
// When either is NaN these return the second operand.
inline V max(V a, V b) { return {_mm256_max_ps(a.r, b.r)}; }
inline V min(V a, V b) { return {_mm256_min_ps(a.r, b.r)}; }
inline V sqrt(V a) { return {_mm256_sqrt_ps(a.r)}; }
inline V abs(V a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.r)}; }
inline V select_lt(V a, V b, V yes, V no) {
  return {_mm256_blendv_ps(no.r, yes.r, _mm256_cmp_ps(a.r, b.r, _CMP_LT_OQ))};
}
inline V round(V a) { return {_mm256_round_ps(a.r, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for integral n in [-126, 127].
inline V pow2(V n) {
  return {
      _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.r), _mm256_set1_epi32(127)), 23))};
}

struct I {
  __m256i r;
  static I load(const std::uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
  static I splat(std::int32_t x) { return {_mm256_set1_epi32(x)}; }
  static I zero() { return {_mm256_setzero_si256()}; }
  // Four bytes, in every lane.
  static I broadcast(const std::int8_t* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return splat(word);
  }
  void store(std::uint8_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), r); }
  static constexpr bool signed_bytes = false;
  static constexpr bool tiles = false;
#if defined(__AVXVNNI__)
  static constexpr bool sums_16_bit = false;
#else
  static constexpr bool sums_16_bit = true;
#endif
};
inline I operator+(I a, I b) { return {_mm256_add_epi32(a.r, b.r)}; }
inline I operator-(I a, I b) { return {_mm256_sub_epi32(a.r, b.r)}; }
inline I operator*(I a, I b) { return {_mm256_mullo_epi32(a.r, b.r)}; }
inline I max_bytes(I a, I b) { return {_mm256_max_epu8(a.r, b.r)}; }  // without a sign
inline I operator|(I a, I b) { return {_mm256_or_si256(a.r, b.r)}; }
inline I operator&(I a, I b) { return {_mm256_and_si256(a.r, b.r)}; }
inline I operator^(I a, I b) { return {_mm256_xor_si256(a.r, b.r)}; }
template <int N>
inline I shift_left(I a) {
  return {_mm256_slli_epi32(a.r, N)};
}
template <int N>
inline I shift_right(I a) {
  return {_mm256_srli_epi32(a.r, N)};
}
inline I to_int(V a) { return {_mm256_cvtps_epi32(a.r)}; }
inline V to_float(I a) { return {_mm256_cvtepi32_ps(a.r)}; }
// acc + the four products of bytes in each lane.
inline I dot(I acc, I x, I w) {
#if defined(__AVXVNNI__)
  return {_mm256_dpbusd_avx_epi32(acc.r, x.r, w.r)};
#else
  return {_mm256_add_epi32(acc.r, _mm256_madd_epi16(_mm256_maddubs_epi16(x.r, w.r), _mm256_set1_epi16(1)))};
#endif
}
// The same of two pairs of vectors.
inline I dot_pair(I acc, I x0, I w0, I x1, I w1) {
#if defined(__AVXVNNI__)
  return dot(dot(acc, x0, w0), x1, w1);
#else
  const __m256i sum = _mm256_add_epi16(_mm256_maddubs_epi16(x0.r, w0.r), _mm256_maddubs_epi16(x1.r, w1.r));
  return {_mm256_add_epi32(acc.r, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)))};
#endif
}
#if defined(__AVXVNNI__)
constexpr int kDenseRows = 4;
#else
constexpr int kDenseRows = 2;  // with their temporaries, more do not fit 16 registers
#endif
