// Building the low-precision copy of a gallery.
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>

#include "kernels.h"

namespace ftfast {

namespace {

int64_t type_bytes(Type type) { return type == Type::f32 ? 4 : type == Type::i8 ? 1 : 2; }

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

const void* Matrix::row(int64_t index) const {
  return static_cast<const uint8_t*>(data) + index * width * type_bytes(type);
}

Shadow::Shadow(Metric metric_, Mode mode_, int64_t width_)
    : metric(metric_), mode(mode_), width(width_),
      steps(mode_ == Mode::int8 ? (width_ + 3) / 4 : mode_ == Mode::bf16 ? (width_ + 1) / 2 : width_),
      mean(static_cast<size_t>(round_up(width_, 16)), 0.0f) {}

void Shadow::choose_mean(const Matrix& matrix, const Kernels& kernels) {
  // An exactly representable copy gains nothing from centring, and float32 rows are such a copy.
  if (mode == Mode::fp32) return;
  const int64_t samples = std::min<int64_t>(matrix.rows, 1024);
  std::vector<float> values(static_cast<size_t>(samples * width));
  std::vector<double> norms(static_cast<size_t>(samples));
  for (int64_t i = 0; i < samples; ++i) {
    float* value = values.data() + i * width;
    kernels.to_float(matrix.row(i * matrix.rows / samples), matrix.type, width, value);
    norms[i] = std::sqrt(kernels.dot(value, value, width, nullptr));
  }
  std::vector<double> ordered;
  for (double norm : norms)
    if (norm > 0x1p-40 && norm < 0x1p40) ordered.push_back(norm);
  if (ordered.empty()) return;
  std::nth_element(ordered.begin(), ordered.begin() + ordered.size() / 2, ordered.end());
  const double limit = 4.0 * ordered[ordered.size() / 2];
  std::vector<double> sum(static_cast<size_t>(width), 0.0);
  int64_t used = 0;
  for (int64_t i = 0; i < samples; ++i) {
    if (!(norms[i] > 0x1p-40 && norms[i] <= limit)) continue;
    const double weight = metric == Metric::cosine ? 1.0 / norms[i] : 1.0;
    for (int64_t j = 0; j < width; ++j) sum[j] += weight * values[i * width + j];
    ++used;
  }
  double square = 0.0;
  for (int64_t j = 0; j < width; ++j) {
    mean[j] = static_cast<float>(sum[j] / static_cast<double>(used));
    square += static_cast<double>(mean[j]) * mean[j];
  }
  mean_norm = std::sqrt(square);
}

Chunk Shadow::allocate() const {
  const size_t panels = static_cast<size_t>(kChunk / kPanel);
  const size_t bytes = panels * panel_bytes();
  constexpr size_t kHuge = size_t{1} << 21;
  const size_t alignment = bytes >= kHuge ? kHuge : 4096;
  void* memory = std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (alignment == kHuge) madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  Chunk chunk;
  chunk.panels = {static_cast<uint8_t*>(memory), &std::free};
  chunk.params.assign(panels * 4 * kPanel, 0.0f);
  return chunk;
}

void Shadow::encode(const Matrix& matrix, int64_t first, int64_t last, int64_t slot, Chunk& chunk,
                    const Kernels& kernels) const {
  const int64_t floats = round_up(padded(), 16);
  std::vector<float> buffer(static_cast<size_t>(3 * floats) + 16, 0.0f);
  float* row = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(buffer.data()), 64));
  EncodeArgs args{row, mean.data(), padded(), width, mean_norm, metric, row + floats};
  for (int64_t i = first; i < last; ++i, ++slot) {
    kernels.to_float(matrix.row(i), matrix.type, width, row);
    const int64_t panel = slot / kPanel, lane = slot % kPanel;
    uint32_t* target = reinterpret_cast<uint32_t*>(chunk.panels.get() + panel * panel_bytes()) + lane;
    const EncodedRow encoded = kernels.encode(args, mode, target);
    float* params = chunk.params.data() + panel * 4 * kPanel + lane;
    params[0] = encoded.scale;
    params[kPanel] = encoded.residual;
    params[2 * kPanel] = encoded.norm;
    params[3 * kPanel] = encoded.offset;
  }
}

void Shadow::append(const Matrix& matrix, const Kernels& kernels, int threads) {
  if (rows == 0) choose_mean(matrix, kernels);
  const int64_t total = rows + matrix.rows;
  while (static_cast<int64_t>(chunks.size()) * kChunk < total) chunks.push_back(allocate());
  // Work is cut at panel borders of the shadow, so that no two threads write one panel.
  const int64_t first_panel = rows / kPanel, last_panel = (total + kPanel - 1) / kPanel;
  std::atomic<bool> failed{false};
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if (threads > 1)
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const int64_t begin = std::max(rows, panel * kPanel), end = std::min(total, (panel + 1) * kPanel);
    try {
      encode(matrix, begin - rows, end - rows, begin % kChunk, chunks[begin / kChunk], kernels);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  }
  if (failed) throw std::bad_alloc();
  rows = total;
}

}  // namespace ftfast
