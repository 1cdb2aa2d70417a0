// Reductions over features against the reference.
#include "support.h"

using namespace testing;
using espalier::KernelSet;

namespace {

// Panels of several characters: normal numbers, a large common offset, constants, zeros, denormals, outliers.
std::vector<float> panel(Random& random, int features, int nb, int character) {
  std::vector<float> x = random.normals(static_cast<std::size_t>(features) * static_cast<std::size_t>(nb));
  for (float& v : x) {
    if (character == 1) v += 1000.0f;
    if (character == 2) v = 3.25f;
    if (character == 3) v = 0.0f;
    if (character == 4) v *= 1e-39f;
  }
  if (character == 5)
    for (std::size_t i = 0; i < x.size(); i += 37) x[i] = 1e15f;
  return x;
}

template <class Kernel, class Reference>
void sweep(Kernel kernel, Reference reference) {
  Random random(11);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups;
    for (int features : {1, 2, 3, 5, 64, 101, 768}) {
      for (int character = 0; character < 6; ++character) {
        for (int groups = 1; groups <= k->max_groups; ++groups) {
          const std::vector<float> x = panel(random, features, nb, character);
          std::vector<float> y(x.size(), kSentinel), z = x;
          kernel(*k, x.data(), y.data(), features, groups);
          kernel(*k, z.data(), z.data(), features, groups);
          const int lanes = groups * k->lanes;
          compare(k->name, y.data(), nb, lanes, 0, features, reference(x.data(), features, nb, lanes));
          for (std::size_t i = 0; i < x.size(); ++i) {
            if (static_cast<int>(i) % nb >= lanes)
              CHECK(y[i] == kSentinel && z[i] == x[i], "wrote beyond its groups");
            else
              CHECK(y[i] == z[i], "in place differs");
          }
        }
      }
    }
  }
}

}  // namespace

TEST(layer_norm) {
  Random random(10);
  const std::vector<float> gamma = random.normals(1024), beta = random.normals(1024);
  for (const float* shift : {static_cast<const float*>(nullptr), beta.data()})
    for (float epsilon : {1e-12f, 1e-5f})
      sweep([&](const KernelSet& k, const float* x, float* y, int f,
                int g) { k.layer_norm(x, y, f, g, gamma.data(), shift, epsilon); },
            [&](const float* x, int f, int nb, int lanes) {
              return espalier::reference::layer_norm(x, f, nb, lanes, gamma.data(), shift, epsilon);
            });
}

TEST(softmax) {
  sweep([](const KernelSet& k, const float* x, float* y, int f, int g) { k.softmax(x, y, f, g); },
        [](const float* x, int f, int nb, int lanes) { return espalier::reference::softmax(x, f, nb, lanes); });
}

TEST(l2_normalize) {
  for (float epsilon : {1e-12f, 1e-5f})
    sweep([=](const KernelSet& k, const float* x, float* y, int f, int g) { k.l2_normalize(x, y, f, g, epsilon); },
          [=](const float* x, int f, int nb, int lanes) {
            return espalier::reference::l2_normalize(x, f, nb, lanes, epsilon);
          });
}

// One bad token spoils no other.
TEST(nan_and_infinity_stay_in_their_lane) {
  Random random(12);
  for (const KernelSet* k : kernel_sets()) {
    const int nb = k->lanes * k->max_groups, features = 33;
    const std::vector<float> ones(64, 1.0f);
    for (float bad : {kNan, kInf}) {
      std::vector<float> x = random.normals(static_cast<std::size_t>(features * nb));
      const int lane = random.below(nb);
      x[static_cast<std::size_t>(random.below(features) * nb + lane)] = bad;
      for (int which = 0; which < 3; ++which) {
        std::vector<float> y(x.size());
        if (which == 0) k->layer_norm(x.data(), y.data(), features, k->max_groups, ones.data(), nullptr, 1e-5f);
        if (which == 1) k->softmax(x.data(), y.data(), features, k->max_groups);
        if (which == 2) k->l2_normalize(x.data(), y.data(), features, k->max_groups, 1e-12f);
        bool spoilt = false;
        for (int i = 0; i < features * nb; ++i) {
          const float v = y[static_cast<std::size_t>(i)];
          if (i % nb != lane)
            CHECK(std::isfinite(v), k->name, " kernel ", which, ": spoilt another token");
          else
            spoilt = spoilt || std::isnan(v);
        }
        CHECK(spoilt, k->name, " kernel ", which, ": lost a bad value ", bad);
      }
    }
  }
}
