// What the processor can do, and which instruction set the engine uses.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace espalier {

// Ordered from least to most capable within an architecture.
enum class Isa { scalar, neon, neon_dot, avx2, avx_vnni, avx512, avx512_vnni, avx512_amx };

// Facts about a processor *and* its operating system (a register file that the system does not save is unusable).
struct ArchFlags {
  bool neon = false;
  bool avx2 = false;    // AVX2, FMA and F16C, with YMM state enabled
  bool avx512 = false;  // AVX-512 F, BW, DQ and VL, with ZMM state enabled
  bool avx_vnni = false;
  bool avx512_vnni = false;
  bool amx_int8 = false;  // with tiles that the system lets this process use
  bool dotprod = false;   // aarch64 sdot/udot
  bool i8mm = false;      // aarch64 smmla
};

// On Linux the first call asks the system for tile registers, where there are any.
ArchFlags detect_arch();

// All of them, in order.
std::span<const Isa> known_isas();

std::string_view isa_name(Isa isa);

// Widest instruction set that `flags` allow and `cap` permits. `cap` is one of isa_name()'s values, or empty for no
// cap. Pure; throws Error naming the known values when `cap` is none of them.
Isa select_isa(const ArchFlags& flags, std::string_view cap);

// Of one core, as the system says; half a megabyte where it does not.
std::size_t l2_cache_bytes();

std::vector<std::string> flag_names(const ArchFlags& flags);

// The flags that `names` name. Throws Error for a name that flag_names() never gives.
ArchFlags flags_named(const std::vector<std::string>& names);

}  // namespace espalier
