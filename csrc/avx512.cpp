// AVX-512, with int8 products where the processor has VNNI and bfloat16 products where it has BF16.
#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#include <cstring>

#define FTFAST_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c,prefer-vector-width=512")))
#define FTFAST_VNNI \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c,prefer-vector-width=512")))
#define FTFAST_BF16 \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,f16c,prefer-vector-width=512")))

namespace ftfast {
namespace {
#include "common_impl.h"

FTFAST_TARGET void to_float(const void* source, Type type, int64_t count, float* target) {
  int64_t j = 0;
  if (type == Type::f16) {
    const uint16_t* halves = static_cast<const uint16_t*>(source);
    for (; j + 16 <= count; j += 16)
      _mm512_storeu_ps(target + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + j))));
    portable_kernels().to_float(halves + j, type, count - j, target + j);
  } else if (type == Type::bf16) {
    const uint16_t* halves = static_cast<const uint16_t*>(source);
    for (; j + 16 <= count; j += 16) {
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves + j)));
      _mm512_storeu_si512(target + j, _mm512_slli_epi32(wide, 16));
    }
    portable_kernels().to_float(halves + j, type, count - j, target + j);
  } else {
    portable_kernels().to_float(source, type, count, target);
  }
}

// The same 32 lanes and the same tree as common_impl.h; products of two float32 are exact in float64, so a fused
// multiply-add gives the same bits.
FTFAST_TARGET double dot_wide(const float* q, const float* x, int64_t width, double* square) {
  const int64_t whole = width / 32 * 32;
  __m512d p[4], s[4];
  for (int i = 0; i < 4; ++i) p[i] = s[i] = _mm512_setzero_pd();
  if (square == nullptr) {
    for (int64_t j = 0; j < whole; j += 32) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(x + j + 8 * i));
        p[i] = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(q + j + 8 * i)), b, p[i]);
      }
    }
  } else {
    for (int64_t j = 0; j < whole; j += 32) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m512d b = _mm512_cvtps_pd(_mm256_loadu_ps(x + j + 8 * i));
        p[i] = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm256_loadu_ps(q + j + 8 * i)), b, p[i]);
        s[i] = _mm512_fmadd_pd(b, b, s[i]);
      }
    }
  }
  alignas(64) double lanes[32], squares[32];
  for (int i = 0; i < 4; ++i) {
    _mm512_store_pd(lanes + 8 * i, p[i]);
    _mm512_store_pd(squares + 8 * i, s[i]);
  }
  for (int64_t j = whole; j < width; ++j) {
    lanes[j - whole] += static_cast<double>(q[j]) * static_cast<double>(x[j]);
    squares[j - whole] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
  }
  if (square != nullptr) *square = reduce_lanes(squares);
  return reduce_lanes(lanes);
}

template <int Q>
FTFAST_TARGET void scan_queries(const float* x, const float* const* queries, int64_t width, int r, float* dots,
                                float* squares) {
  __m512 acc[Q + 1], other[Q + 1];
  for (int c = 0; c <= Q; ++c) acc[c] = other[c] = _mm512_setzero_ps();
  int64_t j = 0;
  for (; j + 32 <= width; j += 32) {
    const __m512 a = _mm512_loadu_ps(x + j), b = _mm512_loadu_ps(x + j + 16);
    acc[Q] = _mm512_fmadd_ps(a, a, acc[Q]);
    other[Q] = _mm512_fmadd_ps(b, b, other[Q]);
#pragma GCC unroll 4
    for (int c = 0; c < Q; ++c) {
      acc[c] = _mm512_fmadd_ps(a, _mm512_loadu_ps(queries[c] + j), acc[c]);
      other[c] = _mm512_fmadd_ps(b, _mm512_loadu_ps(queries[c] + j + 16), other[c]);
    }
  }
  for (; j < width; j += 16) {
    const __mmask16 rest = static_cast<__mmask16>(width - j >= 16 ? 0xFFFFu : (1u << (width - j)) - 1u);
    const __m512 a = _mm512_maskz_loadu_ps(rest, x + j);
    acc[Q] = _mm512_fmadd_ps(a, a, acc[Q]);
    for (int c = 0; c < Q; ++c) acc[c] = _mm512_fmadd_ps(a, _mm512_maskz_loadu_ps(rest, queries[c] + j), acc[c]);
  }
  squares[r] = _mm512_reduce_add_ps(_mm512_add_ps(acc[Q], other[Q]));
  for (int c = 0; c < Q; ++c) dots[c * kPanel + r] = _mm512_reduce_add_ps(_mm512_add_ps(acc[c], other[c]));
}

