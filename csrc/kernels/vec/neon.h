// Four floats or integers in a NEON register. Included only by kernels/arm_neon.cc and arm_neon_dot.cc, inside their
// anonymous namespaces.
struct V {
  float32x4_t r;
  static constexpr int lanes = 4;
  static V load(const float* p) { return {vld1q_f32(p)}; }
  // p[0], p[2], p[4], ...
  static V load_even(const float* p) { return {vuzp1q_f32(vld1q_f32(p), vld1q_f32(p + lanes))}; }
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

struct I {
  int32x4_t r;
  static I load(const std::uint8_t* p) { return {vreinterpretq_s32_u8(vld1q_u8(p))}; }
  static I splat(std::int32_t x) { return {vdupq_n_s32(x)}; }
  static I zero() { return splat(0); }
  // Four bytes, in every lane.
  static I broadcast(const std::int8_t* p) {
    std::int32_t word;
    __builtin_memcpy(&word, p, sizeof word);
    return splat(word);
  }
  void store(std::uint8_t* p) const { vst1q_u8(p, vreinterpretq_u8_s32(r)); }
  static constexpr bool signed_bytes = true;  // there is no product of unsigned and signed bytes
  static constexpr bool tiles = false;
#if defined(__ARM_FEATURE_DOTPROD)
  static constexpr bool sums_16_bit = false;
#else
  static constexpr bool sums_16_bit = true;
#endif
};
inline I operator+(I a, I b) { return {vaddq_s32(a.r, b.r)}; }
inline I operator-(I a, I b) { return {vsubq_s32(a.r, b.r)}; }
inline I operator*(I a, I b) { return {vmulq_s32(a.r, b.r)}; }
inline I max_bytes(I a, I b) {  // without a sign
  return {vreinterpretq_s32_u8(vmaxq_u8(vreinterpretq_u8_s32(a.r), vreinterpretq_u8_s32(b.r)))};
}
inline I operator|(I a, I b) { return {vorrq_s32(a.r, b.r)}; }
inline I operator&(I a, I b) { return {vandq_s32(a.r, b.r)}; }
inline I operator^(I a, I b) { return {veorq_s32(a.r, b.r)}; }
template <int N>
inline I shift_left(I a) {
  return {vshlq_n_s32(a.r, N)};
}
template <int N>
inline I shift_right(I a) {
  return {vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.r), N))};
}
inline I to_int(V a) { return {vcvtnq_s32_f32(a.r)}; }
inline V to_float(I a) { return {vcvtq_f32_s32(a.r)}; }
// acc + the four products of bytes in each lane.
inline I dot(I acc, I x, I w) {
  const int8x16_t a = vreinterpretq_s8_s32(x.r), b = vreinterpretq_s8_s32(w.r);
#if defined(__ARM_FEATURE_DOTPROD)
  return {vdotq_s32(acc.r, a, b)};
#else
  return {vpadalq_s16(acc.r, vpaddq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)), vmull_high_s8(a, b)))};
#endif
}
// The same of two pairs of vectors.
inline I dot_pair(I acc, I x0, I w0, I x1, I w1) {
#if defined(__ARM_FEATURE_DOTPROD)
  return dot(dot(acc, x0, w0), x1, w1);
#else
  const int8x16_t a0 = vreinterpretq_s8_s32(x0.r), b0 = vreinterpretq_s8_s32(w0.r);
  const int8x16_t a1 = vreinterpretq_s8_s32(x1.r), b1 = vreinterpretq_s8_s32(w1.r);
  const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a0), vget_low_s8(b0)), vget_low_s8(a1), vget_low_s8(b1));
  const int16x8_t high = vmlal_high_s8(vmull_high_s8(a0, b0), a1, b1);
  return {vpadalq_s16(acc.r, vpaddq_s16(low, high))};
#endif
}
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int kDenseRows = 4;
#else
constexpr int kDenseRows = 2;  // with their temporaries, more do not fit 32 registers
#endif
