#include "base/arch.h"

#include <cstdint>
#include <cstdlib>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace espalier {

namespace {

#if defined(__x86_64__)
std::uint64_t read_xcr0() {
  std::uint32_t low = 0;
  std::uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}
#endif

constexpr Isa kAll[] = {Isa::scalar, Isa::neon, Isa::avx2, Isa::avx512};

bool available(const ArchFlags& flags, Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::neon:
      return flags.neon;
    case Isa::avx2:
      return flags.avx2;
    case Isa::avx512:
      return flags.avx512 && flags.avx2;
  }
  return false;
}

}  // namespace

ArchFlags detect_arch() {
  ArchFlags flags;
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return flags;
  const bool osxsave = (c >> 27) & 1;
  const bool avx = (c >> 28) & 1, fma = (c >> 12) & 1, f16c = (c >> 29) & 1;
  if (!osxsave || !avx) return flags;
  const std::uint64_t xcr0 = read_xcr0();
  const bool ymm = (xcr0 & 0x6) == 0x6;
  const bool zmm = (xcr0 & 0xe6) == 0xe6;
  const bool tiles = (xcr0 & 0x60000) == 0x60000;
  unsigned b7 = 0, c7 = 0, d7 = 0;
  if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7)) return flags;
  flags.avx2 = ymm && fma && f16c && ((b7 >> 5) & 1);
  flags.avx512 = zmm && ((b7 >> 16) & 1) && ((b7 >> 30) & 1) && ((b7 >> 17) & 1) && ((b7 >> 31) & 1);
  flags.avx512_vnni = flags.avx512 && ((c7 >> 11) & 1);
  flags.amx_int8 = tiles && ((d7 >> 24) & 1) && ((d7 >> 25) & 1);
  unsigned a71 = 0;
  if (__get_cpuid_count(7, 1, &a71, &b, &c, &d)) flags.avx_vnni = flags.avx2 && ((a71 >> 4) & 1);
#elif defined(__aarch64__)
  flags.neon = true;
#if defined(__linux__)
  flags.dotprod = (getauxval(AT_HWCAP) >> 20) & 1;  // HWCAP_ASIMDDP
  flags.i8mm = (getauxval(AT_HWCAP2) >> 13) & 1;    // HWCAP2_I8MM
#endif
#endif
  return flags;
}

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::neon:
      return "neon";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
  }
  return "?";
}

Isa select_isa(const ArchFlags& flags, std::string_view cap) {
  Isa limit = Isa::avx512;
  if (!cap.empty()) {
    bool known = false;
    for (Isa isa : kAll) {
      if (isa_name(isa) == cap) {
        limit = isa;
        known = true;
      }
    }
    if (!known)
      fail("ESPALIER_MAX_ISA is '" + std::string(cap) +
           "'; it must be one of scalar, neon, avx2, avx512. Correct it, or unset it to use everything this CPU has.");
  }
  Isa best = Isa::scalar;
  for (Isa isa : kAll)
    if (isa <= limit && available(flags, isa)) best = isa;
  return best;
}

Isa current_isa() {
  const char* cap = std::getenv("ESPALIER_MAX_ISA");
  return select_isa(detect_arch(), cap == nullptr ? "" : cap);
}

std::vector<std::string> flag_names(const ArchFlags& flags) {
  std::vector<std::string> names;
  const auto add = [&](bool present, const char* name) {
    if (present) names.emplace_back(name);
  };
  add(flags.neon, "neon");
  add(flags.avx2, "avx2");
  add(flags.avx512, "avx512");
  add(flags.avx_vnni, "avx_vnni");
  add(flags.avx512_vnni, "avx512_vnni");
  add(flags.amx_int8, "amx_int8");
  add(flags.dotprod, "dotprod");
  add(flags.i8mm, "i8mm");
  return names;
}

}  // namespace espalier
