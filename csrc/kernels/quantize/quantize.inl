// Floats to quantised panels and back. Everything is vertical: a token's scale and zero are those of its lane.

constexpr long quantized_bytes(int features) {
  return static_cast<long>((features + kFeatureBlock - 1) / kFeatureBlock) * kFeatureBlock * NB;
}

inline const float* scales_of(const std::uint8_t* panel, int features) {
  return reinterpret_cast<const float*>(panel + quantized_bytes(features));
}
inline const float* zeros_of(const std::uint8_t* panel, int features) { return scales_of(panel, features) + NB; }

// From q to what the panel holds, and back.
inline I flip(I bytes) { return I::signed_bytes ? bytes ^ I::splat(static_cast<std::int32_t>(0x80808080u)) : bytes; }
constexpr float kZeroShift = I::signed_bytes ? 128.0f : 0.0f;

inline V to_range(V q) { return min(max(q, V::zero()), V::splat(255.0f)); }  // NaN becomes 0

template <int R>
inline void quantize_rows(const float* x, std::uint8_t* y, int features, const V (&scale)[R], const V (&zero)[R]) {
  for (int f = 0; f < features; f += kFeatureBlock, x += kFeatureBlock * NB, y += kFeatureBlock * NB) {
    UNROLL for (int r = 0; r < R; ++r) {
      const auto byte = [&](int i) {
        return to_int(to_range(round(V::load(x + i * NB + r * V::lanes) / scale[r]) + zero[r]));
      };
      const I word = byte(0) | shift_left<8>(byte(1)) | shift_left<16>(byte(2)) | shift_left<24>(byte(3));
      flip(word).store(y + r * V::lanes * kFeatureBlock);
    }
  }
}

template <int R>
inline void store_parameters(std::uint8_t* panel, int features, const V (&scale)[R], const V (&zero)[R]) {
  float* at = reinterpret_cast<float*>(panel + quantized_bytes(features));
  UNROLL for (int r = 0; r < R; ++r) {
    scale[r].store(at + r * V::lanes);
    (zero[r] - V::splat(kZeroShift)).store(at + NB + r * V::lanes);
  }
}

template <int R>
inline void fixed_parameters(const Quantization& q, V (&scale)[R], V (&zero)[R]) {
  UNROLL for (int r = 0; r < R; ++r) {
    scale[r] = V::splat(q.scale);
    zero[r] = V::splat(q.zero);
  }
}

template <int R>
inline void token_parameters(const float* x, int features, V (&scale)[R], V (&zero)[R]) {
  V low[R], high[R], poison[R];  // poison: NaN for a token with a feature that is not finite, otherwise 0
  UNROLL for (int r = 0; r < R; ++r) low[r] = high[r] = poison[r] = V::zero();
  for (int f = 0; f < features; ++f, x += NB) {
    UNROLL for (int r = 0; r < R; ++r) {
      const V v = V::load(x + r * V::lanes);
      low[r] = min(v, low[r]);
      high[r] = max(v, high[r]);
      poison[r] = fma(v, V::zero(), poison[r]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r) {
    const V range = high[r] - low[r];
    const V step = range / V::splat(255.0f) + fma(range, V::zero(), poison[r]);
    scale[r] = select_lt(step, V::splat(__FLT_DENORM_MIN__), V::splat(1.0f), step);
    zero[r] = to_range(round(V::zero() - low[r] / scale[r]));
  }
}

template <int R = MAX_GROUPS>
void quantize_panel(const float* x, std::uint8_t* y, int features, int groups, const Quantization* fixed) {
  if (groups == R) {
    V scale[R], zero[R];
    if (fixed != nullptr)
      fixed_parameters(*fixed, scale, zero);
    else
      token_parameters(x, features, scale, zero);
    quantize_rows(x, y, features, scale, zero);
    return store_parameters(y, features, scale, zero);
  }
  if constexpr (R > 1) quantize_panel<R - 1>(x, y, features, groups, fixed);
}

// What dequantize, an addition and quantize would do one after the other, without the floats in between.
template <int R = MAX_GROUPS>
void add8_panel(const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* y, int features, int groups, bool relu,
                const Quantization& out) {
  if (groups == R) {
    struct Operand {
      const std::uint8_t* from;
      V scale[R], zero[R];
      Operand(const std::uint8_t* panel, int features) : from(panel) {
        UNROLL for (int r = 0; r < R; ++r) {
          scale[r] = V::load(scales_of(panel, features) + r * V::lanes);
          zero[r] = V::load(zeros_of(panel, features) + r * V::lanes) + V::splat(kZeroShift);
        }
      }
    };
    const Operand p(a, features), q(b, features);
    const V least = V::splat(relu ? 0.0f : -__builtin_inff());
    V scale[R], zero[R];
    fixed_parameters(out, scale, zero);
    for (long at = 0; at < quantized_bytes(features); at += kFeatureBlock * NB) {
      UNROLL for (int r = 0; r < R; ++r) {
        const long word = at + r * V::lanes * kFeatureBlock;
        const I x = flip(I::load(p.from + word)), z = flip(I::load(q.from + word));
        const auto value = [&](const Operand& of, I byte) {
          return (to_float(byte & I::splat(255)) - of.zero[r]) * of.scale[r];
        };
        const auto byte = [&](I u, I v) {
          const V sum = max(least, value(p, u) + value(q, v));
          return to_int(to_range(round(sum / scale[r]) + zero[r]));
        };
        const I result = byte(x, z) | shift_left<8>(byte(shift_right<8>(x), shift_right<8>(z))) |
                         shift_left<16>(byte(shift_right<16>(x), shift_right<16>(z))) |
                         shift_left<24>(byte(shift_right<24>(x), shift_right<24>(z)));
        flip(result).store(y + word);
      }
    }
    return store_parameters(y, features, scale, zero);
  }
  if constexpr (R > 1) add8_panel<R - 1>(a, b, y, features, groups, relu, out);
}

// The integers alone: both operands have one scale and zero.
void max8_panel(const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* y, int features, int groups) {
  for (long at = 0; at < quantized_bytes(features); at += kFeatureBlock * NB) {
    for (int g = 0; g < groups; ++g) {
      const long word = at + g * V::lanes * kFeatureBlock;
      flip(max_bytes(flip(I::load(a + word)), flip(I::load(b + word)))).store(y + word);
    }
  }
}

void dequantize_panel(const std::uint8_t* x, float* y, int features, int groups) {
  for (int g = 0; g < groups; ++g) {
    const V scale = V::load(scales_of(x, features) + g * V::lanes);
    const V zero = V::load(zeros_of(x, features) + g * V::lanes) + V::splat(kZeroShift);
    const std::uint8_t* from = x + g * V::lanes * kFeatureBlock;
    float* to = y + g * V::lanes;
    for (int f = 0; f < features; f += kFeatureBlock, from += kFeatureBlock * NB, to += kFeatureBlock * NB) {
      const I word = flip(I::load(from));
      const auto value = [&](I byte) { return (to_float(byte & I::splat(255)) - zero) * scale; };
      value(word).store(to);
      value(shift_right<8>(word)).store(to + NB);
      value(shift_right<16>(word)).store(to + 2 * NB);
      value(shift_right<24>(word)).store(to + 3 * NB);
    }
  }
}
