// Choice of an instruction set and of candidate formats: pure functions, tested with processors we do not have.
#include <algorithm>

#include "base/error.h"
#include "support.h"

using namespace testing;
using espalier::ArchFlags;
using espalier::flags_named;
using espalier::Isa;
using espalier::select_isa;
using espalier::WeightFormat;
using espalier::WeightStats;

TEST(instruction_sets_of_made_up_processors) {
  const ArchFlags none, neon = flags_named({"neon"}), avx2 = flags_named({"avx2"}),
                        avx512 = flags_named({"avx2", "avx512"});
  CHECK(select_isa(none, "") == Isa::scalar);
  CHECK(select_isa(neon, "") == Isa::neon);
  CHECK(select_isa(avx2, "") == Isa::avx2);
  CHECK(select_isa(avx512, "") == Isa::avx512);
  CHECK(select_isa(flags_named({"avx512"}), "") == Isa::scalar, "AVX-512 without AVX2 is no processor we build for");
  CHECK(select_isa(avx512, "avx2") == Isa::avx2);
  CHECK(select_isa(avx512, "neon") == Isa::scalar);
  CHECK(select_isa(avx512, "scalar") == Isa::scalar);
  CHECK(select_isa(avx2, "avx512") == Isa::avx2, "a cap adds nothing");
  CHECK(select_isa(neon, "avx512") == Isa::neon);
}

TEST(dot_product_instructions_of_made_up_processors) {
  const ArchFlags alder_lake = flags_named({"avx2", "avx_vnni"}), zen4 = flags_named({"avx2", "avx512", "avx512_vnni"}),
                  sapphire_rapids = flags_named({"avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8"}),
                  graviton2 = flags_named({"neon", "dotprod"});
  CHECK(select_isa(alder_lake, "") == Isa::avx_vnni);
  CHECK(select_isa(alder_lake, "avx2") == Isa::avx2);
  CHECK(select_isa(alder_lake, "avx512_vnni") == Isa::avx_vnni);
  CHECK(select_isa(zen4, "") == Isa::avx512_vnni);
  CHECK(select_isa(zen4, "avx512") == Isa::avx512);
  CHECK(select_isa(zen4, "avx_vnni") == Isa::avx2, "Zen 4 has the wide form alone");
  CHECK(select_isa(sapphire_rapids, "") == Isa::avx512_amx);
  CHECK(select_isa(sapphire_rapids, "avx512_vnni") == Isa::avx512_vnni);
  CHECK(select_isa(sapphire_rapids, "avx_vnni") == Isa::avx_vnni);
  ArchFlags refused = sapphire_rapids;  // the system keeps no tiles for this process: detection leaves the flag off
  refused.amx_int8 = false;
  CHECK(select_isa(refused, "") == Isa::avx512_vnni);
  CHECK(select_isa(refused, "avx512_amx") == Isa::avx512_vnni);
  CHECK(select_isa(flags_named({"avx2", "avx512", "amx_int8"}), "") == Isa::avx512, "AMX comes with AVX-512-VNNI");
  CHECK(select_isa(graviton2, "") == Isa::neon_dot);
  CHECK(select_isa(graviton2, "neon") == Isa::neon);
  CHECK(select_isa(flags_named({"dotprod", "avx_vnni", "avx512_vnni"}), "") == Isa::scalar,
        "nothing without what it builds on");
  CHECK_THROWS(flags_named({"avx2", "mmx"}), "no processor flag 'mmx'");
}

TEST(builds_that_lack_an_instruction_set) {
  const ArchFlags sapphire_rapids = flags_named({"avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8"});
  const std::vector<Isa> all(espalier::known_isas().begin(), espalier::known_isas().end()),
      without_amx(all.begin(), all.end() - 1), plain = {Isa::scalar};
  CHECK(espalier::select_built(sapphire_rapids, "", all) == Isa::avx512_amx);
  CHECK(espalier::select_built(sapphire_rapids, "", without_amx) == Isa::avx512_vnni);
  CHECK(espalier::select_built(sapphire_rapids, "avx2", without_amx) == Isa::avx2);
  CHECK(espalier::select_built(flags_named({"neon"}), "", all) == Isa::neon);
  CHECK(espalier::select_built(sapphire_rapids, "", plain) == Isa::scalar);
  CHECK_THROWS(espalier::select_built(sapphire_rapids, "sse9", all), "ESPALIER_MAX_ISA");
}

