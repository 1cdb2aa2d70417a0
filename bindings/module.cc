// Python bindings: conversion only. The GIL is released around packing, timing and running.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "base/arch.h"
#include "base/error.h"
#include "engine/program.h"
#include "engine/weights.h"
#include "engine/weights8.h"
#include "kernels/select.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using espalier::AttentionShape;
using espalier::Batch;
using espalier::Binary;
using espalier::DenseView;
using espalier::Domain;
using espalier::fail;
using espalier::Isa;
using espalier::KernelSet;
using espalier::Matrix8;
using espalier::Program;
using espalier::Quantization;
using espalier::SparseMatrix;
using espalier::Table;
using espalier::Unary;
using espalier::Weight;
using espalier::Weight8;
using espalier::WeightFormat;
using espalier::WeightFormat8;
using espalier::Window;

template <class T, class... Extra>
using Array = nb::ndarray<const T, nb::device::cpu, Extra...>;
template <class T>
using Vector = Array<T, nb::ndim<1>, nb::c_contig>;
template <class T>
using Matrix = Array<T, nb::ndim<2>, nb::c_contig>;
using Output = nb::ndarray<float, nb::device::cpu, nb::ndim<2>, nb::c_contig>;

template <class T>
struct Named {
  const char* name;
  T value;
};

constexpr Named<WeightFormat> kFormats[] = {
    {"dense", WeightFormat::dense}, {"unstructured", WeightFormat::unstructured}, {"4x1", WeightFormat::block4x1}};
constexpr Named<WeightFormat8> kFormats8[] = {{"dense8", WeightFormat8::dense8}, {"1x4x8", WeightFormat8::block1x4}};
constexpr Named<Binary> kBinaries[] = {{"add", Binary::add}, {"sub", Binary::sub}, {"mul", Binary::mul},
                                       {"div", Binary::div}, {"max", Binary::max}, {"min", Binary::min}};
constexpr Named<Unary> kUnaries[] = {{"identity", Unary::identity},
                                     {"gelu", Unary::gelu},
                                     {"gelu_tanh", Unary::gelu_tanh},
                                     {"relu", Unary::relu},
                                     {"tanh", Unary::tanh},
                                     {"sigmoid", Unary::sigmoid},
                                     {"silu", Unary::silu},
                                     {"quick_gelu", Unary::quick_gelu},
                                     {"erf", Unary::erf},
                                     {"exp", Unary::exp},
                                     {"sqrt", Unary::sqrt},
                                     {"abs", Unary::abs},
                                     {"neg", Unary::neg},
                                     {"reciprocal", Unary::reciprocal},
                                     {"elu", Unary::elu},
                                     {"softplus", Unary::softplus}};

