// A network as a list of panel operations, ready to run on ragged batches.
//
// Values live in token panels (see kernels/kernel_set.h). Their domain says what has a lane: every token of the batch,
// every sequence, or every pixel of the sequences' images. Tokens and pixels are packed sequence after sequence, each
// aligned to a group.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/buffer.h"
#include "base/threads.h"
#include "engine/weights.h"
#include "engine/weights8.h"
#include "kernels/kernel_set.h"

namespace espalier {

// Lanes that each sequence has: 0 for as many as it has tokens, otherwise the same number for all. An image is a
// sequence, and its pixels row by row are lanes.
struct Domain {
  int lanes = 0;
  bool operator==(const Domain&) const = default;
  static const Domain token;
  static const Domain sequence;
};
inline constexpr Domain Domain::token{0};
inline constexpr Domain Domain::sequence{1};

enum class OpKind : std::uint8_t {
  embed,   // sum of table rows                     index inputs -> token
  load,    // rows or planes of a float input       float input -> any domain
  linear,  // act(W x + b + residual)
  quantize,
  dequantize,
  add8,     // act(a + b) of quantised values, quantised again
  linear8,  // linear over a quantised value, quantised or not
  layer_norm,
  unary,
  binary,   // with a value or with a constant per feature
  concat,   // features of several values, one after the other
  spread,   // sequence -> token or pixel: the same for each lane of a sequence
  pool,     // pixel -> pixel: the largest, of integers too, or the mean, of a window
  softmax,  // over features
  l2_normalize,
  attention,  // token -> token, within each sequence
  select,     // token -> sequence: one column of each row
  mean,       // token or pixel -> sequence: tokens weighted by the token weights
  store,      // panel -> rows or planes of an output
};

// How pixels of one image read another: output (y, x) reads the inputs (y * stride[0] - before[0] + i * dilation[0],
// x * stride[1] - before[1] + j * dilation[1]) for each tap (i, j) of the kernel, and zeros beyond the edges. A linear
// layer sees the taps as inputs, [taps][features], with features rounded up to a multiple of `align` by zeros (of a
// quantised value, of kFeatureBlock).
struct Window {
  using Pair = std::array<int, 2>;  // rows, columns
  Pair in{};
  Pair out{};
  Pair kernel{1, 1};
  Pair stride{1, 1};
  Pair dilation{1, 1};
  Pair before{};  // rows above, columns on the left
  int align = 1;
  int taps() const { return kernel[0] * kernel[1]; }
};

// A borrowed embedding table: [rows][features], float32 or 16-bit integers with a scale per row.
struct Table {
  const float* floats = nullptr;
  const std::int16_t* integers = nullptr;
  const float* scales = nullptr;  // [rows], with integers
  int rows = 0;
  int index_input = 0;
};

struct AttentionShape {
  int heads = 0;
  int head_size = 0;
  int value_size = 0;
  int q_feature = 0;  // where each operand begins within its value, so that one value may hold Q, K and V
  int k_feature = 0;
  int v_feature = 0;
  float scale = 1.0f;
  int bias_input = -1;
};

struct Op {
  OpKind kind = OpKind::unary;
  std::string name;
  std::vector<int> inputs;  // value ids
  int output = -1;          // value id; the output's number for store
  std::unique_ptr<Weight> weight;
  std::unique_ptr<Weight8> weight8;
  Buffer<float> bias;                        // linear, linear8: [M rounded up]
  bool residual = false;                     // linear, linear8: inputs[1] is added
  std::optional<Quantization> quantization;  // quantize: empty means per token; linear8, add8: of the result
  std::optional<Window> window;              // linear, linear8, pool
  Unary unary = Unary::identity;
  Binary binary = Binary::add;
  Buffer<float> gamma;  // layer_norm; binary: the constant
  Buffer<float> beta;   // layer_norm, may be empty
  float epsilon = 0.0f;
  std::vector<Table> tables;
  AttentionShape attention;
  int argument = 0;     // load: float input; select: column; store: first feature; pool: whether edges count in a mean
  int width = 0;        // store: features written
  bool planes = false;  // load, store: [sequences][features][lanes] outside, not [lanes of all sequences][features]
};

struct Value {
  int features = 0;
  Domain domain;
  bool quantized = false;  // a panel is a quantised one
  bool fixed = false;      // with one scale and zero for all
};

// Features of floats that take as much memory.
int stored_features(const Value& value);

// One additive attention bias: data[b * row_stride + h * head_stride + key * key_stride + query], queries contiguous
// and readable for a panel's width beyond the last.
struct BiasTensor {
  const float* data = nullptr;
  std::int64_t row_stride = 0;
  std::int64_t head_stride = 0;
  std::int64_t key_stride = 0;
};

// Sequence s holds columns [starts[s], starts[s] + lengths[s]) of row rows[s] of the padded batch. Per-token inputs are
// packed: the tokens of sequence 0, then of sequence 1, ...
struct Batch {
  std::vector<std::int32_t> lengths;
  std::vector<std::int32_t> rows;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> widths;          // columns of each row: a negative column to select counts from its end
  std::vector<const std::int32_t*> indices;  // [index input] -> [tokens]
  std::vector<const float*> floats;          // [float input] -> [lanes of all sequences][features], or planes
  std::vector<BiasTensor> biases;            // [bias input]
  const float* key_bias = nullptr;           // [tokens] or null: added to the scores of that key
  const float* token_weights = nullptr;      // [tokens] or null (all 1): for mean
  std::vector<float*> outputs;               // [output] -> [lanes of all sequences][width], or planes
};

struct OpProfile {
  std::string name;
  OpKind kind = OpKind::unary;
  double seconds = 0.0;  // over all threads
  std::int64_t calls = 0;
};

class Program {
 public:
  Program(const KernelSet& kernels, int threads);
  ~Program();

