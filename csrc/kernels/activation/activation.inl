// Elementwise functions over panels. Shared by every instruction set; included inside its anonymous namespace.

// e^x. Relative error below 2.4e-7; 0 below the smallest normal, inf above the largest; NaN stays NaN.
// Range reduction x = n ln 2 + r, then a degree-6 polynomial fitted to e^r on [-ln 2 / 2, ln 2 / 2].
inline V exp(V x) {
  const V low = V::splat(-87.33654f), high = V::splat(88.72283f);
  const V clamped = min(high, max(low, x));
  const V n = round(clamped * V::splat(1.44269504089f));
  V r = fnma(n, V::splat(0.693359375f), clamped);
  r = fnma(n, V::splat(-2.12194440e-4f), r);
  V p = V::splat(1.382940872e-03f);
  p = fma(p, r, V::splat(8.374779755e-03f));
  p = fma(p, r, V::splat(4.166835871e-02f));
  p = fma(p, r, V::splat(1.666642073e-01f));
  p = fma(p, r, V::splat(4.999999149e-01f));
  p = fma(p, r, V::splat(1.000000036e+00f));
  p = fma(p, r, V::splat(1.0f));
  // 2^128 is no float, though e^x just below the overflow threshold is one: n = 128 goes in two factors.
  const V top = V::splat(127.0f);
  V y = select_lt(top, n, p + p, p) * pow2(min(top, n));
  y = select_lt(high, x, V::splat(__builtin_inff()), y);
  return select_lt(x, low, V::zero(), y);
}

// e^x for x <= 0 (softmax): the same without the upper end.
inline V exp_nonpositive(V x) {
  const V low = V::splat(-87.33654f);
  const V clamped = max(low, x);
  const V n = round(clamped * V::splat(1.44269504089f));
  V r = fnma(n, V::splat(0.693359375f), clamped);
  r = fnma(n, V::splat(-2.12194440e-4f), r);
  V p = V::splat(1.382940872e-03f);
  p = fma(p, r, V::splat(8.374779755e-03f));
  p = fma(p, r, V::splat(4.166835871e-02f));
  p = fma(p, r, V::splat(1.666642073e-01f));
  p = fma(p, r, V::splat(4.999999149e-01f));
  p = fma(p, r, V::splat(1.000000036e+00f));
  p = fma(p, r, V::splat(1.0f));
  return select_lt(x, low, V::zero(), p * pow2(n));
}

// erf(z) / z for |z| <= 4, as P(t) / Q(t) with t = z^2 / 16: fitted for the least absolute error of erf, 2.2e-8 before
// rounding. All coefficients are positive, so nothing cancels.
inline V erf_over_x(V t) {
  constexpr float p[] = {1.128378977e+00f, 3.139853000e+00f, 1.368739393e+01f,
                         1.639745381e+01f, 1.887641351e+01f, 2.070800405e+00f};
  constexpr float q[] = {
      1.0f, 8.115920894e+00f, 2.981709619e+01f, 6.325743784e+01f, 7.970932904e+01f, 3.930138926e+01f};
  V numerator = V::splat(p[5]), denominator = V::splat(q[5]);
  UNROLL for (int i = 4; i >= 0; --i) {
    numerator = fma(numerator, t, V::splat(p[i]));
    denominator = fma(denominator, t, V::splat(q[i]));
  }
  return numerator / denominator;
}

// erf(x), absolute error below 4e-7; NaN stays NaN. Beyond |x| = 4 it is +-1 to single precision.
inline V erf(V x) {
  const V z = min(V::splat(4.0f), max(V::splat(-4.0f), x));
  return min(V::splat(1.0f), max(V::splat(-1.0f), z * erf_over_x(z * z * V::splat(0.0625f))));
}

inline V sigmoid(V x) { return V::splat(1.0f) / (V::splat(1.0f) + exp(V::zero() - x)); }

// tanh(x): 1 - 2 / (e^2x + 1), and an odd Taylor polynomial near 0, where the difference would cancel.
inline V tanh(V x) {
  const V far = V::splat(1.0f) - V::splat(2.0f) / (exp(x + x) + V::splat(1.0f));
  const V u = x * x;
  V p = fma(u, V::splat(-1382.0f / 155925.0f), V::splat(62.0f / 2835.0f));
  p = fma(p, u, V::splat(-17.0f / 315.0f));
  p = fma(p, u, V::splat(2.0f / 15.0f));
  p = fma(p, u, V::splat(-1.0f / 3.0f));
  const V near = fma(x * u, p, x);
  return select_lt(abs(x), V::splat(0.25f), near, far);
}

