// The kernels of one instruction set, as a table of plain functions. This file is the contract; every set obeys it.
//
// Token panels. Activations of NB tokens stand feature by feature: x[feature][NB], the token being the SIMD lane.
// NB = lanes * max_groups is fixed per instruction set; a *group* is `lanes` neighbouring tokens. A panel may hold
// fewer than max_groups groups: kernels then leave the lanes beyond alone. Feature counts of buffers are rounded up to
// a multiple of kRowBlock, so that kernels may write whole row blocks.
//
// ISA files define these functions in an anonymous namespace and export nothing but their table: an inline function
// compiled for AVX must never be the copy that the linker keeps for everybody.
#pragma once

#include <cstdint>

namespace espalier {

inline constexpr int kRowBlock = 4;
// Outputs that linear kernels take together, counted from the first: calls do best to begin at a multiple of it.
inline constexpr int kRowStep = 32;

enum class WeightFormat : std::uint8_t {
  dense,         // values[chunk][M/4][columns of the chunk][4]
  unstructured,  // per chunk of K and row: values[nnz], offsets[nnz]
  block4x1,      // per chunk of K and four rows: values[blocks][4], offsets[blocks]
};

enum class Unary : std::uint8_t {
  identity,
  gelu,       // 0.5 x (1 + erf(x / sqrt 2))
  gelu_tanh,  // 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
  relu,
  tanh,
  sigmoid,
  silu,        // x sigmoid(x)
  quick_gelu,  // x sigmoid(1.702 x)
  erf,
  exp,
  sqrt,
  abs,
  neg,
  reciprocal,
  elu,       // x, or e^x - 1 below zero
  softplus,  // log(1 + e^x)
};

enum class Binary : std::uint8_t { add, sub, mul, div, max, min };

// A packed weight of M rows (outputs) and K columns (inputs).
struct PackedWeight {
  WeightFormat format = WeightFormat::dense;
  int rows = 0;     // M
  int columns = 0;  // K
  int chunk = 0;    // columns per chunk; the last chunk may be shorter
  int chunks = 0;
  const float* values = nullptr;
  // Floats from the chunk's first feature to the entry's feature in a panel: (column - chunk start) * NB.
  const std::uint16_t* offsets = nullptr;
  // starts[c * (units + 1) + u]: first entry of unit u (a row, or four rows) in chunk c. Unused by dense.
  const std::uint32_t* starts = nullptr;
  int units = 0;
};

// Quantised panels. A value x is scale (q - zero) with q and zero integers in [0, 255], scale and zero per token. A
// panel holds bytes[F / 4 rounded up][NB][4], the four neighbouring features of a token together, and after them the
// floats scale[NB] and zero[NB]: the size of F / 4 + 2 features of floats. The missing features of the last four are
// there, with any value. A set may keep q - 128 and zero - 128 instead (`signed_bytes`).
inline constexpr int kFeatureBlock = 4;
inline constexpr int kQuantizedExtra = 2;  // features of floats for scale and zero

// Of PackedWeight8::offsets, in bytes: what makes the last of 65536 columns reachable in 16 bits, for every set.
constexpr int offset_unit(int lanes) { return lanes >= 16 ? 64 : 32; }

// One scale and zero for all tokens.
struct Quantization {
  float scale = 1.0f;
  float zero = 0.0f;
};

enum class WeightFormat8 : std::uint8_t {
  dense8,   // every block of 1 output x 4 inputs
  block1x4  // blocks that hold a nonzero
};

// A packed weight of M rows and K columns of integers. Both formats have a list of blocks of 1 output x 4 inputs per
// row, in pairs that a kernel may add in 16 bits; there may be several blocks for the same inputs, and empty ones to
// complete a pair. Sums are exact: weights whose rows could overflow 32 bits are never packed.
struct PackedWeight8 {
  WeightFormat8 format = WeightFormat8::dense8;
  int rows = 0;
  int columns = 0;
  // dense8: [M / tile_rows][K / tile_columns][tile_rows outputs][tile_columns inputs], see KernelSet. M is rounded up;
  // inputs beyond the last whole tile are among the blocks.
  const std::int8_t* dense = nullptr;
  const std::int8_t* blocks = nullptr;  // [pairs][2][4 inputs]
  // From the panel's start to the block's inputs, in units of offset_unit(lanes) bytes.
  const std::uint16_t* offsets = nullptr;  // [pairs][2]
  const std::uint32_t* starts = nullptr;   // [M rounded up + 1]: first pair of each row
  const float* scales = nullptr;           // [M rounded up]
  const std::int32_t* sums = nullptr;      // [M rounded up]: of each row's weights
};

// How a linear layer begins and ends: y = act(W x + bias + residual).
struct Epilogue {
  const float* bias = nullptr;      // [M rounded up to kRowBlock]
  const float* residual = nullptr;  // a panel, [M][NB]
  Unary act = Unary::identity;
  const Quantization* quantization = nullptr;  // linear8 alone: y is a quantised panel
};

// Queries and keys of one sequence in one head. Group g of the sequence stands at base + group_offset[g] for a
// buffer whose panels hold `features` features.
struct AttentionTask {
  const float* const* q = nullptr;  // [groups] -> [D][NB], this head's first feature
  const float* const* k = nullptr;  // [groups] -> [D][NB]
  const float* const* v = nullptr;  // [groups] -> [Dv][NB]
  float* const* out = nullptr;      // [groups] -> [Dv][NB]
  int length = 0;                   // tokens of the sequence; the last group may be partly unused
  int first_group = 0;              // queries: groups [first_group, last_group)
  int last_group = 0;
  int head_size = 0;   // D
  int value_size = 0;  // Dv
  float scale = 1.0f;
  const float* key_bias = nullptr;  // [length], added to every score of that key
  const float* bias = nullptr;      // [length keys][bias_stride], queries contiguous
  long bias_stride = 0;
  float* scratch = nullptr;  // attention_scratch(Dv) floats
};

// Neighbouring lanes of every row that come from one place: lane `lane` + i of row r is x[r * stride + i], or
// x[r * stride + 2 * i].
struct LaneRun {
  const float* x = nullptr;
  long stride = 0;  // NB; 0 for what is the same in every row
  int lane = 0;
  bool every_second = false;
};

struct KernelSet {
  const char* name;
  int lanes;
  int max_groups;
  // Products of a byte and a weight are added in 16 bits, two of neighbouring inputs and two of a pair of blocks:
  // packed weights of one sign must sum to no more than 128 there.
  bool sums_16_bit;
  bool signed_bytes;  // quantised panels hold q - 128 and zero - 128
  int tile_rows;      // of dense8: kRowBlock, or what a matrix unit takes
  int tile_columns;   // likewise, and kFeatureBlock

