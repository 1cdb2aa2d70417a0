// Attention of one head against the reference: tile boundaries, masks, biases, sizes.
#include <algorithm>

#include "support.h"

using namespace testing;
using espalier::AttentionTask;
using espalier::KernelSet;

namespace {

struct Setup {
  int length = 0;
  int head_size = 0;
  int value_size = 0;
  const float* key_bias = nullptr;
  const float* bias = nullptr;
  long bias_stride = 0;
  int first_group = 0;
  int last_group = -1;  // all
};

// A sequence laid into panels from group `skip` on; lanes without a token hold NaN, which must not leak.
struct Panels {
  Panels(const KernelSet& k, int length, int features, int skip) : features_(features) {
    const int groups = (length + k.lanes - 1) / k.lanes, nb = k.lanes * k.max_groups;
    const int panels = (groups + skip + k.max_groups - 1) / k.max_groups;
    stride_ = round_rows(features) * static_cast<std::size_t>(nb);
    memory.assign(static_cast<std::size_t>(panels) * stride_, kNan);
    for (int g = 0; g < groups; ++g)
      base.push_back(memory.data() + static_cast<std::size_t>((g + skip) / k.max_groups) * stride_ +
                     static_cast<std::size_t>((g + skip) % k.max_groups * k.lanes));
    nb_ = nb, lanes_ = k.lanes;
  }
  float& at(int token, int feature) {
    return base[static_cast<std::size_t>(token / lanes_)][feature * nb_ + token % lanes_];
  }
  void fill(const std::vector<float>& rows) {
    for (std::size_t i = 0; i < rows.size(); ++i)
      at(static_cast<int>(i) / features_, static_cast<int>(i) % features_) = rows[i];
  }
  std::vector<float> memory;
  std::vector<float*> base;

 private:
  int features_ = 0, nb_ = 0, lanes_ = 0;
  std::size_t stride_ = 0;
};

void run_case(const KernelSet& k, Random& random, const Setup& s, float magnitude = 1.0f) {
  const std::size_t n = static_cast<std::size_t>(s.length);
  std::vector<float> q = random.normals(n * static_cast<std::size_t>(s.head_size)), key = random.normals(q.size());
  const std::vector<float> v = random.normals(n * static_cast<std::size_t>(s.value_size));
  for (float& x : q) x *= magnitude;
  const int skip = random.below(k.max_groups);
  Panels pq(k, s.length, s.head_size, skip), pk(k, s.length, s.head_size, skip), pv(k, s.length, s.value_size, skip),
      po(k, s.length, s.value_size, skip);
  pq.fill(q), pk.fill(key), pv.fill(v);
  std::fill(po.memory.begin(), po.memory.end(), kSentinel);
  std::vector<float> scratch(static_cast<std::size_t>(k.attention_scratch(s.value_size)), kNan);
  AttentionTask task;
  task.q = pq.base.data(), task.k = pk.base.data(), task.v = pv.base.data(), task.out = po.base.data();
  task.length = s.length, task.head_size = s.head_size, task.value_size = s.value_size;
  task.first_group = s.first_group;
  task.last_group = s.last_group < 0 ? static_cast<int>(po.base.size()) : s.last_group;
  task.scale = 1.0f / std::sqrt(static_cast<float>(s.head_size));
  task.key_bias = s.key_bias, task.bias = s.bias, task.bias_stride = s.bias_stride;
  task.scratch = scratch.data();
  k.attention(task);
  const auto want = espalier::reference::attention(q, key, v, s.length, s.head_size, s.value_size, task.scale,
                                                   s.key_bias, s.bias, s.bias_stride);
  for (int i = 0; i < s.length; ++i) {
    const bool mine = i / k.lanes >= task.first_group && i / k.lanes < task.last_group;
    for (int d = 0; d < s.value_size; ++d) {
      const std::size_t at = static_cast<std::size_t>(d) * n + static_cast<std::size_t>(i);
      const float got = po.at(i, d);
      if (mine)
        CHECK(agrees(got, want.value[at], want.bound[at]), k.name, " length ", s.length, " D ", s.head_size, " Dv ",
              s.value_size, " query ", i, " d ", d, ": got ", got, ", expected ", want.value[at], " within ",
              want.bound[at]);
      else
        CHECK(got == kSentinel, "wrote a query that is not its own");
    }
  }
}

}  // namespace

TEST(lengths_around_groups_and_tiles) {
  Random random(20);
  for (const KernelSet* k : kernel_sets())
    for (int length : {1, 2, 7, 8, 9, 15, 16, 17, 255, 256, 257, 600}) run_case(*k, random, {length, 16, 16});
}

TEST(head_sizes) {
  Random random(21);
  for (const KernelSet* k : kernel_sets())
    for (int d : {1, 3, 8, 31, 64})
      for (int dv : {1, 2, 4, 7, 64}) run_case(*k, random, {19, d, dv});
}

TEST(parts_of_the_queries) {
  Random random(22);
  for (const KernelSet* k : kernel_sets()) {
    const int groups = (70 + k->lanes - 1) / k->lanes;
    for (int first = 0; first < groups; first += 2)
      run_case(*k, random,
               {.length = 70,
                .head_size = 8,
                .value_size = 8,
                .first_group = first,
                .last_group = std::min(groups, first + 3)});
  }
}

TEST(key_masks) {
  Random random(23);
  for (const KernelSet* k : kernel_sets()) {
    for (int length : {9, 256, 300, 520}) {
      for (float mask : {-kInf, -3.4028235e38f, -1e9f, -10000.0f, -5.0f}) {
        std::vector<float> bias(static_cast<std::size_t>(length));
        const auto use = [&] {
          run_case(*k, random, {.length = length, .head_size = 8, .value_size = 5, .key_bias = bias.data()});
        };
        for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = random.below(2) ? mask : 0.0f;
        bias[bias.size() - 1] = 0.0f;
        use();
        std::fill(bias.begin(), bias.end() - 1, mask);  // whole tiles of nothing but masked keys
        use();
        std::fill(bias.begin(), bias.end(), mask);
        bias[0] = 0.0f;
        use();
        bias[0] = mask;  // all of them: uniform, or NaN for -inf, as the reference says
        use();
      }
    }
  }
}

TEST(bias_tensors) {
  Random random(24);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int length : {5, 33, 260}) {
      const long stride = length + nb + random.below(5);
      const std::vector<float> bias =
          random.normals(static_cast<std::size_t>(stride) * static_cast<std::size_t>(length));
      std::vector<float> keys(static_cast<std::size_t>(length), 0.0f);
      run_case(*k, random,
               {.length = length, .head_size = 8, .value_size = 8, .bias = bias.data(), .bias_stride = stride});
      for (int i = 1; i < length; i += 2) keys[static_cast<std::size_t>(i)] = -3.4028235e38f;
      run_case(*k, random,
               {.length = length,
                .head_size = 8,
                .value_size = 8,
                .key_bias = keys.data(),
                .bias = bias.data(),
                .bias_stride = stride});
    }
  }
}

TEST(large_scores) {
  Random random(25);
  for (const KernelSet* k : kernel_sets())
    for (float magnitude : {30.0f, 1e3f, 1e-30f}) run_case(*k, random, {300, 16, 8}, magnitude);
}
