// Reductions over features. The token is the lane, so sums are vertical and need no shuffles.

template <int R>
void layer_norm_groups(const float* x, float* y, int features, const float* gamma, const float* beta, float epsilon) {
  const V inverse = V::splat(1.0f / static_cast<float>(features));
  V sum[R], square[R];
  UNROLL for (int r = 0; r < R; ++r) sum[r] = square[r] = V::zero();
  for (int i = 0; i < features; ++i) {
    UNROLL for (int r = 0; r < R; ++r) sum[r] = sum[r] + V::load(x + static_cast<long>(i) * NB + r * V::lanes);
  }
  V mean[R];
  UNROLL for (int r = 0; r < R; ++r) mean[r] = sum[r] * inverse;
  // Two passes: the one-pass formula E[x^2] - E[x]^2 cancels when the mean is large.
  for (int i = 0; i < features; ++i) {
    UNROLL for (int r = 0; r < R; ++r) {
      const V d = V::load(x + static_cast<long>(i) * NB + r * V::lanes) - mean[r];
      square[r] = fma(d, d, square[r]);
    }
  }
  V factor[R];
  UNROLL for (int r = 0; r < R; ++r) factor[r] = V::splat(1.0f) / sqrt(fma(square[r], inverse, V::splat(epsilon)));
  for (int i = 0; i < features; ++i) {
    const V scale = V::broadcast(gamma + i);
    const V shift = beta == nullptr ? V::zero() : V::broadcast(beta + i);
    UNROLL for (int r = 0; r < R; ++r) {
      const V d = (V::load(x + static_cast<long>(i) * NB + r * V::lanes) - mean[r]) * factor[r];
      fma(d, scale, shift).store(y + static_cast<long>(i) * NB + r * V::lanes);
    }
  }
}

template <int R = MAX_GROUPS>
void layer_norm_panel(const float* x, float* y, int features, int groups, const float* gamma, const float* beta,
                      float epsilon) {
  if (groups == R) return layer_norm_groups<R>(x, y, features, gamma, beta, epsilon);
  if constexpr (R > 1) layer_norm_panel<R - 1>(x, y, features, groups, gamma, beta, epsilon);
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
    for (int i = 0; i < features; ++i)
      (V::load(yg + static_cast<long>(i) * NB) / sum).store(yg + static_cast<long>(i) * NB);
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
    for (int i = 0; i < features; ++i)
      (V::load(xg + static_cast<long>(i) * NB) / norm).store(yg + static_cast<long>(i) * NB);
  }
}