  // y rows [first_row, last_row) of a panel of `groups` groups. x: [K][NB], y: [M][NB]. Row bounds are multiples of
  // kRowBlock (or M). x and y must not overlap; residual may be y.
  void (*linear)(const PackedWeight& w, const float* x, float* y, int groups, int first_row, int last_row,
                 const Epilogue& e);
  // The same over a quantised panel: y = act((sum_k (q - zero) w) scale_x scale_w + bias + residual),
  // the sum in integers. With e.quantization y is a quantised panel, and the call with the last row writes its scale
  // and zero.
  void (*linear8)(const PackedWeight8& w, const std::uint8_t* x, float* y, int groups, int first_row, int last_row,
                  const Epilogue& e);
  // x: [F][NB]; y: quantised panel. With `fixed` q = saturate(round_half_even(x / scale) + zero), as ONNX's
  // QuantizeLinear; NaN gives 0, as in ONNX Runtime. Without, each token gets the scale and zero of ONNX's
  // DynamicQuantizeLinear over its own features; the scale is NaN when a feature is not finite or the range overflows.
  void (*quantize)(const float* x, std::uint8_t* y, int features, int groups, const Quantization* fixed);
  void (*dequantize)(const std::uint8_t* x, float* y, int features, int groups);  // (q - zero) scale
  // Quantised panels: y = a + b, with `relu` max(a + b, 0), as dequantize, binary, unary and quantize would have it.
  void (*add8)(const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* y, int features, int groups, bool relu,
               const Quantization& out);
  // The larger of each two integers of quantised panels with one scale and zero; y gets neither, and may be a.
  void (*max8)(const std::uint8_t* a, const std::uint8_t* b, std::uint8_t* y, int features, int groups);
  // x: [F][NB] in place of y allowed. y = (x - mean) / sqrt(var + epsilon) * gamma + beta over features; beta may be
  // null.
  void (*layer_norm)(const float* x, float* y, int features, int groups, const float* gamma, const float* beta,
                     float epsilon);
  // [F][NB], in place allowed.
  void (*unary)(Unary op, const float* x, float* y, int features, int groups);
  // y = a op b. b is a panel [F][NB], or with `b_vector` one number per feature ([F]); `b_step` 0 repeats b[0].
  void (*binary)(Binary op, const float* a, const float* b, float* y, int features, int groups, bool b_vector,
                 int b_step);
  void (*softmax)(const float* x, float* y, int features, int groups);                      // over features
  void (*l2_normalize)(const float* x, float* y, int features, int groups, float epsilon);  // x / max(|x|, epsilon)
  void (*attention)(const AttentionTask& task);
  long (*attention_scratch)(int value_size);
  // rows[lane] -> [F] or null (reads as zeros); panel[f][lane] = rows[lane][f] for lanes [0, count).
  void (*transpose_in)(const float* const* rows, int count, float* panel, int features);
  // y: [rows][NB], put together from runs of ascending lanes, each up to the next and at most `lanes` long. Whole
  // vectors are moved: a row is written up to lanes floats past its end, and a run read up to twice as many.
  void (*copy_lanes)(const LaneRun* runs, int count, int rows, float* y);
};

// Null where this build has no such kernels.
const KernelSet* scalar_kernels();
const KernelSet* avx2_kernels();
const KernelSet* avx_vnni_kernels();
const KernelSet* avx512_kernels();
const KernelSet* avx512_vnni_kernels();
const KernelSet* avx512_amx_kernels();
const KernelSet* neon_kernels();
const KernelSet* neon_dot_kernels();

}  // namespace espalier
