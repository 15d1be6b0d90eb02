// One register tile for AVX-512: P panels of sixteen rows against Q queries, P * Q accumulators in registers, then the
// bound of every pair against its query's threshold. Included once per kind of product; see avx512.cpp for the macros.
#define FTFAST_JOIN2(a, b) a##b
#define FTFAST_JOIN(a, b) FTFAST_JOIN2(a, b)
#define FTFAST_PART FTFAST_JOIN(part_, FTFAST_TILE_NAME)

template <int P, int Q>
FTFAST_TILE_ATTRIBUTE bool FTFAST_PART(const Tile& t) {
  FTFAST_ACC acc[P][Q];
#pragma GCC unroll 8
  for (int c = 0; c < Q; ++c)
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) acc[p][c] = FTFAST_START(t, c);
  const uint8_t* panels = t.panels;
  const size_t stride = t.panel_bytes;
  const int32_t* queries = reinterpret_cast<const int32_t*>(t.queries);
  for (int64_t s = 0; s < t.steps; ++s) {
    __m512i rows[P];
#pragma GCC unroll 3
    for (int p = 0; p < P; ++p) rows[p] = _mm512_load_si512(panels + static_cast<size_t>(p) * stride);
#pragma GCC unroll 8
    for (int c = 0; c < Q; ++c) {
      const __m512i query = _mm512_set1_epi32(queries[c]);
#pragma GCC unroll 3
      for (int p = 0; p < P; ++p) FTFAST_STEP(acc[p][c], rows[p], query);
    }
    panels += 64;
    queries += Q;
  }
  uint32_t any = 0;
#pragma GCC unroll 3
  for (int p = 0; p < P; ++p) {
    const float* params = t.params + p * 4 * kPanel;
    const __m512 scale = _mm512_loadu_ps(params), residual = _mm512_loadu_ps(params + kPanel);
    const __m512 norm = _mm512_loadu_ps(params + 2 * kPanel), offset = _mm512_loadu_ps(params + 3 * kPanel);
#pragma GCC unroll 8
    for (int c = 0; c < Q; ++c) {
      __m512 bound = _mm512_mul_ps(FTFAST_FLOAT(acc[p][c]), scale);
      bound = _mm512_fmadd_ps(residual, _mm512_set1_ps(t.residual_weight[c]), bound);
      bound = _mm512_fmadd_ps(norm, _mm512_set1_ps(t.norm_weight[c]), bound);
      bound = _mm512_fnmadd_ps(offset, _mm512_set1_ps(t.offset_weight[c]), bound);
      const __mmask16 keep = _mm512_cmp_ps_mask(bound, _mm512_set1_ps(t.threshold[c]), _CMP_NLT_UQ);
      _mm512_store_ps(t.bounds + (p * Q + c) * kPanel, bound);
      t.masks[p * Q + c] = keep;
      any |= keep;
    }
  }
  return any != 0;
}

template <int Q>
FTFAST_TILE_ATTRIBUTE bool FTFAST_JOIN(panels_, FTFAST_TILE_NAME)(const Tile& t) {
  switch (t.panel_count) {
    case 1: return FTFAST_PART<1, Q>(t);
    case 2: return FTFAST_PART<2, Q>(t);
    default: return FTFAST_PART<3, Q>(t);
  }
}

FTFAST_TILE_ATTRIBUTE bool FTFAST_JOIN(tile_, FTFAST_TILE_NAME)(const Tile& t) {
  switch (t.width) {
    case 1: return FTFAST_JOIN(panels_, FTFAST_TILE_NAME)<1>(t);
    case 2: return FTFAST_JOIN(panels_, FTFAST_TILE_NAME)<2>(t);
    case 4: return FTFAST_JOIN(panels_, FTFAST_TILE_NAME)<4>(t);
    default: return FTFAST_JOIN(panels_, FTFAST_TILE_NAME)<8>(t);
  }
}

#undef FTFAST_PART
#undef FTFAST_JOIN
#undef FTFAST_JOIN2
#undef FTFAST_TILE_ATTRIBUTE
#undef FTFAST_TILE_NAME
#undef FTFAST_ACC
#undef FTFAST_START
#undef FTFAST_STEP
#undef FTFAST_FLOAT
