// Preparing queries: their copies, the weights of the bound, thresholds and exact scores.
#include "queries.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace ftfast {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

float round_down(double value) {
  const float result = static_cast<float>(value);
  return std::nextafterf(result, -kInfinity);
}

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

float from_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

QueryBatch::QueryBatch(const Matrix& queries, const Matrix& gallery, const Shadow& shadow, Metric metric, bool scan,
                       const Kernels& kernels)
    : count(queries.rows), gallery_(gallery), shadow_(shadow), metric_(metric), scan_(scan), kernels_(kernels) {
  tile_width = count > 4 ? kTile : count > 2 ? 4 : static_cast<int>(count);
  values_.resize(static_cast<size_t>(count * gallery.width));
  kernels.to_float(queries.data, queries.type, count * gallery.width, values_.data());
  this->queries.resize(static_cast<size_t>(count));
  tiles.resize(static_cast<size_t>((count + tile_width - 1) / tile_width));
  for (auto& tile : tiles) tile = QueryTile{};
  for (int64_t i = 0; i < count; ++i) prepare(i);
}

void QueryBatch::prepare(int64_t index) {
  Query& query = queries[index];
  const int64_t width = gallery_.width;
  query.values = values_.data() + index * width;
  query.norm = std::sqrt(kernels_.dot(query.values, query.values, width, nullptr));
  query.wild = !(query.norm == 0.0 || (query.norm > 0x1p-40 && query.norm < 0x1p40));
  std::vector<double> centred(static_cast<size_t>(width), 0.0);
  double norm = 0.0;
  if (!query.wild) {
    const bool shifted = metric_ == Metric::l2;
    for (int64_t j = 0; j < width; ++j) {
      const double mean = shadow_.mean[j];
      centred[j] = shifted ? query.values[j] - mean : query.values[j];
      query.shift += query.values[j] * mean;
      norm += centred[j] * centred[j];
    }
    query.square = norm;
    norm = std::sqrt(norm);
    const double ulps = static_cast<double>(width + 16) * 0x1p-50;
    const double reach = metric_ == Metric::cosine ? 1.0 + shadow_.mean_norm : shadow_.mean_norm;
    query.slack = ulps * (shifted ? query.square + query.norm * shadow_.mean_norm : query.norm * reach);
  }
  if (!scan_) encode(index, centred, norm);
  if (scan_) {
    // The scan multiplies stored float32 values; |x| is computed on the way, so one weight holds all rounding.
    QueryTile& tile = tiles[index / tile_width];
    const int c = static_cast<int>(index % tile_width);
    tile.norm_weight[c] = static_cast<float>(norm * static_cast<double>(width + 32) * 0x1p-22 + 0x1p-90);
  }
}

void QueryBatch::encode(int64_t index, const std::vector<double>& centred, double norm) {
  Query& query = queries[index];
  QueryTile& tile = tiles[index / tile_width];
  const int c = static_cast<int>(index % tile_width);
  const int64_t width = gallery_.width, padded = shadow_.padded();
  if (tile.values.empty()) tile.values.assign(static_cast<size_t>(shadow_.steps * tile_width * 4), 0);
  double largest = 0.0;
  for (double value : centred) largest = std::max(largest, std::fabs(value));
  const bool int8 = shadow_.mode == Mode::int8;
  const double scale = int8 && largest > 0x1p-90 ? largest / 127.0 : 1.0;
  double lost = 0.0, kept = 0.0;
  int32_t sum = 0;
  const int64_t group = int8 ? 4 : shadow_.mode == Mode::bf16 ? 2 : 1;
  for (int64_t j = 0; j < padded; ++j) {
    const double value = j < width ? centred[j] : 0.0;
    uint8_t* target = tile.values.data() + ((j / group) * tile_width + c) * 4 + (j % group) * (4 / group);
    double copy;
    if (int8) {
      const int rounded = static_cast<int>(std::nearbyint(value / scale));
      *target = static_cast<uint8_t>(static_cast<int8_t>(rounded));
      sum += rounded;
      copy = scale * rounded;
    } else if (shadow_.mode == Mode::bf16) {
      const uint16_t rounded = to_bf16(static_cast<float>(value));
      std::memcpy(target, &rounded, 2);
      copy = from_bf16(rounded);
    } else {
      const float rounded = static_cast<float>(value);
      std::memcpy(target, &rounded, 4);
      copy = rounded;
    }
    lost += (value - copy) * (value - copy);
    kept += copy * copy;
  }
  lost = std::sqrt(lost);
  kept = std::sqrt(kept);
  // Rounding of the products: exact for int8 apart from the conversion, else one rounding per term; and of the bound's
  // own sum, relative to each of its terms.
  const double terms = int8 ? 8.0 : static_cast<double>(padded + 16);
  query.inverse_scale = 1.0 / scale;
  tile.start[c] = -128 * sum;
  tile.residual_weight[c] = static_cast<float>((norm * (1.0 + 0x1p-18)) / scale + 0x1p-60);
  tile.norm_weight[c] =
      static_cast<float>((lost * (1.0 + 0x1p-18) + terms * 0x1p-22 * (kept + norm) + norm * 0x1p-20) / scale + 0x1p-60);
  tile.offset_weight[c] = static_cast<float>((1.0 - 0x1p-18) / scale);
}

float QueryBatch::threshold(int64_t index, double score) const {
  const Query& query = queries[index];
  if (query.wild || !std::isfinite(score)) return score > 0.0 && !query.wild ? kInfinity : -kInfinity;
  double value;
  if (metric_ == Metric::l2) {
    value = 0.5 * (query.square + score);
    value -= query.slack + static_cast<double>(gallery_.width + 16) * 0x1p-50 * std::fabs(score);
  } else if (metric_ == Metric::cosine) {
    value = query.norm * score - query.shift - query.slack;
  } else {
    value = score - query.shift - query.slack - 0x1p-50 * std::fabs(score);
  }
  return round_down((value - 0x1p-20 * 0x1p-20 * std::fabs(value)) * query.inverse_scale);
}

double QueryBatch::score(int64_t index, int64_t row, float* scratch) const {
  const Query& query = queries[index];
  const float* x;
  if (gallery_.type == Type::f32) {
    x = static_cast<const float*>(gallery_.row(row));
  } else {
    kernels_.to_float(gallery_.row(row), gallery_.type, gallery_.width, scratch);
    x = scratch;
  }
  if (metric_ == Metric::l2) return -kernels_.distance(query.values, x, gallery_.width);
  if (metric_ == Metric::ip) return kernels_.dot(query.values, x, gallery_.width, nullptr);
  double square;
  const double product = kernels_.dot(query.values, x, gallery_.width, &square);
  const double scale = query.norm * std::sqrt(square);
  return scale == 0.0 ? 0.0 : product / scale;
}

}  // namespace ftfast
