#include "kernels/reference/ref.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstddef>

namespace espalier::reference {

namespace {

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

std::size_t at(int feature, int stride, int lane) {
  return static_cast<std::size_t>(feature) * static_cast<std::size_t>(stride) + static_cast<std::size_t>(lane);
}

Result sized(int features, int lanes) {
  const std::size_t n = static_cast<std::size_t>(features) * static_cast<std::size_t>(lanes);
  return {std::vector<double>(n), std::vector<double>(n)};
}

}  // namespace

double unary(Unary op, double x) {
  switch (op) {
    case Unary::identity:
      return x;
    case Unary::gelu:
      return 0.5 * x * (1.0 + std::erf(x / std::sqrt(2.0)));
    case Unary::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Unary::relu:
      return x < 0.0 ? 0.0 : x;
    case Unary::tanh:
      return std::tanh(x);
    case Unary::sigmoid:
      return sigmoid(x);
    case Unary::silu:
      return x * sigmoid(x);
    case Unary::quick_gelu:
      return x * sigmoid(1.702 * x);
    case Unary::erf:
      return std::erf(x);
    case Unary::exp:
      return std::exp(x);
    case Unary::sqrt:
      return std::sqrt(x);
    case Unary::abs:
      return std::fabs(x);
    case Unary::neg:
      return -x;
    case Unary::reciprocal:
      return 1.0 / x;
    case Unary::elu:
      return x < 0.0 ? std::expm1(x) : x;
    case Unary::softplus:
      return std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
  }
  return std::nan("");
}

double unary_bound(Unary op, double x, double y) {
  const double tiny = FLT_MIN;
  switch (op) {
    case Unary::gelu:
      return 1.3e-6 + 2.0 * kEpsilon * std::fabs(y);
    case Unary::gelu_tanh:
      return 8e-7 + 2.0 * kEpsilon * std::fabs(y);
    case Unary::erf:
      return 4e-7;
    case Unary::tanh:
      return 3e-7;
    case Unary::elu:
      return x > 0.0 ? 0.0 : 3e-7;
    case Unary::softplus:
      return 4.0 * kEpsilon * std::fabs(y) + 2.0 * tiny;
    case Unary::sigmoid:
      return 4.0 * kEpsilon * std::fabs(y) + tiny;
    case Unary::silu:
    case Unary::quick_gelu:
      // The exponent is rounded: |x| epsilon of e^-x.
      return (4.0 + 2.0 * std::min(std::fabs(x), 100.0)) * kEpsilon * std::fabs(y) + 100.0 * tiny;
    case Unary::exp:
      return 2.0 * kEpsilon * std::fabs(y) + tiny;
    case Unary::sqrt:
    case Unary::reciprocal:
      return kEpsilon * std::fabs(y) + tiny;
    default:
      return 0.0;
  }
}

double binary(Binary op, double a, double b) {
  switch (op) {
    case Binary::add:
      return a + b;
    case Binary::sub:
      return a - b;
    case Binary::mul:
      return a * b;
    case Binary::div:
      return a / b;
    case Binary::max:
      return b > a ? b : a;
    case Binary::min:
      return b < a ? b : a;
  }
  return std::nan("");
}

Result linear(const float* weight, int rows, int columns, const float* x, int width, int lanes, int first, int last,
              const Epilogue& e) {
  Result out = sized(rows, lanes);
  for (int m = first; m < last; ++m) {
    for (int lane = 0; lane < lanes; ++lane) {
      double sum = e.bias == nullptr ? 0.0 : e.bias[m];
      double size = std::fabs(sum);
      if (e.residual != nullptr) {
        sum += e.residual[at(m, width, lane)];
        size += std::fabs(e.residual[at(m, width, lane)]);
      }
      for (int k = 0; k < columns; ++k) {
        const double w = weight[at(m, columns, k)];
        if (w == 0.0) continue;
        const double term = w * x[at(k, width, lane)];
        sum += term;
        size += std::fabs(term);
      }
      const double before = (columns + 4) * kEpsilon * size + columns * static_cast<double>(FLT_MIN);
      const double y = unary(e.act, sum);
      out.value[at(m, lanes, lane)] = y;
      // No activation tested here is steeper than 1.2, except exp, sqrt and reciprocal, which networks do not fuse.
      out.bound[at(m, lanes, lane)] = e.act == Unary::identity ? before : 1.2 * before + unary_bound(e.act, sum, y);
    }
  }
  return out;
}

namespace {

// Operations of floats, each rounded once: double is wide enough that its own rounding does not show, and no compiler
// can fuse two of them.
float plus(double a, double b) { return static_cast<float>(a + b); }
float times(double a, double b) { return static_cast<float>(a * b); }
float over(double a, double b) { return static_cast<float>(a / b); }

float to_range(float q) { return std::isnan(q) ? 0.0f : std::clamp(q, 0.0f, 255.0f); }

}  // namespace

Quantized quantize(const float* x, int features, int width, int lanes, const Quantization* fixed) {
  Quantized out;
  for (int lane = 0; lane < lanes; ++lane) {
    float low = 0.0f, high = 0.0f;
    bool finite = true;
    for (int f = 0; f < features; ++f) {
      const float v = x[at(f, width, lane)];
      finite = finite && std::isfinite(v);
      low = v < low ? v : low;
      high = v > high ? v : high;
    }
    const float range = plus(high, -low);
    const float step = finite && std::isfinite(range) ? over(range, 255.0) : std::nanf("");
    const float scale = fixed != nullptr ? fixed->scale : step == 0.0f ? 1.0f : step;
    out.scale.push_back(scale);
    out.zero.push_back(fixed != nullptr ? fixed->zero : to_range(std::nearbyint(over(-low, scale))));
  }
  for (int f = 0; f < features; ++f)
    for (int lane = 0; lane < lanes; ++lane) {
      const std::size_t l = static_cast<std::size_t>(lane);
      out.q.push_back(
          static_cast<int>(to_range(plus(std::nearbyint(over(x[at(f, width, lane)], out.scale[l])), out.zero[l]))));
    }
  return out;
}

std::vector<float> linear8(const std::int16_t* w, const float* scales, int rows, int columns, const Quantized& x,
                           const Epilogue& e, int width) {
  const int lanes = static_cast<int>(x.scale.size());
  std::vector<float> out;
  for (int m = 0; m < rows; ++m) {
    for (int lane = 0; lane < lanes; ++lane) {
      const std::size_t l = static_cast<std::size_t>(lane);
      std::int64_t sum = 0;
      for (int k = 0; k < columns; ++k)
        sum += (x.q[at(k, lanes, lane)] - static_cast<int>(x.zero[l])) * w[at(m, columns, k)];
      float y = times(times(static_cast<float>(sum), x.scale[l]), scales[m]);
      y = plus(y, e.bias == nullptr ? 0.0f : e.bias[m]);
      if (e.residual != nullptr) y = plus(y, e.residual[at(m, width, lane)]);
      out.push_back(y);
    }
  }
  return out;
}

Result layer_norm(const float* x, int features, int width, int lanes, const float* gamma, const float* beta,
                  float epsilon) {
  Result out = sized(features, lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    double mean = 0.0, size = 0.0, square = 0.0;
    for (int f = 0; f < features; ++f) {
      mean += x[at(f, width, lane)];
      size += std::fabs(x[at(f, width, lane)]);
    }
    mean /= features;
    size /= features;
    for (int f = 0; f < features; ++f) square += (x[at(f, width, lane)] - mean) * (x[at(f, width, lane)] - mean);
    const double sigma = std::sqrt(square / features + epsilon);
    const double off = (features + 2) * kEpsilon * size;
    for (int f = 0; f < features; ++f) {
      const double z = (x[at(f, width, lane)] - mean) / sigma;
      const double shift = beta == nullptr ? 0.0 : beta[f];
      out.value[at(f, lanes, lane)] = z * gamma[f] + shift;
      out.bound[at(f, lanes, lane)] =
          (2.0 * off / sigma * (1.0 + std::fabs(z)) + (features + 8) * kEpsilon * std::fabs(z)) * std::fabs(gamma[f]) +
          kEpsilon * std::fabs(shift) + FLT_MIN;
    }
  }
  return out;
}

Result softmax(const float* x, int features, int width, int lanes) {
  Result out = sized(features, lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    double top = -HUGE_VAL, sum = 0.0;
    for (int f = 0; f < features; ++f) top = std::max(top, static_cast<double>(x[at(f, width, lane)]));
    for (int f = 0; f < features; ++f) sum += std::exp(x[at(f, width, lane)] - top);
    for (int f = 0; f < features; ++f) {
      const double below = top - x[at(f, width, lane)];
      const double y = std::exp(-below) / sum;
      out.value[at(f, lanes, lane)] = y;
      out.bound[at(f, lanes, lane)] = (features + 10 + std::min(below, 1e3)) * kEpsilon * y + 2.0 * FLT_MIN;
    }
  }
  return out;
}

Result l2_normalize(const float* x, int features, int width, int lanes, float epsilon) {
  Result out = sized(features, lanes);
  for (int lane = 0; lane < lanes; ++lane) {
    double sum = 0.0;
    for (int f = 0; f < features; ++f) sum += static_cast<double>(x[at(f, width, lane)]) * x[at(f, width, lane)];
    const double norm = std::isnan(sum) ? sum : std::max(std::sqrt(sum), static_cast<double>(epsilon));
    for (int f = 0; f < features; ++f) {
      const double y = x[at(f, width, lane)] / norm;
      out.value[at(f, lanes, lane)] = y;
      out.bound[at(f, lanes, lane)] = (features + 4) * kEpsilon * std::fabs(y) + FLT_MIN;
    }
  }
  return out;
}

Result attention(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, int length,
                 int head_size, int value_size, float scale, const float* key_bias, const float* bias,
                 long bias_stride) {
  Result out = sized(value_size, length);
  std::vector<double> score(static_cast<std::size_t>(length));
  for (int i = 0; i < length; ++i) {
    double worst = 0.0, top = -HUGE_VAL, sum = 0.0;
    for (int j = 0; j < length; ++j) {
      double dot = 0.0, size = 0.0;
      for (int d = 0; d < head_size; ++d) {
        const double term = static_cast<double>(q[at(i, head_size, d)]) * k[at(j, head_size, d)];
        dot += term;
        size += std::fabs(term);
      }
      float s = static_cast<float>(dot * scale);
      double error = (head_size + 4) * kEpsilon * size * std::fabs(scale);
      if (bias != nullptr) s += bias[j * bias_stride + i];
      if (bias != nullptr) error += kEpsilon * std::fabs(s);
      if (key_bias != nullptr) s += key_bias[j];
      if (std::isfinite(s) && std::fabs(s) < 1e30f) worst = std::max(worst, error + kEpsilon * std::fabs(s));
      score[static_cast<std::size_t>(j)] = s;
      top = std::isnan(s) ? s : std::max(top, static_cast<double>(s));
    }
    for (double& s : score) sum += s = std::exp(s - top);
    for (int d = 0; d < value_size; ++d) {
      double y = 0.0, size = 0.0;
      for (int j = 0; j < length; ++j) {
        const double term = score[static_cast<std::size_t>(j)] / sum * v[at(j, value_size, d)];
        y += term;
        size += std::fabs(term);
      }
      out.value[at(d, length, i)] = y;
      out.bound[at(d, length, i)] =
          (2.0 * worst + (length + 16) * kEpsilon) * size + length * static_cast<double>(FLT_MIN);
    }
  }
  return out;
}

Result transpose_in(const float* const* rows, int count, int features) {
  Result out = sized(features, count);
  for (int lane = 0; lane < count; ++lane)
    for (int f = 0; f < features; ++f) out.value[at(f, count, lane)] = rows[lane] == nullptr ? 0.0 : rows[lane][f];
  return out;
}

}  // namespace espalier::reference