TEST(unknown_cap_names_the_known_ones) {
  for (Isa known : espalier::known_isas()) {
    const std::string name(espalier::isa_name(known));
    CHECK_THROWS(select_isa({}, "sse9"), name);
    CHECK(select_isa({}, name) == Isa::scalar);
  }
  CHECK_THROWS(select_isa({}, "AVX2"), "ESPALIER_MAX_ISA");
  CHECK_THROWS(select_isa({}, "avx2 "), "ESPALIER_MAX_ISA");
}

TEST(this_processor_gets_only_what_it_has) {
  const ArchFlags flags = espalier::detect_arch();
  const Isa chosen = espalier::select_built(flags, "", espalier::built_isas());
  CHECK(chosen < Isa::avx512_amx || flags.amx_int8);
  CHECK(chosen < Isa::avx512 || flags.avx512);
  CHECK(chosen < Isa::avx2 || flags.avx2);
  CHECK((chosen != Isa::neon && chosen != Isa::neon_dot) || flags.neon);
  const auto built = espalier::built_isas();
  CHECK(std::find(built.begin(), built.end(), chosen) != built.end(), "this build lacks kernels for its own processor");
  CHECK(built.front() == Isa::scalar);
  for (Isa isa : espalier::known_isas())
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
    const double units = std::ceil(s.rows / 4.0);
    CHECK(seen[0], "dense must be among the candidates");
    CHECK(seen[1] == (static_cast<double>(s.nonzeros) < 0.98 * static_cast<double>(all)), "single weights");
    CHECK(seen[2] == (static_cast<double>(s.blocks4x1) < 0.98 * units * s.columns), "blocks");
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

TEST(candidates_for_integers_are_sane) {
  espalier::KernelSet set{};
  for (const auto& [sums_16_bit, tile_columns] : {std::pair{false, 4}, {true, 4}, {false, 64}}) {
    set.sums_16_bit = sums_16_bit;
    set.tile_columns = tile_columns;
    for (int groups : {3, 4, 6}) {
      set.max_groups = groups;
      const std::int64_t all = 3072 * 768 / 4;
      for (std::int64_t blocks : {std::int64_t{0}, all / 20, all / 5, all}) {
        const auto found = espalier::candidates8({3072, 768, blocks}, set);
        CHECK(found.size() == 2 && found[0].format != found[1].format);
        CHECK(found[0].cycles <= found[1].cycles && found[0].cycles > 0.0 && std::isfinite(found[1].cycles));
        // A matrix unit is worth many zeros.
        const bool dense = blocks == all || (tile_columns > 4 && blocks == all / 5);
        const auto cheapest = dense ? espalier::WeightFormat8::dense8 : espalier::WeightFormat8::block1x4;
        CHECK(found[0].format == cheapest, blocks, " of ", all, " blocks");
      }
    }
  }
}

TEST(offsets_of_the_widest_chunk_fit) {
  for (int width : {4, 12, 16, 24, 32, 64, 96}) {
    const int widest = espalier::max_chunk(width);
    CHECK((widest - 1) * width <= 65535 && widest * width > 65535, "width ", width);
  }
  for (const auto& [lanes, groups] : {std::pair{4, 4}, {4, 6}, {8, 3}, {16, 4}}) {
    const int stride = lanes * groups * espalier::kFeatureBlock, unit = espalier::offset_unit(lanes);
    CHECK(stride % unit == 0 && 65535 / espalier::kFeatureBlock * (stride / unit) <= 65535, lanes, " lanes");
  }
}
