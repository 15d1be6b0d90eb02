// The contract of exact top-k search, shared by the CPU kernels, the CUDA kernels and the PyTorch fallback.
//
// Every (query, row) pair has one score, defined in float64 from the inputs as stored:
//   ip      s = sum_j q_j x_j
//   cosine  s = ip / (|q| |x|), and 0 where a norm is 0
//   l2      s = -sum_j (q_j - x_j)^2            (reported as the squared distance)
// The result of a query holds the k pairs with the largest s, sorted best first.
//   * Equal scores come by rising index.
//   * A NaN score is never selected. Where fewer than k rows are allowed the tail has index -1 and score -inf.
//   * Indices are int64; scores are float64 inside (an exact merge of shards needs them) and reported in float32.
//   * The result depends neither on the number of threads nor on the instruction set.
//   * Memory is O(queries x k + a block), never O(queries x rows).
//
// How it is both fast and exact. Each row x becomes y = a x - mu (a = 1, or 1/|x| for cosine; mu any fixed vector), so
// that the order of a query depends on F(q, y) = q.y - h with h = 0 (ip, cosine) or |y|^2 / 2 (l2). A cheap copy y' of y
// (int8, bfloat16 or float32) and a cheap copy q' of q give the bound
//   F(q, y) <= q'.y' + |q| |y - y'| + |q - q'| |y'| - h,
// evaluated with every rounding error of its own arithmetic added on the safe side. A row is dropped only when this
// bound is below the k-th best float64 score found so far; every other row is scored again in float64.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace ftfast {

enum class Metric : int { ip = 0, cosine = 1, l2 = 2 };
enum class Type : int { f32 = 0, f16 = 1, bf16 = 2, i8 = 3 };
enum class Mode : int { fp32 = 0, bf16 = 1, int8 = 2 };

constexpr int kPanel = 16;        // rows whose values lie side by side in one vector register
constexpr int kTile = 8;          // queries per register tile
constexpr int kMaxPanels = 3;     // panels per register tile
constexpr int64_t kChunk = 4096;  // rows per separately allocated piece of a shadow

struct Matrix {
  const void* data = nullptr;
  int64_t rows = 0;
  int64_t width = 0;
  Type type = Type::f32;

  const void* row(int64_t index) const;
};

struct Counters {
  int64_t scanned = 0;     // pairs whose bound was evaluated
  int64_t candidates = 0;  // pairs the bound could not drop
  int64_t rescored = 0;    // pairs scored in float64
};

// Rows as the bound needs them: per row the scale of y', an upper bound of |y - y'|, an upper bound of |y'| and a lower
// bound of h.
struct Chunk {
  std::unique_ptr<uint8_t, void (*)(void*)> panels{nullptr, nullptr};
  std::vector<float> params;  // [panel][scale, residual, norm, offset][kPanel]
};

struct Kernels;

// A low-precision copy of a gallery with exact residual norms.
class Shadow {
 public:
  Shadow(Metric metric, Mode mode, int64_t width);

  // Chooses mu from a sample of `rows`; only the tightness of the bound depends on it.
  void choose_mean(const Matrix& rows, const Kernels& kernels);
  void append(const Matrix& rows, const Kernels& kernels, int threads);

  // Encodes rows [first, last) of `rows` into `chunk`, the first one at slot `slot`.
  void encode(const Matrix& rows, int64_t first, int64_t last, int64_t slot, Chunk& chunk, const Kernels& kernels) const;
  Chunk allocate() const;

  Metric metric;
  Mode mode;
  int64_t width;
  int64_t steps;  // four-byte groups per row
  int64_t rows = 0;
  std::vector<float> mean;  // padded to the width of a panel
  double mean_norm = 0.0;
  std::vector<Chunk> chunks;

  size_t panel_bytes() const { return static_cast<size_t>(steps) * 64; }
  int64_t padded() const { return steps * (mode == Mode::int8 ? 4 : mode == Mode::bf16 ? 2 : 1); }
};

struct Options {
  int64_t k = 1;
  Metric metric = Metric::ip;
  Mode mode = Mode::fp32;
  int threads = 1;
  const uint8_t* mask = nullptr;  // 1: the row may be returned
  bool mask_per_query = false;
  const int64_t* exclude = nullptr;
  bool range = false;  // collect every row with score > radius instead of the k best
  float radius = 0.0f;
  bool (*interrupted)() = nullptr;  // asked now and then by the calling thread
};

struct Hit {
  double score;
  int64_t id;
};

struct Stopped {};  // thrown when `interrupted` said so

// One list of hits per query, sorted best first. `shadow` may be null: blocks are then encoded on the way.
std::vector<std::vector<Hit>> search(const Matrix& queries, const Matrix& gallery, const Shadow* shadow,
                                     const Options& options, const Kernels& kernels, Counters& counters);

}  // namespace ftfast
