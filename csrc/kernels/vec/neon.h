// Four floats in a NEON register. Included only by kernels/arm_neon.cc, inside its anonymous namespace.
struct V {
  float32x4_t r;
  static constexpr int lanes = 4;
  static V load(const float* p) { return {vld1q_f32(p)}; }
  static V splat(float x) { return {vdupq_n_f32(x)}; }
  static V broadcast(const float* p) { return {vld1q_dup_f32(p)}; }
  static V zero() { return {vdupq_n_f32(0.0f)}; }
  void store(float* p) const { vst1q_f32(p, r); }
};
inline V operator+(V a, V b) { return {vaddq_f32(a.r, b.r)}; }
inline V operator-(V a, V b) { return {vsubq_f32(a.r, b.r)}; }
inline V operator*(V a, V b) { return {vmulq_f32(a.r, b.r)}; }
inline V operator/(V a, V b) { return {vdivq_f32(a.r, b.r)}; }
inline V fma(V a, V b, V c) { return {vfmaq_f32(c.r, a.r, b.r)}; }   // a * b + c
inline V fnma(V a, V b, V c) { return {vfmsq_f32(c.r, a.r, b.r)}; }  // c - a * b
// When either is NaN these return the second operand, as on x86 (vmaxq/vminq would return NaN).
inline V max(V a, V b) { return {vbslq_f32(vcgtq_f32(a.r, b.r), a.r, b.r)}; }
inline V min(V a, V b) { return {vbslq_f32(vcltq_f32(a.r, b.r), a.r, b.r)}; }
inline V sqrt(V a) { return {vsqrtq_f32(a.r)}; }
inline V abs(V a) { return {vabsq_f32(a.r)}; }
inline V select_lt(V a, V b, V yes, V no) { return {vbslq_f32(vcltq_f32(a.r, b.r), yes.r, no.r)}; }
inline V round(V a) { return {vrndnq_f32(a.r)}; }
// 2^n for integral n in [-126, 127].
inline V pow2(V n) {
  return {vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n.r), vdupq_n_s32(127)), 23))};
}