  const KernelSet& kernels() const { return kernels_; }
  int panel_width() const { return kernels_.lanes * kernels_.max_groups; }
  int threads() const { return team_.size(); }

  // Building: every call appends an operation and returns the id of its value. Throws Error on inconsistent shapes.
  int add_embed(std::string name, int features, std::vector<Table> tables);
  int add_load(std::string name, int features, Domain domain, int float_input, bool planes = false);
  // With a window, a convolution: x and the result are images of the window's extents.
  int add_linear(std::string name, int x, Weight weight, const float* bias, int residual, Unary act,
                 const std::optional<Window>& window = std::nullopt);
  // `fixed`: one scale and zero (an integer in [0, 255]) for all tokens; without, each token gets its own.
  int add_quantize(std::string name, int x, const std::optional<Quantization>& fixed);
  int add_dequantize(std::string name, int x);
  int add_add8(std::string name, int a, int b, bool relu, const Quantization& out);
  // x is a quantised value, and so is the result when `out` is given. A convolution wants one scale for all; of floats,
  // it gives each pixel's window its own.
  int add_linear8(std::string name, int x, Weight8 weight, const float* bias, int residual, Unary act,
                  const std::optional<Quantization>& out, const std::optional<Window>& window = std::nullopt);
  int add_layer_norm(std::string name, int x, const float* gamma, const float* beta, float epsilon);
  int add_unary(std::string name, int x, Unary op);
  int add_binary(std::string name, Binary op, int a, int b);
  int add_binary_constant(std::string name, Binary op, int a, const float* constant);
  int add_concat(std::string name, const std::vector<int>& parts);
  int add_spread(std::string name, int x, Domain domain);
  // Edges never are the largest; `count_edges` says whether they count in a mean, as zeros.
  int add_max_pool(std::string name, int x, const Window& window);
  int add_mean_pool(std::string name, int x, const Window& window, bool count_edges);
  int add_softmax(std::string name, int x);
  int add_l2_normalize(std::string name, int x, float epsilon);
  int add_attention(std::string name, int q, int k, int v, const AttentionShape& shape);
  int add_select(std::string name, int x, int column);
  int add_mean(std::string name, int x, float epsilon);
  int add_store(std::string name, int x, int first, int width, bool planes = false);  // returns the output's number
  void finish();

  // Runs the operations. Safe to call from several threads; calls take turns. Throws Error for an index outside its
  // table or a batch that does not fit the program.
  void run(const Batch& batch);

  std::vector<OpProfile> profile() const;
  void reset_profile();
  const std::vector<Op>& ops() const { return ops_; }
  const std::vector<Value>& values() const { return values_; }

 private:
  struct Layout;     // where tokens stand: panels, groups, sequences
  struct Storage;    // where values stand
  struct Execution;  // one run
  // How the team shares out a run; the storage and the phases follow from it.
  enum class Partition : std::uint8_t {
    sequences,  // a thread takes whole sequences through the whole network: activations stay in its cache
    panels,     // a thread takes a few panels from one attention to the next
    rows,       // the whole team on every operation: few tokens
  };
  struct Segment {
    int first = 0;
    int last = 0;
    Domain domain;
    bool local = false;     // panel by panel; otherwise one operation that crosses panels
    bool streamed = false;  // its weights pass by one panel after the other; otherwise tiles of them stay for several
  };

  int add(Op op, int features, Domain domain, bool quantized = false);
  int add_pool(std::string name, int x, const Window& window, Binary binary, bool count_edges);
  Domain domain_after(const Value& in, const std::optional<Window>& window) const;  // throws where they do not fit
  const Value& float_value(int id) const;                                           // throws when there is none
  const Value& quantized_value(int id) const;
  bool is_quantized(int id) const;
  void begin_linear(Op& op, const Value& in, int rows, int columns, const float* bias, int residual, Unary act) const;
  void check_batch(const Batch& batch) const;
  std::vector<Segment> segments() const;
  bool streams(const Segment& segment) const;
  std::unique_ptr<Storage> plan_storage(Partition partition) const;

  const KernelSet& kernels_;
  std::vector<Value> values_;
  std::vector<Domain> domains_{Domain::token, Domain::sequence};  // of all values
  std::vector<Op> ops_;
  std::vector<Segment> segments_;
  std::vector<std::unique_ptr<Storage>> storage_;  // [Partition]
  int index_inputs_ = 0;
  int float_inputs_ = 0;
  int bias_inputs_ = 0;
  int outputs_ = 0;
  bool finished_ = false;

  mutable std::mutex mutex_;
  Team team_;
  Buffer<float> arena_;
  std::vector<Buffer<float>> scratch_;  // one per thread
  std::vector<std::vector<double>> seconds_;
  std::int64_t runs_ = 0;
};

bool is_local(OpKind kind);
bool is_linear(OpKind kind);                               // of floats or of integers
int window_inputs(const Value& in, const Window& window);  // of a linear layer over a window of `in`

}  // namespace espalier
