// Rows (tokens) to panels. A plain transpose: it runs once per model, not once per layer.

void transpose_in_panel(const float* const* rows, int count, float* panel, int features) {
  for (int f = 0; f < features; ++f) {
    float* lane = panel + static_cast<long>(f) * NB;
    for (int i = 0; i < count; ++i) lane[i] = rows[i] == nullptr ? 0.0f : rows[i][f];
  }
}