template <class T, std::size_t N>
T parse(const Named<T> (&table)[N], const std::string& name, const char* what) {
  std::string known;
  for (const Named<T>& entry : table) {
    if (name == entry.name) return entry.value;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  fail("unknown " + std::string(what) + " '" + name + "'; known: " + known);
}

template <class T, std::size_t N>
const char* show(const Named<T> (&table)[N], T value) {
  for (const Named<T>& entry : table)
    if (entry.value == value) return entry.name;
  return "?";
}

Isa parse_isa(const std::string& name) {
  for (Isa isa : espalier::built_isas())
    if (espalier::isa_name(isa) == name) return isa;
  fail("this build has no kernels for '" + name + "'");
}

const KernelSet& kernels(const std::string& isa) { return espalier::kernels_for(parse_isa(isa)); }

int narrow(std::size_t n, const char* what) {
  if (n > static_cast<std::size_t>(INT32_MAX)) fail(std::string(what) + " is too large");
  return static_cast<int>(n);
}

SparseMatrix compress(const Array<float, nb::ndim<2>>& dense) {
  const DenseView view{dense.data(), narrow(dense.shape(0), "a weight"), narrow(dense.shape(1), "a weight"),
                       dense.stride(0), dense.stride(1)};
  const nb::gil_scoped_release release;
  return espalier::compress(view);
}

SparseMatrix from_parts(int rows, int columns, const Vector<std::uint32_t>& starts,
                        const Vector<std::uint16_t>& indices, const Vector<float>& values) {
  SparseMatrix m;
  m.rows = rows;
  m.columns = columns;
  const auto copy = [](const auto& from, auto& to) {
    to.resize(from.shape(0));
    std::copy(from.data(), from.data() + from.shape(0), to.data());
  };
  copy(starts, m.starts);
  copy(indices, m.indices);
  copy(values, m.values);
  const nb::gil_scoped_release release;
  espalier::check(m);
  return m;
}

SparseMatrix decode(int rows, int columns, const Vector<std::uint32_t>& counts, const Vector<std::uint8_t>& gaps,
                    const Vector<std::uint16_t>& low, const Vector<std::uint8_t>& middle,
                    const Vector<std::uint8_t>& top) {
  const auto span = [](const auto& a) { return std::span(a.data(), a.shape(0)); };
  const espalier::EncodedMatrix encoded{rows, columns, span(counts), span(gaps), span(low), span(middle), span(top)};
  const nb::gil_scoped_release release;
  return espalier::decode(encoded);
}

Matrix8 compress8(const Matrix<std::int16_t>& values, const Vector<float>& scales) {
  if (scales.shape(0) != values.shape(0))
    fail("an integer weight of " + std::to_string(values.shape(0)) + " rows needs as many scales, got " +
         std::to_string(scales.shape(0)));
  const int rows = narrow(values.shape(0), "a weight"), columns = narrow(values.shape(1), "a weight");
  const nb::gil_scoped_release release;
  return espalier::compress8(values.data(), rows, columns, scales.data());
}

// A NumPy view of memory that `owner` holds.
template <class T>
nb::object view(nb::handle owner, const T* data, std::size_t size) {
  return nb::cast(nb::ndarray<nb::numpy, const T, nb::ndim<1>>(data, {size}, owner), nb::rv_policy::reference);
}

// A program, and the Python arrays whose memory it borrows.
struct Holder {
  Holder(const std::string& isa, int threads) : program(kernels(isa), threads) {}
  Program program;
  std::vector<nb::object> borrowed;
};

const float* vector_or_null(const std::optional<Vector<float>>& array, int expected, const char* what) {
  if (!array) return nullptr;
  if (array->shape(0) != static_cast<std::size_t>(expected))
    fail(std::string(what) + " has " + std::to_string(array->shape(0)) + " entries, expected " +
         std::to_string(expected));
  return array->data();
}

int features_of(const Holder& h, int value) {
  if (value < 0 || value >= static_cast<int>(h.program.values().size()))
    fail("an operation reads a value that does not exist");
  return h.program.values()[static_cast<std::size_t>(value)].features;
}

// tables: (array, scales or None, index input); array is float32, or int16 with a scale per row.
int add_embed(Holder& h, std::string name,
              const std::vector<std::tuple<nb::object, std::optional<Vector<float>>, int>>& tables) {
  std::vector<Table> parsed;
  int features = 0;
  for (const auto& [object, scales, index_input] : tables) {
    Table t;
    t.index_input = index_input;
    std::size_t rows = 0, width = 0;
    if (Matrix<float> floats; nb::try_cast(object, floats, false)) {
      t.floats = floats.data();
      rows = floats.shape(0), width = floats.shape(1);
    } else if (Matrix<std::int16_t> integers; nb::try_cast(object, integers, false)) {
      t.integers = integers.data();
      rows = integers.shape(0), width = integers.shape(1);
      if (!scales || scales->shape(0) != rows) fail("an integer embedding table needs one scale per row");
      t.scales = scales->data();
    } else {
      fail("an embedding table must be a contiguous float32 or int16 matrix");
    }
    if (features != 0 && features != static_cast<int>(width)) fail("embedding tables that are summed differ in width");
    features = narrow(width, "an embedding");
    t.rows = narrow(rows, "an embedding");
    parsed.push_back(t);
    h.borrowed.push_back(object);
    if (scales) h.borrowed.push_back(nb::cast(*scales));
  }
  return h.program.add_embed(std::move(name), features, std::move(parsed));
}

// The members of a Window, in order; `align` stands by itself.
using Pairs = std::array<Window::Pair, 6>;

std::optional<Window> parse_window(const std::optional<Pairs>& pairs, int align = 1) {
  if (!pairs) return std::nullopt;
  const auto& [in, out, kernel, stride, dilation, before] = *pairs;
  return Window{in, out, kernel, stride, dilation, before, align};
}

int add_linear(Holder& h, std::string name, int x, Weight& weight, const std::optional<Vector<float>>& bias,
               int residual, const std::string& act, const std::optional<Pairs>& window, int align) {
  const float* b = vector_or_null(bias, weight.packed().rows, "a bias");
  return h.program.add_linear(std::move(name), x, std::move(weight), b, residual, parse(kUnaries, act, "activation"),
                              parse_window(window, align));
}

std::optional<Quantization> quantization(std::optional<float> scale, std::optional<float> zero) {
  if (scale.has_value() != zero.has_value()) fail("a quantisation needs both a scale and a zero point, or neither");
  if (!scale) return std::nullopt;
  return Quantization{*scale, *zero};
}

int add_linear8(Holder& h, std::string name, int x, Weight8& weight, const std::optional<Vector<float>>& bias,
                int residual, const std::string& act, std::optional<float> out_scale, std::optional<float> out_zero,
                const std::optional<Pairs>& window) {
  const float* b = vector_or_null(bias, weight.packed().rows, "a bias");
  return h.program.add_linear8(std::move(name), x, std::move(weight), b, residual, parse(kUnaries, act, "activation"),
                               quantization(out_scale, out_zero), parse_window(window));
}

void run(Holder& h, const Vector<std::int32_t>& lengths, const Vector<std::int32_t>& rows,
         const Vector<std::int32_t>& starts, const Vector<std::int32_t>& widths,
         const std::vector<Vector<std::int32_t>>& indices, const std::vector<Matrix<float>>& floats,
         const std::vector<Array<float, nb::ndim<4>, nb::c_contig>>& biases,
         const std::optional<Vector<float>>& key_bias, const std::optional<Vector<float>>& token_weights,
         const std::vector<Output>& outputs) {
  Batch batch;
  const auto list = [](const Vector<std::int32_t>& a) {
    return std::vector<std::int32_t>(a.data(), a.data() + a.shape(0));
  };
  batch.lengths = list(lengths);
  batch.rows = list(rows);
  batch.starts = list(starts);
  batch.widths = list(widths);
  std::int64_t tokens = 0;
  int last_row = 0, columns = 0;
  for (std::int32_t n : batch.widths) columns = std::max(columns, n);
  for (std::int32_t n : batch.lengths) tokens += n;
  for (std::int32_t r : batch.rows) last_row = std::max(last_row, r);
  for (const auto& a : indices) {
    if (static_cast<std::int64_t>(a.shape(0)) != tokens) fail("an index input does not hold one index per token");
    batch.indices.push_back(a.data());
  }
  // [lanes of all sequences][features], or [sequences * features][lanes of one].
  const auto fits = [&](const auto& array, Domain domain, int features, bool planes) {
    const std::size_t lanes = static_cast<std::size_t>(domain.lanes), width = static_cast<std::size_t>(features);
    const std::size_t all = domain == Domain::token ? static_cast<std::size_t>(tokens) : batch.lengths.size() * lanes;
    if (planes) return array.shape(0) == batch.lengths.size() * width && array.shape(1) == lanes;
    return array.shape(0) == all && array.shape(1) == width;
  };
  for (const espalier::Op& op : h.program.ops()) {
    if (op.kind == espalier::OpKind::load) {
      const espalier::Value value = h.program.values()[static_cast<std::size_t>(op.output)];
      const std::size_t at = static_cast<std::size_t>(op.argument);
      if (at >= floats.size() || !fits(floats[at], value.domain, value.features, op.planes))
        fail("a float input does not fit the program");
    }
    if (op.kind == espalier::OpKind::store) {
      const espalier::Value value = h.program.values()[static_cast<std::size_t>(op.inputs[0])];
      const std::size_t at = static_cast<std::size_t>(op.output);
      if (at >= outputs.size() || !fits(outputs[at], value.domain, op.width, op.planes))
        fail("an output array does not fit the program");
    }
    if (op.kind == espalier::OpKind::attention && op.attention.bias_input >= 0) {
      const std::size_t at = static_cast<std::size_t>(op.attention.bias_input);
      if (at >= biases.size() ||
          (biases[at].shape(1) != 1 && biases[at].shape(1) != static_cast<std::size_t>(op.attention.heads)))
        fail("an attention bias does not fit the heads");
    }
  }
  for (const auto& a : floats) batch.floats.push_back(a.data());
  // (rows or 1, heads or 1, keys, queries + a panel's width)
  for (const auto& a : biases) {
    const std::size_t columns_needed = static_cast<std::size_t>(columns);
    if ((a.shape(0) != 1 && a.shape(0) <= static_cast<std::size_t>(last_row)) || a.shape(2) != columns_needed ||
        a.shape(3) < columns_needed + static_cast<std::size_t>(h.program.panel_width()))
      fail("an attention bias does not fit the batch");
    batch.biases.push_back(
        {a.data(), a.shape(0) == 1 ? 0 : a.stride(0), a.shape(1) == 1 ? 0 : a.stride(1), a.stride(2)});
  }
  batch.key_bias = vector_or_null(key_bias, static_cast<int>(tokens), "the key bias");
  batch.token_weights = vector_or_null(token_weights, static_cast<int>(tokens), "the token weights");
  for (const Output& a : outputs) batch.outputs.push_back(a.data());
  const nb::gil_scoped_release release;
  h.program.run(batch);
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The native engine of Espalier.";
  nb::exception<espalier::Error>(m, "NativeError", nb::module_::import_("espalier.errors").attr("EngineError").ptr());

  m.def(
      "current_isa", [] { return std::string(espalier::isa_name(espalier::current_isa())); },
      "Widest usable instruction set, capped by ESPALIER_MAX_ISA.");
  m.def(
      "arch_flags", [] { return espalier::flag_names(espalier::detect_arch()); },
      "What this processor and operating system offer.");
  m.def("built_isas", [] {
    std::vector<std::string> names;
    for (Isa isa : espalier::built_isas()) names.emplace_back(espalier::isa_name(isa));
    return names;
  });
  m.def(
      "select_isa",
      [](const std::vector<std::string>& present, const std::string& cap) {
        const espalier::ArchFlags flags = espalier::flags_named(present);
        return std::string(espalier::isa_name(espalier::select_isa(flags, cap)));
      },
      "flags"_a, "cap"_a = "", "The instruction set that made-up flags would select.");
  m.def(
      "panel_shape",
      [](const std::string& isa) { return std::make_tuple(kernels(isa).lanes, kernels(isa).max_groups); }, "isa"_a,
      "(lanes, groups per panel)");

  nb::class_<SparseMatrix>(m, "SparseMatrix")
      .def_static("from_parts", &from_parts, "rows"_a, "columns"_a, "starts"_a, "indices"_a, "values"_a)
      .def_static("decode", &decode, "rows"_a, "columns"_a, "counts"_a, "gaps"_a, "low"_a, "middle"_a, "top"_a)
      .def_ro("rows", &SparseMatrix::rows)
      .def_ro("columns", &SparseMatrix::columns)
      .def_prop_ro("nonzeros", &SparseMatrix::nonzeros)
      .def_prop_ro("blocks4x1", [](const SparseMatrix& s) { return espalier::stats(s).blocks4x1; })
      .def_prop_ro("starts",
                   [](nb::handle_t<SparseMatrix> self) {
                     const auto& s = nb::cast<const SparseMatrix&>(self);
                     return view(self, s.starts.data(), s.starts.size());
                   })
      .def_prop_ro("indices",
                   [](nb::handle_t<SparseMatrix> self) {
                     const auto& s = nb::cast<const SparseMatrix&>(self);
                     return view(self, s.indices.data(), s.indices.size());
                   })
      .def_prop_ro("values",
                   [](nb::handle_t<SparseMatrix> self) {
                     const auto& s = nb::cast<const SparseMatrix&>(self);
                     return view(self, s.values.data(), s.values.size());
                   })
      .def(
          "candidates",
          [](const SparseMatrix& s, const std::string& isa) {
            std::vector<std::tuple<std::string, int, double>> out;
            for (const espalier::Candidate& c :
                 espalier::candidates(espalier::stats(s), kernels(isa).lanes, kernels(isa).max_groups))
              out.emplace_back(show(kFormats, c.format), c.chunk, c.cycles);
            return out;
          },
          "isa"_a, "(format, chunk, estimated cycles for a full panel), cheapest first.");
  m.def("compress", &compress, "dense"_a, "The nonzeros of a float32 matrix with any strides.");

  nb::class_<Weight>(m, "Weight")
      .def(
          "__init__",
          [](Weight* self, const SparseMatrix& s, const std::string& format, int chunk, const std::string& isa) {
            const WeightFormat f = parse(kFormats, format, "weight format");
            const KernelSet& set = kernels(isa);
            const nb::gil_scoped_release release;
            new (self) Weight(s, f, chunk, set.lanes * set.max_groups);
          },
          "matrix"_a, "format"_a, "chunk"_a, "isa"_a)
      .def_prop_ro("bytes", &Weight::bytes)
      .def(
          "time",
          [](const Weight& w, const std::string& isa) {
            const KernelSet& set = kernels(isa);
            const nb::gil_scoped_release release;
            return espalier::time_linear(set, w);
          },
          "isa"_a, "Best seconds for one full panel, one thread.");

  nb::class_<Matrix8>(m, "Matrix8")
      .def(
          "__init__",
          [](Matrix8* self, const Matrix<std::int16_t>& values, const Vector<float>& scales) {
            new (self) Matrix8(compress8(values, scales));
          },
          "values"_a, "scales"_a,
          "An integer weight: values less their zero points, [M, K] within [-255, 255], and a scale per row, [M].")
      .def_ro("rows", &Matrix8::rows)
      .def_ro("columns", &Matrix8::columns)
      .def_ro("nonzeros", &Matrix8::nonzeros)
      .def_prop_ro("blocks1x4", &Matrix8::blocks)
      .def(
          "candidates",
          [](const Matrix8& matrix, const std::string& isa) {
            const KernelSet& set = kernels(isa);
            std::vector<std::tuple<std::string, double>> out;
            for (const espalier::Candidate8& c :
                 espalier::candidates8({matrix.rows, matrix.columns, matrix.blocks()}, set))
              out.emplace_back(show(kFormats8, c.format), c.cycles);
            return out;
          },
          "isa"_a, "(format, estimated cycles for a full panel), cheapest first.");

  nb::class_<Weight8>(m, "Weight8")
      .def(
          "__init__",
          [](Weight8* self, const Matrix8& matrix, const std::string& format, const std::string& isa) {
            const WeightFormat8 f = parse(kFormats8, format, "weight format");
            const KernelSet& set = kernels(isa);
            const nb::gil_scoped_release release;
            new (self) Weight8(matrix, f, set);
          },
          "matrix"_a, "format"_a, "isa"_a)
      .def_prop_ro("bytes", &Weight8::bytes)
      .def_prop_ro("nonzeros", &Weight8::nonzeros)
      .def(
          "time",
          [](const Weight8& w, const std::string& isa) {
            const KernelSet& set = kernels(isa);
            const nb::gil_scoped_release release;
            return espalier::time_linear8(set, w);
          },
          "isa"_a, "Best seconds for one full panel, one thread.");

  nb::class_<Holder>(m, "Program")
      .def(nb::init<const std::string&, int>(), "isa"_a, "threads"_a)
      .def_prop_ro("threads", [](const Holder& h) { return h.program.threads(); })
      .def_prop_ro("panel_width", [](const Holder& h) { return h.program.panel_width(); })
      .def("add_embed", &add_embed, "name"_a, "tables"_a)
      .def(
          "add_load",
          [](Holder& h, std::string name, int features, int lanes, int input, bool planes) {
            return h.program.add_load(std::move(name), features, Domain{lanes}, input, planes);
          },
          "name"_a, "features"_a, "lanes"_a, "float_input"_a, "planes"_a = false,
          "lanes: those of each sequence, 0 for one per token.")
      .def("add_linear", &add_linear, "name"_a, "x"_a, "weight"_a, "bias"_a.none(), "residual"_a = -1,
           "act"_a = "identity", "window"_a.none() = nb::none(), "align"_a = 1,
           "Takes the weight over. With a window (see `Window` in csrc/engine/program.h), a convolution.")
      .def(
          "add_quantize",
          [](Holder& h, std::string name, int x, std::optional<float> scale, std::optional<float> zero) {
            return h.program.add_quantize(std::move(name), x, quantization(scale, zero));
          },
          "name"_a, "x"_a, "scale"_a.none() = nb::none(), "zero"_a.none() = nb::none(),
          "8 bit integers (q - zero) * scale: one scale and zero (in 0..255) for all tokens, or by default one of each "
          "per token, from its own features.")
      .def(
          "add_dequantize",
          [](Holder& h, std::string name, int x) { return h.program.add_dequantize(std::move(name), x); }, "name"_a,
          "x"_a, "The floats that a quantised value stands for.")
      .def(
          "add_add8",
          [](Holder& h, std::string name, int a, int b, bool relu, float scale, float zero) {
            return h.program.add_add8(std::move(name), a, b, relu, {scale, zero});
          },
          "name"_a, "a"_a, "b"_a, "relu"_a, "scale"_a, "zero"_a,
          "The sum of two quantised values, not negative with relu, quantised with this scale and zero.")
      .def("add_linear8", &add_linear8, "name"_a, "x"_a, "weight"_a, "bias"_a.none(), "residual"_a = -1,
           "act"_a = "identity", "out_scale"_a.none() = nb::none(), "out_zero"_a.none() = nb::none(),
           "window"_a.none() = nb::none(),
           "x is a quantised value; so is the result, with out_scale and out_zero. Takes the weight over.")
      .def(
          "add_layer_norm",
          [](Holder& h, std::string name, int x, const Vector<float>& gamma, const std::optional<Vector<float>>& beta,
             float epsilon) {
            const int n = features_of(h, x);
            return h.program.add_layer_norm(std::move(name), x, vector_or_null(gamma, n, "gamma"),
                                            vector_or_null(beta, n, "beta"), epsilon);
          },
          "name"_a, "x"_a, "gamma"_a, "beta"_a.none(), "epsilon"_a)
      .def(
          "add_unary",
          [](Holder& h, std::string name, int x, const std::string& op) {
            return h.program.add_unary(std::move(name), x, parse(kUnaries, op, "activation"));
          },
          "name"_a, "x"_a, "op"_a)
      .def(
          "add_binary",
          [](Holder& h, std::string name, const std::string& op, int a, int b) {
            return h.program.add_binary(std::move(name), parse(kBinaries, op, "operation"), a, b);
          },
          "name"_a, "op"_a, "a"_a, "b"_a)
      .def(
          "add_binary_constant",
          [](Holder& h, std::string name, const std::string& op, int a, const Vector<float>& b) {
            return h.program.add_binary_constant(std::move(name), parse(kBinaries, op, "operation"), a,
                                                 vector_or_null(b, features_of(h, a), "a constant"));
          },
          "name"_a, "op"_a, "a"_a, "b"_a)
      .def(
          "add_concat",
          [](Holder& h, std::string name, const std::vector<int>& parts) {
            return h.program.add_concat(std::move(name), parts);
          },
          "name"_a, "parts"_a)
      .def(
          "add_spread",
          [](Holder& h, std::string name, int x, int lanes) {
            return h.program.add_spread(std::move(name), x, Domain{lanes});
          },
          "name"_a, "x"_a, "lanes"_a, "One value per sequence in each of its lanes.")
      .def(
          "add_max_pool",
          [](Holder& h, std::string name, int x, const Pairs& window) {
            return h.program.add_max_pool(std::move(name), x, *parse_window(window));
          },
          "name"_a, "x"_a, "window"_a)
      .def(
          "add_mean_pool",
          [](Holder& h, std::string name, int x, const Pairs& window, bool count_edges) {
            return h.program.add_mean_pool(std::move(name), x, *parse_window(window), count_edges);
          },
          "name"_a, "x"_a, "window"_a, "count_edges"_a)
      .def(
          "add_softmax", [](Holder& h, std::string name, int x) { return h.program.add_softmax(std::move(name), x); },
          "name"_a, "x"_a)
      .def(
          "add_l2_normalize",
          [](Holder& h, std::string name, int x, float epsilon) {
            return h.program.add_l2_normalize(std::move(name), x, epsilon);
          },
          "name"_a, "x"_a, "epsilon"_a)
      .def(
          "add_attention",
          [](Holder& h, std::string name, std::tuple<int, int, int> qkv, std::tuple<int, int, int> features, int heads,
             int head_size, int value_size, float scale, int bias_input) {
            AttentionShape shape{
                heads, head_size, value_size, std::get<0>(features), std::get<1>(features), std::get<2>(features),
                scale, bias_input};
            return h.program.add_attention(std::move(name), std::get<0>(qkv), std::get<1>(qkv), std::get<2>(qkv),
                                           shape);
          },
          "name"_a, "qkv"_a, "first_features"_a, "heads"_a, "head_size"_a, "value_size"_a, "scale"_a,
          "bias_input"_a = -1)
      .def(
          "add_select",
          [](Holder& h, std::string name, int x, int column) {
            return h.program.add_select(std::move(name), x, column);
          },
          "name"_a, "x"_a, "column"_a)
      .def(
          "add_mean",
          [](Holder& h, std::string name, int x, float epsilon) {
            return h.program.add_mean(std::move(name), x, epsilon);
          },
          "name"_a, "x"_a, "epsilon"_a)
      .def(
          "add_store",
          [](Holder& h, std::string name, int x, int first, int width, bool planes) {
            return h.program.add_store(std::move(name), x, first, width, planes);
          },
          "name"_a, "x"_a, "first"_a, "width"_a, "planes"_a = false)
      .def("finish", [](Holder& h) { h.program.finish(); })
      .def("run", &run, "lengths"_a, "rows"_a, "starts"_a, "widths"_a, "indices"_a, "floats"_a, "biases"_a,
           "key_bias"_a.none(), "token_weights"_a.none(), "outputs"_a)
      .def(
          "profile",
          [](const Holder& h) {
            std::vector<std::tuple<std::string, double, std::int64_t>> out;
            for (const espalier::OpProfile& p : h.program.profile()) out.emplace_back(p.name, p.seconds, p.calls);
            return out;
          },
          "(name, seconds over all threads, runs) per operation.")
      .def("reset_profile", [](Holder& h) { h.program.reset_profile(); });
}