FTFAST_TARGET void scan(const float* const* rows, int row_count, const float* const* queries, int query_count,
                        int64_t width, float* dots, float* squares) {
  for (int r = 0; r < row_count; ++r) {
    switch (query_count) {
      case 1: scan_queries<1>(rows[r], queries, width, r, dots, squares); break;
      case 2: scan_queries<2>(rows[r], queries, width, r, dots, squares); break;
      case 3: scan_queries<3>(rows[r], queries, width, r, dots, squares); break;
      default: scan_queries<4>(rows[r], queries, width, r, dots, squares); break;
    }
  }
}

// The products are written as instructions: given intrinsics, GCC copies and spills accumulators in the inner loop.
#define FTFAST_TILE_ATTRIBUTE FTFAST_TARGET
#define FTFAST_TILE_NAME fp32
#define FTFAST_ACC __m512
#define FTFAST_START(t, c) _mm512_setzero_ps()
#define FTFAST_STEP(acc, rows, query) __asm__("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(rows), "v"(query))
#define FTFAST_FLOAT(acc) (acc)
#include "avx512_tile.h"

#define FTFAST_TILE_ATTRIBUTE FTFAST_VNNI
#define FTFAST_TILE_NAME int8
#define FTFAST_ACC __m512i
#define FTFAST_START(t, c) _mm512_set1_epi32((t).start[c])
#define FTFAST_STEP(acc, rows, query) __asm__("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(rows), "v"(query))
#define FTFAST_FLOAT(acc) _mm512_cvtepi32_ps(acc)
#include "avx512_tile.h"

#define FTFAST_TILE_ATTRIBUTE FTFAST_BF16
#define FTFAST_TILE_NAME bf16
#define FTFAST_ACC __m512
#define FTFAST_START(t, c) _mm512_setzero_ps()
#define FTFAST_STEP(acc, rows, query) __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(rows), "v"(query))
#define FTFAST_FLOAT(acc) (acc)
#include "avx512_tile.h"

Kernels detect() {
  Kernels kernels = {"avx512", false, false, to_float, dot_wide, distance_f64, encode_row, scan,
                     {tile_fp32, nullptr, nullptr}};
  kernels.has_int8 = __builtin_cpu_supports("avx512vnni") != 0;
  kernels.has_bf16 = __builtin_cpu_supports("avx512bf16") != 0;
  if (kernels.has_int8) kernels.tile[static_cast<int>(Mode::int8)] = tile_int8;
  if (kernels.has_bf16) kernels.tile[static_cast<int>(Mode::bf16)] = tile_bf16;
  if (kernels.has_int8 && kernels.has_bf16) kernels.name = "avx512-vnni-bf16";
  else if (kernels.has_int8) kernels.name = "avx512-vnni";
  else if (kernels.has_bf16) kernels.name = "avx512-bf16";
  return kernels;
}

}  // namespace

const Kernels* avx512_kernels() {
  static const bool present = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                              __builtin_cpu_supports("fma");
  if (!present) return nullptr;
  static const Kernels kernels = detect();
  return &kernels;
}

}  // namespace ftfast
#else
namespace ftfast {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace ftfast
#endif
