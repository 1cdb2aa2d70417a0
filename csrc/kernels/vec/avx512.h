// Sixteen floats in a ZMM register. Included only by kernels/x86_avx512.cc, inside its anonymous namespace.
struct V {
  __m512 r;
  static constexpr int lanes = 16;
  static V load(const float* p) { return {_mm512_loadu_ps(p)}; }
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
