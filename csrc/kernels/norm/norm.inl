// Reductions over features. The token is the lane, so sums are vertical and need no shuffles.

void layer_norm_panel(const float* x, float* y, int features, int groups, const float* gamma, const float* beta, float epsilon) {
  const V inverse = V::splat(1.0f / static_cast<float>(features));
  for (int g = 0; g < groups; ++g) {
    const float* xg = x + g * V::lanes;
    float* yg = y + g * V::lanes;
    V sum[2] = {V::zero(), V::zero()};
    for (int i = 0; i < features; ++i) sum[i & 1] = sum[i & 1] + V::load(xg + static_cast<long>(i) * NB);
    const V mean = (sum[0] + sum[1]) * inverse;
    // Two passes: the one-pass formula E[x^2] - E[x]^2 cancels when the mean is large.
    V square[2] = {V::zero(), V::zero()};
    for (int i = 0; i < features; ++i) {
      const V d = V::load(xg + static_cast<long>(i) * NB) - mean;
      square[i & 1] = fma(d, d, square[i & 1]);
    }
    const V factor = V::splat(1.0f) / sqrt(fma(square[0] + square[1], inverse, V::splat(epsilon)));
    for (int i = 0; i < features; ++i) {
      const V d = (V::load(xg + static_cast<long>(i) * NB) - mean) * factor;
      const V shift = beta == nullptr ? V::zero() : V::broadcast(beta + i);
      fma(d, V::broadcast(gamma + i), shift).store(yg + static_cast<long>(i) * NB);
    }
  }
}

void softmax_panel(const float* x, float* y, int features, int groups) {
  for (int g = 0; g < groups; ++g) {
    const float* xg = x + g * V::lanes;
    float* yg = y + g * V::lanes;
    V top = V::load(xg);
    for (int i = 1; i < features; ++i) top = max(top, V::load(xg + static_cast<long>(i) * NB));
    V sum = V::zero();
    for (int i = 0; i < features; ++i) {
      const V e = exp_nonpositive(V::load(xg + static_cast<long>(i) * NB) - top);
      sum = sum + e;
      e.store(yg + static_cast<long>(i) * NB);
    }
    for (int i = 0; i < features; ++i) (V::load(yg + static_cast<long>(i) * NB) / sum).store(yg + static_cast<long>(i) * NB);
  }
}

void l2_normalize_panel(const float* x, float* y, int features, int groups, float epsilon) {
  for (int g = 0; g < groups; ++g) {
    const float* xg = x + g * V::lanes;
    float* yg = y + g * V::lanes;
    V sum = V::zero();
    for (int i = 0; i < features; ++i) {
      const V v = V::load(xg + static_cast<long>(i) * NB);
      sum = fma(v, v, sum);
    }
    const V norm = max(V::splat(epsilon), sqrt(sum));
    for (int i = 0; i < features; ++i) (V::load(xg + static_cast<long>(i) * NB) / norm).store(yg + static_cast<long>(i) * NB);
  }
}
