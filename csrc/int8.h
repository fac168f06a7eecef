// Weight-only int8, one scale a column.

// Quantises one column of groups * 4 weights into words 32 apart.
INLINE void pack_int8_column(const float* row, int64_t groups, uint32_t* words, float* scale, float* col_sum) {
  float peak = 0;
  for (int64_t k = 0; k < groups * 4; k++) peak = std::max(peak, __builtin_fabsf(row[k]));
  *scale = peak / 127.f;
  const float inverse = peak > 0 ? 127.f / peak : 0.f;
  int64_t sum = 0;
  for (int64_t g = 0; g < groups; g++) {
    uint32_t word = 0;
    for (int j = 0; j < 4; j++) {
      const int q = (int)__builtin_rintf(row[g * 4 + j] * inverse);
      sum += q;
      word |= (uint32_t)(uint8_t)(int8_t)q << (8 * j);
    }
    words[g * 32] = word;
  }
  *col_sum = *scale * (float)sum;
}
