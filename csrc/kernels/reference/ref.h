// What every kernel computes, in plain double precision: the definitions that tests hold all kernel sets to.
//
// Panels are given with their width: x[feature * width + lane]. Results are [feature][lane] over `lanes` lanes.
// `bound`, where there is one, is the error that float arithmetic may make under the stated formula.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernel_set.h"

namespace espalier::reference {

struct Result {
  std::vector<double> value;  // [features][lanes]
  std::vector<double> bound;  // the same; absolute
};

// Unit of every bound: the distance from 1 to the next float. It is twice the rounding error of one operation, which
// leaves room for multiply-adds that are not fused.
inline constexpr double kEpsilon = 1.1920928955078125e-07;

double unary(Unary op, double x);
// Absolute error that a kernel set may make at x, result y: what activation.inl states.
double unary_bound(Unary op, double x, double y);
double binary(Binary op, double a, double b);

// Rows [first, last) of act(W x + bias + residual); weight is dense [M][K]. Only nonzero weights count,
// so that 0 * inf does not. bound: (K + 4) epsilon (sum |w x| + |bias| + |residual|), carried through the activation.
Result linear(const float* weight, int rows, int columns, const float* x, int width, int lanes, int first, int last,
              const Epilogue& e);

// Tokens quantised to 8 bits.
struct Quantized {
  std::vector<int> q;        // [features][lanes]
  std::vector<float> scale;  // [lanes]
  std::vector<float> zero;   // [lanes]
};

// Exactly what kernels give: see kernel_set.h. `fixed` null: per token.
Quantized quantize(const float* x, int features, int width, int lanes, const Quantization* fixed);

// Rows of W x before the activation, exactly what kernels give: [rows][lanes]. w: [rows][columns] within [-255, 255].
std::vector<float> linear8(const std::int16_t* w, const float* scales, int rows, int columns, const Quantized& x,
                           const Epilogue& e, int width);

// bound: mean off by d = (F + 2) epsilon mean|x|, then (2 d / sigma (1 + |z|) + (F + 8) epsilon |z|) |gamma| + epsilon
// |beta| for z = (x - mean) / sigma.
Result layer_norm(const float* x, int features, int width, int lanes, const float* gamma, const float* beta,
                  float epsilon);

// bound: (F + 10 + |x - max|) epsilon y, and the smallest normal number below which exp gives 0.
Result softmax(const float* x, int features, int width, int lanes);

// bound: (F + 4) epsilon |y|
Result l2_normalize(const float* x, int features, int width, int lanes, float epsilon);

// One head of one sequence; q, k: [length][D], v: [length][Dv] row by row. bias: [key][stride] or null, queries
// contiguous. Scores are rounded to float before anything is added, as kernels do: a row whose every key is masked with
// the lowest float comes out uniform. value is [Dv][query].
// bound: with e the largest error of a score, (2 e + (length + 16) epsilon) sum p |v|.
Result attention(const std::vector<float>& q, const std::vector<float>& k, const std::vector<float>& v, int length,
                 int head_size, int value_size, float scale, const float* key_bias, const float* bias,
                 long bias_stride);

// panel[f][lane] = rows[lane][f], or 0 for a null row.
Result transpose_in(const float* const* rows, int count, int features);

}  // namespace espalier::reference
