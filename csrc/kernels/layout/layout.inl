// Rows (tokens) to panels. A plain transpose: it runs once per model, not once per layer.

void transpose_in_panel(const float* const* rows, int count, float* panel, int features) {
  for (int f = 0; f < features; ++f) {
    float* lane = panel + static_cast<long>(f) * NB;
    for (int i = 0; i < count; ++i) lane[i] = rows[i] == nullptr ? 0.0f : rows[i][f];
  }
}

// Later runs cover what earlier ones wrote too far, and later rows likewise.
void copy_lanes(const LaneRun* runs, int count, int rows, float* y) {
  for (long r = 0; r < rows; ++r) {
    for (int i = 0; i < count; ++i) {
      const float* x = runs[i].x + r * runs[i].stride;
      (runs[i].every_second ? V::load_even(x) : V::load(x)).store(y + r * NB + runs[i].lane);
    }
  }
}
