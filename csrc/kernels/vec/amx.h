// The tile registers of AMX. Included only by kernels/x86_avx512_amx.cc, inside its anonymous namespace.
//
// In assembly: the compilers' own functions take register numbers as literals only, and GCC's do not say that a load
// reads memory, so that it may come before the stores that it depends on.
struct Tiles {
  static void configure(const void* from) { __asm__ volatile("ldtilecfg (%0)" ::"r"(from) : "memory"); }
  static void release() { __asm__ volatile("tilerelease" ::: "memory"); }
  template <int T>
  static void zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
  }
  // Rows stand `stride` bytes apart.
  template <int T>
  static void load(const void* from, long stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
  }
  template <int T>
  static void store(void* to, long stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
  }
  // C[m][n] += the products of the four signed bytes W[m][k] and the four unsigned bytes X[k][n], for every k.
  template <int C, int W, int X>
  static void dot() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(W), "i"(X));
  }
};
