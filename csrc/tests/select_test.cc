// Choice of an instruction set and of candidate formats: pure functions, tested with processors we do not have.
#include <algorithm>

#include "base/error.h"
#include "support.h"

using namespace testing;
using espalier::ArchFlags;
using espalier::Isa;
using espalier::select_isa;
using espalier::WeightFormat;
using espalier::WeightStats;

TEST(instruction_sets_of_made_up_processors) {
  ArchFlags none, neon, avx2, avx512, odd;
  neon.neon = avx2.avx2 = avx512.avx2 = avx512.avx512 = odd.avx512 = true;
  CHECK(select_isa(none, "") == Isa::scalar);
  CHECK(select_isa(neon, "") == Isa::neon);
  CHECK(select_isa(avx2, "") == Isa::avx2);
  CHECK(select_isa(avx512, "") == Isa::avx512);
  CHECK(select_isa(odd, "") == Isa::scalar, "AVX-512 without AVX2 is no processor we build for");
  CHECK(select_isa(avx512, "avx2") == Isa::avx2);
  CHECK(select_isa(avx512, "neon") == Isa::scalar);
  CHECK(select_isa(avx512, "scalar") == Isa::scalar);
  CHECK(select_isa(avx2, "avx512") == Isa::avx2, "a cap adds nothing");
  CHECK(select_isa(neon, "avx512") == Isa::neon);
}

TEST(unknown_cap_names_the_known_ones) {
  for (const char* known : {"scalar", "neon", "avx2", "avx512"}) {
    CHECK_THROWS(select_isa({}, "sse9"), known);
    CHECK(!espalier::isa_name(select_isa({}, known)).empty());
  }
  CHECK_THROWS(select_isa({}, "AVX2"), "ESPALIER_MAX_ISA");
  CHECK_THROWS(select_isa({}, "avx2 "), "ESPALIER_MAX_ISA");
}

TEST(this_processor_gets_only_what_it_has) {
  const ArchFlags flags = espalier::detect_arch();
  const Isa chosen = select_isa(flags, "");
  CHECK(chosen != Isa::avx512 || flags.avx512);
  CHECK(chosen != Isa::avx2 || flags.avx2);
  CHECK(chosen != Isa::neon || flags.neon);
  const auto built = espalier::built_isas();
  CHECK(std::find(built.begin(), built.end(), chosen) != built.end(), "this build lacks kernels for its own processor");
  CHECK(built.front() == Isa::scalar);
  for (Isa isa : {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512})
    if (std::find(built.begin(), built.end(), isa) == built.end())
      CHECK_THROWS(espalier::kernels_for(isa), "no kernels");
}

TEST(candidates_are_sane) {
  Random random(30);
  for (int i = 0; i < 2000; ++i) {
    const int lanes = 4 << random.below(3), groups = 1 + random.below(6), width = lanes * groups;
    WeightStats s;
    s.rows = 1 + random.below(5000), s.columns = i % 10 == 0 ? 65536 : 1 + random.below(5000);
    const std::int64_t all = static_cast<std::int64_t>(s.rows) * s.columns;
    s.nonzeros = static_cast<std::int64_t>(static_cast<double>(all) * random.unit());
    if (i % 7 == 0) s.nonzeros = i % 2 ? 0 : all;
    s.blocks4x1 = std::max<std::int64_t>((s.nonzeros + 3) / 4,
                                         static_cast<std::int64_t>(static_cast<double>(s.nonzeros) * random.unit()));
    const auto found = espalier::candidates(s, lanes, groups);
    bool seen[3] = {};
    CHECK(!found.empty());
    for (std::size_t c = 0; c < found.size(); ++c) {
      seen[static_cast<int>(found[c].format)] = true;
      CHECK(found[c].chunk >= 1 && found[c].chunk <= espalier::max_chunk(width), "chunk ", found[c].chunk);
      CHECK(std::isfinite(found[c].cycles) && found[c].cycles >= 0.0);
      if (c > 0) CHECK(found[c - 1].cycles <= found[c].cycles, "not cheapest first");
      for (std::size_t other = 0; other < c; ++other)
        CHECK(found[other].format != found[c].format || found[other].chunk != found[c].chunk, "listed twice");
    }
    CHECK(seen[0] && seen[1] && seen[2], "every format must be among the candidates");
  }
  // What the formats are for.
  const auto first = [](std::int64_t nonzeros, std::int64_t blocks) {
    return espalier::candidates({3072, 768, nonzeros, blocks}, 8, 3).front().format;
  };
  const std::int64_t all = 3072 * 768;
  CHECK(first(all, all / 4) == WeightFormat::dense);
  CHECK(first(all / 20, all / 21) == WeightFormat::unstructured);
  CHECK(first(all / 10, all / 40) == WeightFormat::block4x1);
}

TEST(offsets_of_the_widest_chunk_fit) {
  for (int width : {4, 12, 16, 24, 32, 64, 96}) {
    const int widest = espalier::max_chunk(width);
    CHECK((widest - 1) * width <= 65535 && widest * width > 65535, "width ", width);
  }
}