// With erf(x / sqrt 2) as above; absolute error below 1.3e-6.
inline V gelu(V x) {
  const V edge = V::splat(5.656854249f);
  const V z = min(edge, max(V::zero() - edge, x));
  const V e = z * V::splat(0.70710678118654752f) * erf_over_x(z * z * V::splat(0.03125f));
  const V half = V::splat(0.5f) * x;
  // Exactly 0 beyond the edge: an e that is not quite -1 would be off in proportion to x.
  return select_lt(x, V::zero() - edge, V::zero(), fma(half, e, half));
}

inline V gelu_tanh(V x) {
  const V inner = V::splat(0.79788456080286536f) * fma(V::splat(0.044715f) * x * x, x, x);
  return V::splat(0.5f) * x * (V::splat(1.0f) + tanh(inner));
}

inline V elu(V x) { return select_lt(x, V::zero(), exp(x) - V::splat(1.0f), x); }

// log(1 + e^x) = max(x, 0) + log(1 + u) with u = e^-|x|, and log(1 + u) = 2 atanh(u / (2 + u)), whose series ends
// quickly.
inline V softplus(V x) {
  const V u = exp_nonpositive(V::zero() - abs(x));
  const V t = u / (u + V::splat(2.0f));
  const V t2 = t * t;
  V p = V::splat(1.0f / 15.0f);
  UNROLL for (int k = 13; k >= 1; k -= 2) p = fma(p, t2, V::splat(1.0f / static_cast<float>(k)));
  return fma(V::splat(2.0f) * t, p, max(V::zero(), x));
}

template <class F>
void map_panel(const float* x, float* y, int features, int groups, F f) {
  for (int i = 0; i < features; ++i, x += NB, y += NB)
    for (int g = 0; g < groups; ++g) f(V::load(x + g * V::lanes)).store(y + g * V::lanes);
}

void unary_panel(Unary op, const float* x, float* y, int features, int groups) {
  const auto map = [&](auto f) { map_panel(x, y, features, groups, f); };
  switch (op) {
    case Unary::identity:
      return map([](V v) { return v; });
    case Unary::gelu:
      return map([](V v) { return gelu(v); });
    case Unary::gelu_tanh:
      return map([](V v) { return gelu_tanh(v); });
    case Unary::relu:
      return map([](V v) { return max(V::zero(), v); });
    case Unary::tanh:
      return map([](V v) { return tanh(v); });
    case Unary::sigmoid:
      return map([](V v) { return sigmoid(v); });
    case Unary::silu:
      return map([](V v) { return v * sigmoid(v); });
    case Unary::quick_gelu:
      return map([](V v) { return v * sigmoid(v * V::splat(1.702f)); });
    case Unary::erf:
      return map([](V v) { return erf(v); });
    case Unary::exp:
      return map([](V v) { return exp(v); });
    case Unary::sqrt:
      return map([](V v) { return sqrt(v); });
    case Unary::abs:
      return map([](V v) { return abs(v); });
    case Unary::neg:
      return map([](V v) { return V::zero() - v; });
    case Unary::reciprocal:
      return map([](V v) { return V::splat(1.0f) / v; });
    case Unary::elu:
      return map([](V v) { return elu(v); });
    case Unary::softplus:
      return map([](V v) { return softplus(v); });
  }
}

template <class F>
void zip_panel(const float* a, const float* b, float* y, int features, int groups, bool b_vector, int b_step, F f) {
  for (int i = 0; i < features; ++i, a += NB, y += NB) {
    for (int g = 0; g < groups; ++g) {
      const V other = b_vector ? V::broadcast(b + static_cast<long>(i) * b_step)
                               : V::load(b + static_cast<long>(i) * NB + g * V::lanes);
      f(V::load(a + g * V::lanes), other).store(y + g * V::lanes);
    }
  }
}

void binary_panel(Binary op, const float* a, const float* b, float* y, int features, int groups, bool b_vector,
                  int b_step) {
  const auto zip = [&](auto f) { zip_panel(a, b, y, features, groups, b_vector, b_step, f); };
  switch (op) {
    case Binary::add:
      return zip([](V p, V q) { return p + q; });
    case Binary::sub:
      return zip([](V p, V q) { return p - q; });
    case Binary::mul:
      return zip([](V p, V q) { return p * q; });
    case Binary::div:
      return zip([](V p, V q) { return p / q; });
    case Binary::max:
      return zip([](V p, V q) { return max(q, p); });
    case Binary::min:
      return zip([](V p, V q) { return min(q, p); });
  }
}
