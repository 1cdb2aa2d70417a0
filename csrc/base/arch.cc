#include "base/arch.h"

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "base/error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif
#if defined(__linux__)
#include <unistd.h>
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

// Linux keeps tile registers only for processes that asked for them, and may refuse: an old kernel, a sandbox, a thread
// whose signal stack is too small for them. Granted once, they are there for all threads.
bool ask_for_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool may_use_tiles() {
  static const bool allowed = ask_for_tiles();
  return allowed;
}
#endif

constexpr Isa kAll[] = {Isa::scalar,   Isa::neon,   Isa::neon_dot,    Isa::avx2,
                        Isa::avx_vnni, Isa::avx512, Isa::avx512_vnni, Isa::avx512_amx};

struct NamedFlag {
  const char* name;
  bool ArchFlags::* flag;
};

constexpr NamedFlag kFlags[] = {
    {"neon", &ArchFlags::neon},
    {"avx2", &ArchFlags::avx2},
    {"avx512", &ArchFlags::avx512},
    {"avx_vnni", &ArchFlags::avx_vnni},
    {"avx512_vnni", &ArchFlags::avx512_vnni},
    {"amx_int8", &ArchFlags::amx_int8},
    {"dotprod", &ArchFlags::dotprod},
    {"i8mm", &ArchFlags::i8mm},
};

bool available(const ArchFlags& flags, Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return true;
    case Isa::neon:
      return flags.neon;
    case Isa::neon_dot:
      return flags.neon && flags.dotprod;
    case Isa::avx2:
      return flags.avx2;
    case Isa::avx_vnni:
      return flags.avx2 && flags.avx_vnni;
    case Isa::avx512:
      return flags.avx2 && flags.avx512;
    case Isa::avx512_vnni:
      return flags.avx2 && flags.avx512 && flags.avx512_vnni;
    case Isa::avx512_amx:
      return available(flags, Isa::avx512_vnni) && flags.amx_int8;
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
  flags.amx_int8 = tiles && ((d7 >> 24) & 1) && ((d7 >> 25) & 1) && may_use_tiles();
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

std::span<const Isa> known_isas() { return kAll; }

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::scalar:
      return "scalar";
    case Isa::neon:
      return "neon";
    case Isa::neon_dot:
      return "neon_dot";
    case Isa::avx2:
      return "avx2";
    case Isa::avx_vnni:
      return "avx_vnni";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_vnni:
      return "avx512_vnni";
    case Isa::avx512_amx:
      return "avx512_amx";
  }
  return "?";
}

Isa select_isa(const ArchFlags& flags, std::string_view cap) {
  Isa limit = *std::rbegin(kAll);
  if (!cap.empty()) {
    bool known = false;
    std::string names;
    for (Isa isa : kAll) {
      names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
      if (isa_name(isa) != cap) continue;
      limit = isa;
      known = true;
    }
    if (!known)
      fail("ESPALIER_MAX_ISA is '" + std::string(cap) + "'; it must be one of " + names +
           ". Correct it, or unset it to use everything this CPU has.");
  }
  Isa best = Isa::scalar;
  for (Isa isa : kAll)
    if (isa <= limit && available(flags, isa)) best = isa;
  return best;
}

std::size_t l2_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return static_cast<std::size_t>(bytes);
#endif
  return std::size_t{512} << 10;
}

std::vector<std::string> flag_names(const ArchFlags& flags) {
  std::vector<std::string> names;
  for (const NamedFlag& known : kFlags)
    if (flags.*known.flag) names.emplace_back(known.name);
  return names;
}

ArchFlags flags_named(const std::vector<std::string>& names) {
  ArchFlags flags;
  for (const std::string& name : names) {
    const auto found =
        std::find_if(std::begin(kFlags), std::end(kFlags), [&](const NamedFlag& known) { return name == known.name; });
    if (found == std::end(kFlags)) fail("there is no processor flag '" + name + "'");
    flags.*found->flag = true;
  }
  return flags;
}

}  // namespace espalier
