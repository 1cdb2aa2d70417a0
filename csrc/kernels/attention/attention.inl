// softmax(scale Q K^T + bias) V for one head of one sequence, queries as lanes.
//
// S^T[key][query lanes] = K Q^T broadcasts keys against query vectors; the softmax is vertical; O^T[d][query lanes] =
// V^T P^T broadcasts values against probabilities. Nothing is transposed. Keys go by tiles with a running maximum and
// sum (online softmax, Milakov and Gimelshein 2018), so scratch does not grow with the sequence.

constexpr int kKeyTile = 256;
constexpr int kKeyBlock = 4;

// scratch: S^T or P^T [kKeyTile][NB], then O^T [Dv][NB].
long attention_scratch_floats(int value_size) {
  return static_cast<long>(kKeyTile + kKeyBlock + value_size + kRowBlock) * NB;
}

template <int R>
inline void score_tile(const AttentionTask& t, int query_group, int first_key, int keys, float* s) {
  const float* q[R];
  UNROLL for (int r = 0; r < R; ++r) q[r] = t.q[query_group + r];
  const V scale = V::splat(t.scale);
  for (int j = 0; j < keys; j += kKeyBlock) {
    const int key = first_key + j;
    const float* k = t.k[key / V::lanes] + key % V::lanes;
    V acc[kKeyBlock][R];
    UNROLL for (int i = 0; i < kKeyBlock; ++i) UNROLL for (int r = 0; r < R; ++r) acc[i][r] = V::zero();
    for (int d = 0; d < t.head_size; ++d) {
      V lane[R];
      UNROLL for (int r = 0; r < R; ++r) lane[r] = V::load(q[r] + static_cast<long>(d) * NB);
      UNROLL for (int i = 0; i < kKeyBlock; ++i) {
        const V kd = V::broadcast(k + static_cast<long>(d) * NB + i);
        UNROLL for (int r = 0; r < R; ++r) acc[i][r] = fma(kd, lane[r], acc[i][r]);
      }
    }
    UNROLL for (int i = 0; i < kKeyBlock; ++i) UNROLL for (int r = 0; r < R; ++r)(acc[i][r] * scale)
        .store(s + static_cast<long>(j + i) * NB + r * V::lanes);
  }
}

template <int R, int N>
inline void value_rows(const AttentionTask& t, int d, int first_key, int keys, const float* p, const V (&start)[R],
                       float* o) {
  V acc[N][R];
  UNROLL for (int i = 0; i < N; ++i) UNROLL for (int r = 0; r < R; ++r) acc[i][r] =
      V::load(o + static_cast<long>(i) * NB + r * V::lanes) * start[r];
  for (int j = 0; j < keys;) {
    const int key = first_key + j;
    const float* v = t.v[key / V::lanes] + static_cast<long>(d) * NB;
    const int lanes = keys - j < V::lanes ? keys - j : V::lanes;
    for (int l = 0; l < lanes; ++l, ++j) {
      V lane[R];
      UNROLL for (int r = 0; r < R; ++r) lane[r] = V::load(p + static_cast<long>(j) * NB + r * V::lanes);
      UNROLL for (int i = 0; i < N; ++i) {
        const V vd = V::broadcast(v + static_cast<long>(i) * NB + l);
        UNROLL for (int r = 0; r < R; ++r) acc[i][r] = fma(vd, lane[r], acc[i][r]);
      }
    }
  }
  UNROLL for (int i = 0; i < N; ++i) UNROLL for (int r = 0; r < R; ++r) acc[i][r].store(o + static_cast<long>(i) * NB +
                                                                                        r * V::lanes);
}

template <int R>
void attend(const AttentionTask& t, int query_group) {
  float* s = t.scratch;
  float* o = s + static_cast<long>(kKeyTile + kKeyBlock) * NB;
  V top[R], sum[R];
  UNROLL for (int r = 0; r < R; ++r) {
    top[r] = V::splat(-3.402823466e38f);  // not -inf: a tile of nothing but -inf must not make NaN of later ones
    sum[r] = V::zero();
  }
  for (int i = 0; i < t.value_size * NB; i += V::lanes) V::zero().store(o + i);

  for (int first = 0; first < t.length; first += kKeyTile) {
    const int keys = t.length - first < kKeyTile ? t.length - first : kKeyTile;
    score_tile<R>(t, query_group, first, keys, s);
    V best[R];
    UNROLL for (int r = 0; r < R; ++r) best[r] = top[r];
    for (int j = 0; j < keys; ++j) {
      float* row = s + static_cast<long>(j) * NB;
      const V key_bias = t.key_bias == nullptr ? V::zero() : V::broadcast(t.key_bias + first + j);
      const float* bias = t.bias == nullptr
                              ? nullptr
                              : t.bias + (first + j) * t.bias_stride + static_cast<long>(query_group) * V::lanes;
      UNROLL for (int r = 0; r < R; ++r) {
        V score = V::load(row + r * V::lanes);
        if (bias != nullptr) score = score + V::load(bias + r * V::lanes);
        if (t.key_bias != nullptr) score = score + key_bias;
        if (bias != nullptr || t.key_bias != nullptr) score.store(row + r * V::lanes);
        best[r] = max(score, best[r]);
      }
    }
    V correction[R];
    UNROLL for (int r = 0; r < R; ++r) {
      correction[r] = exp_nonpositive(top[r] - best[r]);
      top[r] = best[r];
      sum[r] = sum[r] * correction[r];
    }
    for (int j = 0; j < keys; ++j) {
      float* row = s + static_cast<long>(j) * NB;
      UNROLL for (int r = 0; r < R; ++r) {
        const V p = exp_nonpositive(V::load(row + r * V::lanes) - top[r]);
        sum[r] = sum[r] + p;
        p.store(row + r * V::lanes);
      }
    }
    int d = 0;
    for (; d + 4 <= t.value_size; d += 4)
      value_rows<R, 4>(t, d, first, keys, s, correction, o + static_cast<long>(d) * NB);
    for (; d < t.value_size; ++d) value_rows<R, 1>(t, d, first, keys, s, correction, o + static_cast<long>(d) * NB);
  }
  UNROLL for (int r = 0; r < R; ++r) {
    const V inverse = V::splat(1.0f) / sum[r];
    float* out = t.out[query_group + r];
    for (int d = 0; d < t.value_size; ++d)
      (V::load(o + static_cast<long>(d) * NB + r * V::lanes) * inverse).store(out + static_cast<long>(d) * NB);
  }
}

template <int R = MAX_GROUPS>
void attend_groups(const AttentionTask& t, int query_group, int groups) {
  if (groups == R) return attend<R>(t, query_group);
  if constexpr (R > 1) attend_groups<R - 1>(t, query_group, groups);
}

void attention(const AttentionTask& t) {
  for (int g = t.first_group; g < t.last_group; g += MAX_GROUPS) {
    const int groups = t.last_group - g < MAX_GROUPS ? t.last_group - g : MAX_GROUPS;
    attend_groups(t, g, groups);
  }
}
