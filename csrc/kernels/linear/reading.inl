// Reading weights as fast as memory gives them; for float and integer layers.

// Weights are read once, front to back. Short sequences need them faster than the processor fetches them by itself,
// which stops at the end of every small page.
constexpr int kAhead = 2048;
constexpr int kLine = 64;

// What follows in `kAhead` bytes, as much as is being read now.
template <int R, class T>
inline void fetch_ahead(const T* p, int count) {
  if constexpr (R > 1) return;
  const char* ahead = reinterpret_cast<const char*>(p) + kAhead;
  for (int i = 0; i < count * static_cast<int>(sizeof(T)); i += kLine) __builtin_prefetch(ahead + i);
}

// The features of one group side by side. Reading a third of every panel row in turn leads the processor's own fetching
// astray, and the weights come at a third of the speed.
template <class T>
inline const T* slice_of(const T* x, int columns, T* slice) {
  constexpr int kWidth = static_cast<int>(V::lanes * sizeof(float) / sizeof(T));
  for (int i = 0; i < columns; ++i)
    __builtin_memcpy(slice + i * kWidth, x + i * kWidth * MAX_GROUPS, sizeof(T) * kWidth);
  return slice;
}
