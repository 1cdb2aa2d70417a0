// Eight floats in a YMM register. Included only by kernels/x86_avx2.cc, inside its anonymous namespace.
struct V {
  __m256 r;
  static constexpr int lanes = 8;
  static V load(const float* p) { return {_mm256_loadu_ps(p)}; }
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
