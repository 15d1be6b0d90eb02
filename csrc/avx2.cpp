// AVX2 + FMA + F16C.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#define FTFAST_TARGET __attribute__((target("avx2,fma,f16c")))

namespace ftfast {
namespace {
#include "common_impl.h"

FTFAST_TARGET void to_float(const void* source, Type type, int64_t count, float* target) {
  if (type != Type::f16) {
    portable_kernels().to_float(source, type, count, target);
    return;
  }
  const uint16_t* halves = static_cast<const uint16_t*>(source);
  int64_t j = 0;
  for (; j + 8 <= count; j += 8)
    _mm256_storeu_ps(target + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + j))));
  portable_kernels().to_float(halves + j, type, count - j, target + j);
}

FTFAST_TARGET float sum8(__m256 v) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, v);
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

FTFAST_TARGET void scan(const float* const* rows, int row_count, const float* const* queries, int query_count,
                        int64_t width, float* dots, float* squares) {
  const int64_t whole = width / 8 * 8;
  for (int r = 0; r < row_count; ++r) {
    const float* x = rows[r];
    __m256 acc[5] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(),
                     _mm256_setzero_ps()};
    for (int64_t j = 0; j < whole; j += 8) {
      const __m256 v = _mm256_loadu_ps(x + j);
      acc[4] = _mm256_fmadd_ps(v, v, acc[4]);
      for (int c = 0; c < query_count; ++c) acc[c] = _mm256_fmadd_ps(v, _mm256_loadu_ps(queries[c] + j), acc[c]);
    }
    float square = sum8(acc[4]);
    for (int64_t j = whole; j < width; ++j) square += x[j] * x[j];
    squares[r] = square;
    for (int c = 0; c < query_count; ++c) {
      float product = sum8(acc[c]);
      for (int64_t j = whole; j < width; ++j) product += x[j] * queries[c][j];
      dots[c * kPanel + r] = product;
    }
  }
}

template <int W>
FTFAST_TARGET bool tile_part(const Tile& t, int p, int first) {
  const float* panel = reinterpret_cast<const float*>(t.panels + static_cast<size_t>(p) * t.panel_bytes);
  const float* queries = reinterpret_cast<const float*>(t.queries) + first;
  __m256 low[W], high[W];
  for (int c = 0; c < W; ++c) low[c] = high[c] = _mm256_setzero_ps();
  for (int64_t s = 0; s < t.steps; ++s) {
    const __m256 a = _mm256_load_ps(panel + s * kPanel), b = _mm256_load_ps(panel + s * kPanel + 8);
#pragma GCC unroll 4
    for (int c = 0; c < W; ++c) {
      const __m256 q = _mm256_broadcast_ss(queries + s * t.width + c);
      low[c] = _mm256_fmadd_ps(a, q, low[c]);
      high[c] = _mm256_fmadd_ps(b, q, high[c]);
    }
  }
  const float* params = t.params + p * 4 * kPanel;
  bool any = false;
  for (int c = 0; c < W; ++c) {
    const int index = first + c;
    float* bounds = t.bounds + (p * t.width + index) * kPanel;
    uint32_t mask = 0;
    for (int half = 0; half < 2; ++half) {
      const float* at = params + 8 * half;
      __m256 bound = _mm256_mul_ps(half == 0 ? low[c] : high[c], _mm256_loadu_ps(at));
      bound = _mm256_fmadd_ps(_mm256_loadu_ps(at + kPanel), _mm256_set1_ps(t.residual_weight[index]), bound);
      bound = _mm256_fmadd_ps(_mm256_loadu_ps(at + 2 * kPanel), _mm256_set1_ps(t.norm_weight[index]), bound);
      bound = _mm256_fnmadd_ps(_mm256_loadu_ps(at + 3 * kPanel), _mm256_set1_ps(t.offset_weight[index]), bound);
      _mm256_storeu_ps(bounds + 8 * half, bound);
      const __m256 keep = _mm256_cmp_ps(bound, _mm256_set1_ps(t.threshold[index]), _CMP_NLT_UQ);
      mask |= static_cast<uint32_t>(_mm256_movemask_ps(keep)) << (8 * half);
    }
    t.masks[p * t.width + index] = static_cast<uint16_t>(mask);
    any |= mask != 0;
  }
  return any;
}

FTFAST_TARGET bool tile_fp32(const Tile& t) {
  bool any = false;
  for (int p = 0; p < t.panel_count; ++p) {
    if (t.width >= 4) {
      for (int first = 0; first < t.width; first += 4) any |= tile_part<4>(t, p, first);
    } else {
      for (int first = 0; first < t.width; ++first) any |= tile_part<1>(t, p, first);
    }
  }
  return any;
}

}  // namespace

const Kernels* avx2_kernels() {
  static const Kernels kernels = {"avx2",     false, false, to_float, dot_f64, distance_f64,
                                  encode_row, scan,  {tile_fp32, nullptr, nullptr}};
  static const bool present =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return present ? &kernels : nullptr;
}

}  // namespace ftfast
#else
namespace ftfast {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace ftfast
#endif
