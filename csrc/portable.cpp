// Plain C++: the reference for the other instruction sets, and the path of processors without AVX2.
#include <cmath>
#include <cstring>

#include "kernels.h"

#define FTFAST_TARGET

namespace ftfast {
namespace {
#include "common_impl.h"

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1Fu;
  uint32_t mantissa = half & 0x3FFu;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7F800000u | (mantissa << 13);
  } else if (exponent != 0) {
    bits = sign | ((exponent + 112) << 23) | (mantissa << 13);
  } else {
    const float value = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

void to_float(const void* source, Type type, int64_t count, float* target) {
  switch (type) {
    case Type::f32:
      std::memcpy(target, source, static_cast<size_t>(count) * 4);
      break;
    case Type::f16:
      for (int64_t j = 0; j < count; ++j) target[j] = half_to_float(static_cast<const uint16_t*>(source)[j]);
      break;
    case Type::bf16:
      for (int64_t j = 0; j < count; ++j) {
        const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(source)[j]) << 16;
        std::memcpy(target + j, &bits, 4);
      }
      break;
    case Type::i8:
      for (int64_t j = 0; j < count; ++j) target[j] = static_cast<float>(static_cast<const int8_t*>(source)[j]);
      break;
  }
}

void scan(const float* const* rows, int row_count, const float* const* queries, int query_count, int64_t width,
          float* dots, float* squares) {
  for (int r = 0; r < row_count; ++r) {
    const float* x = rows[r];
    for (int c = -1; c < query_count; ++c) {
      const float* q = c < 0 ? x : queries[c];
      float lanes[16] = {0};
      const int64_t whole = width / 16 * 16;
      for (int64_t j = 0; j < whole; j += 16)
        for (int i = 0; i < 16; ++i) lanes[i] += q[j + i] * x[j + i];
      for (int64_t j = whole; j < width; ++j) lanes[j - whole] += q[j] * x[j];
      (c < 0 ? squares[r] : dots[c * kPanel + r]) = sum16(lanes);
    }
  }
}

bool tile_fp32(const Tile& t) {
  bool any = false;
  for (int p = 0; p < t.panel_count; ++p) {
    const float* panel = reinterpret_cast<const float*>(t.panels + static_cast<size_t>(p) * t.panel_bytes);
    const float* params = t.params + p * 4 * kPanel;
    const float* queries = reinterpret_cast<const float*>(t.queries);
    for (int c = 0; c < t.width; ++c) {
      float acc[kPanel] = {0};
      for (int64_t s = 0; s < t.steps; ++s) {
        const float q = queries[s * t.width + c];
        for (int i = 0; i < kPanel; ++i) acc[i] += panel[s * kPanel + i] * q;
      }
      uint16_t mask = 0;
      float* bounds = t.bounds + (p * t.width + c) * kPanel;
      for (int i = 0; i < kPanel; ++i) {
        bounds[i] = acc[i] * params[i] + params[kPanel + i] * t.residual_weight[c] +
                    params[2 * kPanel + i] * t.norm_weight[c] - params[3 * kPanel + i] * t.offset_weight[c];
        mask |= static_cast<uint16_t>(!(bounds[i] < t.threshold[c])) << i;
      }
      t.masks[p * t.width + c] = mask;
      any |= mask != 0;
    }
  }
  return any;
}

}  // namespace

const Kernels& portable_kernels() {
  static const Kernels kernels = {"portable", false,      false, to_float, dot_f64, distance_f64,
                                  encode_row, scan,       {tile_fp32, nullptr, nullptr}};
  return kernels;
}

}  // namespace ftfast
