// The search itself: plan the work, run tiles over blocks of the gallery, rescore what the bound cannot drop.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <limits>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels.h"

namespace ftfast {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kPending = 48;             // candidates collected before they are rescored
constexpr int64_t kQueryBatch = 4096;    // queries whose state is alive at once
constexpr size_t kBlockBytes = 384 << 10;  // gallery bytes a core works on before it turns to the next queries
constexpr int64_t kWorkPerThread = int64_t{1} << 24;  // products that are worth a thread
constexpr int64_t kRoundBytes = int64_t{16} << 20;  // scratch for rows encoded on the way
constexpr int64_t kScanQueries = 8;      // up to here, without a shadow, a plain scan beats packing panels

bool better(const Hit& a, const Hit& b) { return a.score > b.score || (a.score == b.score && a.id < b.id); }

// What a query contributes to the bound; see topk.h. Everything is in units of the scale of its copy q'.
struct Query {
  const float* values = nullptr;  // float32, as stored
  double inverse_scale = 1.0;
  double norm = 0.0;    // |q|, before centring (cosine needs it)
  double square = 0.0;  // |q - mean|^2 (l2)
  double shift = 0.0;   // q . mean (ip, cosine)
  double slack = 0.0;   // float64 rounding of scores and of the quantities above
  bool wild = false;    // not finite or out of range: every row is rescored
};

struct Pending {
  float bound;
  int64_t id;
};

struct State {
  std::vector<Hit> heap;  // the worst of the kept hits on top
  Pending pending[kPending];
  int count = 0;
};

struct QueryTile {
  std::vector<uint8_t> values;  // [step][width][4 bytes]
  float residual_weight[kTile], norm_weight[kTile], offset_weight[kTile];
  int32_t start[kTile];
};

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

enum class Source { shadow, blocks, rows };

class Search {
 public:
  Search(const Matrix& queries, const Matrix& gallery, const Shadow& shadow, Source source, const Options& options,
         const Kernels& kernels)
      : gallery_(gallery), shadow_(shadow), ready_(source == Source::shadow), scan_(source == Source::rows),
        options_(options), kernels_(kernels), count_(queries.rows) {
    width_ = count_ > 4 ? kTile : count_ > 2 ? 4 : static_cast<int>(count_);
    values_.resize(static_cast<size_t>(count_ * gallery.width));
    kernels.to_float(queries.data, queries.type, count_ * gallery.width, values_.data());
    queries_.resize(static_cast<size_t>(count_));
    tiles_.resize(static_cast<size_t>((count_ + width_ - 1) / width_));
    for (auto& tile : tiles_) tile = QueryTile{};
    for (int64_t i = 0; i < count_; ++i) prepare(i);
  }

  void run(std::vector<std::vector<Hit>>& results, int64_t first_result, int64_t first_query, Counters& counters);

 private:
  struct Worker {
    int64_t tile_begin, tile_end;  // query tiles
    int part, parts;               // which slice of every chunk
    std::vector<State> states;
    std::vector<float> thresholds;
    std::vector<float> row;  // one converted gallery row
    Counters counters;
  };

  void prepare(int64_t index);
  void encode_query(int64_t index, const std::vector<double>& centred, double norm, Query& query);
  float threshold(const Query& query, double score) const;
  void work(Worker& worker, const Chunk& chunk, int64_t first_row, int64_t rows);
  void work_scan(Worker& worker, int64_t first_row, int64_t rows);
  void collect(Worker& worker, const Tile& tile, int64_t tile_index, int64_t first_row, int64_t rows);
  void push(Worker& worker, int64_t query, int64_t row, float bound);
  void flush(Worker& worker, int64_t query);
  double score(const Query& query, int64_t row, float* scratch) const;
  bool allowed(int64_t query, int64_t row) const;
  void loop(std::vector<Worker>& workers);
  void pack(std::vector<Chunk>& scratch, int64_t first, int64_t last, int self, int team) const;
  std::vector<Worker> plan() const;

  const Matrix& gallery_;
  const Shadow& shadow_;
  const bool ready_;  // the shadow holds every row; otherwise blocks are encoded on the way
  const bool scan_;   // no copy at all: plain products of the stored rows
  const Options& options_;
  const Kernels& kernels_;
  const int64_t count_;
  int64_t first_query_ = 0;  // of this batch, for masks
  int width_ = kTile;
  std::vector<float> values_;
  std::vector<Query> queries_;
  std::vector<QueryTile> tiles_;
};

void Search::prepare(int64_t index) {
  Query& query = queries_[index];
  const int64_t width = gallery_.width;
  query.values = values_.data() + index * width;
  query.norm = std::sqrt(kernels_.dot(query.values, query.values, width, nullptr));
  query.wild = !(query.norm == 0.0 || (query.norm > 0x1p-40 && query.norm < 0x1p40));
  std::vector<double> centred(static_cast<size_t>(width), 0.0);
  double norm = 0.0;
  if (!query.wild) {
    const bool shifted = options_.metric == Metric::l2;
    for (int64_t j = 0; j < width; ++j) {
      const double mean = shadow_.mean[j];
      centred[j] = shifted ? query.values[j] - mean : query.values[j];
      query.shift += query.values[j] * mean;
      norm += centred[j] * centred[j];
    }
    query.square = norm;
    norm = std::sqrt(norm);
    const double ulps = static_cast<double>(width + 16) * 0x1p-50;
    const double reach = options_.metric == Metric::cosine ? 1.0 + shadow_.mean_norm : shadow_.mean_norm;
    query.slack = ulps * (shifted ? query.square + query.norm * shadow_.mean_norm : query.norm * reach);
  }
  if (!scan_) encode_query(index, centred, norm, query);
  if (scan_) {
    // The scan multiplies stored float32 values; |x| is computed on the way, so one weight holds all rounding.
    QueryTile& tile = tiles_[index / width_];
    const int c = static_cast<int>(index % width_);
    tile.norm_weight[c] = static_cast<float>(norm * static_cast<double>(width + 32) * 0x1p-22 + 0x1p-90);
  }
}

void Search::encode_query(int64_t index, const std::vector<double>& centred, double norm, Query& query) {
  QueryTile& tile = tiles_[index / width_];
  const int c = static_cast<int>(index % width_);
  const int64_t width = gallery_.width, padded = shadow_.padded();
  if (tile.values.empty()) tile.values.assign(static_cast<size_t>(shadow_.steps * width_ * 4), 0);
  double largest = 0.0;
  for (double value : centred) largest = std::max(largest, std::fabs(value));
  const bool int8 = shadow_.mode == Mode::int8;
  const double scale = int8 && largest > 0x1p-90 ? largest / 127.0 : 1.0;
  double lost = 0.0, kept = 0.0;
  int32_t sum = 0;
  const int64_t group = int8 ? 4 : shadow_.mode == Mode::bf16 ? 2 : 1;
  for (int64_t j = 0; j < padded; ++j) {
    const double value = j < width ? centred[j] : 0.0;
    uint8_t* target = tile.values.data() + ((j / group) * width_ + c) * 4 + (j % group) * (4 / group);
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

// The smallest bound that a row with at least this float64 score can have, in the kernel's units.
float Search::threshold(const Query& query, double score) const {
  if (query.wild || !std::isfinite(score)) return score > 0.0 && !query.wild ? kInfinity : -kInfinity;
  double value;
  if (options_.metric == Metric::l2) {
    value = 0.5 * (query.square + score);
    value -= query.slack + static_cast<double>(gallery_.width + 16) * 0x1p-50 * std::fabs(score);
  } else if (options_.metric == Metric::cosine) {
    value = query.norm * score - query.shift - query.slack;
  } else {
    value = score - query.shift - query.slack - 0x1p-50 * std::fabs(score);
  }
  return round_down((value - 0x1p-20 * 0x1p-20 * std::fabs(value)) * query.inverse_scale);
}

bool Search::allowed(int64_t query, int64_t row) const {
  const int64_t index = first_query_ + query;
  if (options_.exclude != nullptr && options_.exclude[index] == row) return false;
  if (options_.mask == nullptr) return true;
  return options_.mask[options_.mask_per_query ? index * gallery_.rows + row : row] != 0;
}

double Search::score(const Query& query, int64_t row, float* scratch) const {
  const float* x;
  if (gallery_.type == Type::f32) {
    x = static_cast<const float*>(gallery_.row(row));
  } else {
    kernels_.to_float(gallery_.row(row), gallery_.type, gallery_.width, scratch);
    x = scratch;
  }
  if (options_.metric == Metric::l2) return -kernels_.distance(query.values, x, gallery_.width);
  if (options_.metric == Metric::ip) return kernels_.dot(query.values, x, gallery_.width, nullptr);
  double square;
  const double product = kernels_.dot(query.values, x, gallery_.width, &square);
  const double scale = query.norm * std::sqrt(square);
  return scale == 0.0 ? 0.0 : product / scale;
}

void Search::push(Worker& worker, int64_t query, int64_t row, float bound) {
  const int64_t local = query - worker.tile_begin * width_;
  State& state = worker.states[local];
  if (bound < worker.thresholds[local] || !allowed(query, row)) return;
  state.pending[state.count++] = {bound, row};
  ++worker.counters.candidates;
  const char* memory = static_cast<const char*>(gallery_.row(row));
  __builtin_prefetch(memory);
  __builtin_prefetch(memory + 64);
  if (state.count == kPending) flush(worker, query);
}

void Search::flush(Worker& worker, int64_t query) {
  const int64_t local = query - worker.tile_begin * width_;
  State& state = worker.states[local];
  float& limit = worker.thresholds[local];
  const size_t k = static_cast<size_t>(options_.k);
  const int64_t row_bytes = static_cast<const char*>(gallery_.row(1)) - static_cast<const char*>(gallery_.row(0));
  // The best bounds first: they raise the threshold, and the others may then be dropped unread.
  std::sort(state.pending, state.pending + state.count,
            [](const Pending& a, const Pending& b) { return a.bound > b.bound || (a.bound == b.bound && a.id < b.id); });
  for (int i = 0; i < state.count; ++i) {
    if (state.pending[i].bound < limit) continue;
    if (i + 1 < state.count && !(state.pending[i + 1].bound < limit)) {
      const char* next = static_cast<const char*>(gallery_.row(state.pending[i + 1].id));
      for (int64_t at = 0; at < row_bytes; at += 64) __builtin_prefetch(next + at);
    }
    const Hit hit{score(queries_[query], state.pending[i].id, worker.row.data()), state.pending[i].id};
    ++worker.counters.rescored;
    if (std::isnan(hit.score)) continue;
    if (options_.range) {
      const double shown = options_.metric == Metric::l2 ? -hit.score : hit.score;
      const bool inside = options_.metric == Metric::l2 ? static_cast<float>(shown) < options_.radius
                                                        : static_cast<float>(shown) > options_.radius;
      if (inside) state.heap.push_back(hit);
      continue;
    }
    if (state.heap.size() < k) {
      state.heap.push_back(hit);
      std::push_heap(state.heap.begin(), state.heap.end(), better);
    } else if (better(hit, state.heap.front())) {
      std::pop_heap(state.heap.begin(), state.heap.end(), better);
      state.heap.back() = hit;
      std::push_heap(state.heap.begin(), state.heap.end(), better);
    } else {
      continue;
    }
    if (state.heap.size() == k) limit = threshold(queries_[query], state.heap.front().score);
  }
  state.count = 0;
}

void Search::collect(Worker& worker, const Tile& tile, int64_t tile_index, int64_t first_row, int64_t rows) {
  const int64_t first = tile_index * width_;
  const int queries = static_cast<int>(std::min<int64_t>(width_, count_ - first));
  for (int p = 0; p < tile.panel_count; ++p)
    for (int c = 0; c < queries; ++c) {
      uint32_t mask = tile.masks[p * width_ + c];
      while (mask != 0) {
        const int lane = __builtin_ctz(mask);
        mask &= mask - 1;
        const int64_t row = p * kPanel + lane;
        if (row < rows) push(worker, first + c, first_row + row, tile.bounds[(p * width_ + c) * kPanel + lane]);
      }
    }
}

void Search::work(Worker& worker, const Chunk& chunk, int64_t first_row, int64_t rows) {
  alignas(64) float bounds[kMaxPanels * kTile * kPanel];
  uint16_t masks[kMaxPanels * kTile];
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  const int64_t begin = panels * worker.part / worker.parts, end = panels * (worker.part + 1) / worker.parts;
  const int64_t per_block = std::max<int64_t>(1, static_cast<int64_t>(kBlockBytes / shadow_.panel_bytes()) / kMaxPanels) *
                            kMaxPanels;
  const TileFunction function = kernels_.tile[static_cast<int>(shadow_.mode)];
  for (int64_t block = begin; block < end; block += per_block) {
    const int64_t block_end = std::min(end, block + per_block);
    for (int64_t t = worker.tile_begin; t < worker.tile_end; ++t) {
      const QueryTile& query = tiles_[t];
      float* limits = worker.thresholds.data() + (t - worker.tile_begin) * width_;
      for (int64_t p = block; p < block_end; p += kMaxPanels) {
        const Tile tile{chunk.panels.get() + p * shadow_.panel_bytes(), shadow_.panel_bytes(),
                        chunk.params.data() + p * 4 * kPanel,
                        static_cast<int>(std::min<int64_t>(kMaxPanels, block_end - p)), query.values.data(), width_,
                        shadow_.steps, query.residual_weight, query.norm_weight, query.offset_weight, limits,
                        query.start, bounds, masks};
        if (function(tile)) collect(worker, tile, t, first_row + p * kPanel, rows - p * kPanel);
      }
    }
    worker.counters.scanned += (std::min(rows, block_end * kPanel) - block * kPanel) *
                               (std::min(count_, worker.tile_end * width_) - worker.tile_begin * width_);
  }
}

void Search::work_scan(Worker& worker, int64_t first_row, int64_t rows) {
  alignas(64) float dots[4 * kPanel], squares[kPanel];
  const float* pointers[kPanel];
  const int64_t panels = (rows + kPanel - 1) / kPanel, width = gallery_.width;
  const int64_t begin = panels * worker.part / worker.parts * kPanel;
  const int64_t end = std::min(rows, panels * (worker.part + 1) / worker.parts * kPanel);
  std::vector<float> converted(gallery_.type == Type::f32 ? 0 : static_cast<size_t>(kPanel * width));
  const int64_t first = worker.tile_begin * width_, last = std::min(count_, worker.tile_end * width_);
  for (int64_t base = begin; base < end; base += kPanel) {
    const int height = static_cast<int>(std::min<int64_t>(kPanel, end - base));
    const void* source = gallery_.row(first_row + base);
    if (gallery_.type != Type::f32) {
      kernels_.to_float(source, gallery_.type, height * width, converted.data());
      source = converted.data();
    }
    for (int r = 0; r < height; ++r) pointers[r] = static_cast<const float*>(source) + r * width;
    for (int64_t q = first; q < last; q += 4) {
      const int queries = static_cast<int>(std::min<int64_t>(4, last - q));
      const float* values[4];
      for (int c = 0; c < queries; ++c) values[c] = queries_[q + c].values;
      kernels_.scan(pointers, height, values, queries, width, dots, squares);
      for (int c = 0; c < queries; ++c) {
        const QueryTile& tile = tiles_[(q + c) / width_];
        const float weight = tile.norm_weight[(q + c) % width_];
        const float limit = worker.thresholds[q + c - first];
        for (int r = 0; r < height; ++r) {
          const double square = squares[r];
          float bound = kInfinity;  // a square out of range says nothing about the product
          if (square > 0x1p-76 && square < 0x1p76) {
            const double norm = std::sqrt(square);
            double value = dots[c * kPanel + r] + weight * norm;
            if (options_.metric == Metric::cosine) value = value / norm + weight;
            if (options_.metric == Metric::l2)
              value -= 0.5 * square * (1.0 - static_cast<double>(width + 32) * 0x1p-22);
            bound = static_cast<float>(value) + 0x1p-22f * std::fabs(static_cast<float>(value));
          }
          if (!(bound < limit)) push(worker, q + c, first_row + base + r, bound);
        }
      }
    }
  }
  worker.counters.scanned += (end > begin ? end - begin : 0) * (last - first);
}

// Threads first share the queries, which keeps one running threshold per query; when there are more threads than query
// tiles, the rest of them share the gallery.
std::vector<Search::Worker> Search::plan() const {
  const int64_t tiles = static_cast<int64_t>(tiles_.size());
  // Waking a thread costs more than a small search.
  const int64_t useful = 1 + count_ * gallery_.rows * gallery_.width / kWorkPerThread;
  const int threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(options_.threads, useful)));
  const int groups = static_cast<int>(std::min<int64_t>(threads, scan_ ? 1 : tiles));
  const int parts = threads / groups;
  std::vector<Worker> workers(static_cast<size_t>(groups * parts));
  for (int g = 0; g < groups; ++g)
    for (int p = 0; p < parts; ++p) {
      Worker& worker = workers[static_cast<size_t>(g * parts + p)];
      worker.tile_begin = tiles * g / groups;
      worker.tile_end = tiles * (g + 1) / groups;
      worker.part = p;
      worker.parts = parts;
      const int64_t first = worker.tile_begin * width_;
      const int64_t last = std::min(count_, worker.tile_end * width_);
      worker.states.resize(static_cast<size_t>(last - first));
      worker.thresholds.assign(static_cast<size_t>((worker.tile_end - worker.tile_begin) * width_), kInfinity);
      std::fill_n(worker.thresholds.begin(), last - first, -kInfinity);
      worker.row.resize(static_cast<size_t>(gallery_.width));
      for (int64_t q = first; q < last; ++q) {
        if (!options_.range) {
          worker.states[q - first].heap.reserve(static_cast<size_t>(options_.k));
          continue;
        }
        // One float32 step of room: a score above or below the radius may round to the same float32.
        const double toward = options_.metric == Metric::l2 ? kInfinity : -kInfinity;
        const double radius = std::nextafterf(options_.radius, static_cast<float>(toward));
        worker.thresholds[q - first] = threshold(queries_[q], options_.metric == Metric::l2 ? -radius : radius);
      }
    }
  return workers;
}

// Encodes this thread's share of the rows [first, last) into the scratch chunks.
void Search::pack(std::vector<Chunk>& scratch, int64_t first, int64_t last, int self, int team) const {
  const int64_t panels = (last - first + kPanel - 1) / kPanel;
  int64_t begin = first + panels * self / team * kPanel;
  const int64_t end = std::min(last, first + panels * (self + 1) / team * kPanel);
  while (begin < end) {
    const int64_t chunk = (begin - first) / kChunk;
    const int64_t stop = std::min(end, first + (chunk + 1) * kChunk);
    shadow_.encode(gallery_, begin, stop, (begin - first) % kChunk, scratch[static_cast<size_t>(chunk)], kernels_);
    begin = stop;
  }
}

void Search::loop(std::vector<Worker>& workers) {
  const int threads = static_cast<int>(workers.size());
  const bool packing = !ready_ && !scan_;
  // Without a shadow the threads encode a round of chunks together, then search it: two barriers per round.
  int64_t chunks_per_round = 1;
  std::vector<Chunk> scratch;
  if (packing) {
    const int64_t chunks = (gallery_.rows + kChunk - 1) / kChunk;
    const int64_t chunk_bytes = kChunk / kPanel * static_cast<int64_t>(shadow_.panel_bytes());
    chunks_per_round = std::max<int64_t>(1, std::min(chunks, kRoundBytes / chunk_bytes));
    for (int64_t c = 0; c < chunks_per_round; ++c) scratch.push_back(shadow_.allocate());
  }
  const int64_t round_rows = chunks_per_round * kChunk;
  std::atomic<bool> stop{false};
  std::exception_ptr failure = nullptr;
  auto last_check = std::chrono::steady_clock::now();
  const auto guarded = [&](const auto& function) {
    if (stop) return;
    try {
      function();
    } catch (...) {
#pragma omp critical
      failure = std::current_exception();
      stop = true;
    }
  };
  const auto ask = [&] {
    const auto now = std::chrono::steady_clock::now();
    if (options_.interrupted == nullptr || now - last_check < std::chrono::milliseconds(30)) return;
    last_check = now;
    if (options_.interrupted()) stop = true;
  };
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#ifdef _OPENMP
    const int team = threads > 1 ? omp_get_num_threads() : 1, self = threads > 1 ? omp_get_thread_num() : 0;
#else
    const int team = 1, self = 0;
#endif
    for (int64_t first = 0; first < gallery_.rows; first += round_rows) {
      const int64_t last = std::min(gallery_.rows, first + round_rows);
      if (packing) {
        guarded([&] { pack(scratch, first, last, self, team); });
#pragma omp barrier
      }
      for (int64_t begin = first; begin < last; begin += kChunk) {
        const int64_t rows = std::min(kChunk, last - begin);
        // The team may be smaller than asked for; every worker is still served.
        for (int w = self; w < threads; w += team)
          guarded([&] {
            if (scan_) {
              work_scan(workers[w], begin, rows);
            } else {
              const int64_t chunk = (packing ? begin - first : begin) / kChunk;
              work(workers[w], packing ? scratch[chunk] : shadow_.chunks[chunk], begin, rows);
            }
          });
        if (self == 0) ask();
      }
      if (packing) {
#pragma omp barrier
      }
    }
    for (int w = self; w < threads; w += team)
      guarded([&] {
        Worker& worker = workers[w];
        const int64_t begin = worker.tile_begin * width_, end = std::min(count_, worker.tile_end * width_);
        for (int64_t q = begin; q < end; ++q) flush(worker, q);
      });
  }
  if (failure != nullptr) std::rethrow_exception(failure);
  if (stop) throw Stopped{};
}

void Search::run(std::vector<std::vector<Hit>>& results, int64_t first_result, int64_t first_query,
                 Counters& counters) {
  first_query_ = first_query;
  std::vector<Worker> workers = plan();
  loop(workers);
  for (Worker& worker : workers) {
    counters.scanned += worker.counters.scanned;
    counters.candidates += worker.counters.candidates;
    counters.rescored += worker.counters.rescored;
    const int64_t begin = worker.tile_begin * width_, end = std::min(count_, worker.tile_end * width_);
    for (int64_t q = begin; q < end; ++q) {
      std::vector<Hit>& result = results[first_result + q];
      std::vector<Hit>& heap = worker.states[q - begin].heap;
      if (result.empty()) result = std::move(heap);
      else result.insert(result.end(), heap.begin(), heap.end());
    }
  }
  const size_t k = static_cast<size_t>(options_.k);
  for (int64_t q = 0; q < count_; ++q) {
    std::vector<Hit>& result = results[first_result + q];
    std::sort(result.begin(), result.end(), better);
    if (!options_.range && result.size() > k) result.resize(k);
  }
}

}  // namespace

std::vector<std::vector<Hit>> search(const Matrix& queries, const Matrix& gallery, const Shadow* shadow,
                                     const Options& options, const Kernels& kernels, Counters& counters) {
  const Source source = shadow != nullptr ? Source::shadow
                        : queries.rows <= kScanQueries ? Source::rows : Source::blocks;
  Shadow temporary(options.metric, source == Source::rows ? Mode::fp32 : options.mode, gallery.width);
  if (shadow == nullptr) temporary.choose_mean(gallery, kernels);
  const Shadow& used = shadow != nullptr ? *shadow : temporary;
  std::vector<std::vector<Hit>> results(static_cast<size_t>(queries.rows));
  for (int64_t first = 0; first < queries.rows; first += kQueryBatch) {
    Matrix batch = queries;
    batch.data = queries.row(first);
    batch.rows = std::min(kQueryBatch, queries.rows - first);
    Search(batch, gallery, used, source, options, kernels).run(results, first, first, counters);
  }
  return results;
}

const Kernels& best_kernels() {
  if (const Kernels* kernels = avx512_kernels()) return *kernels;
  if (const Kernels* kernels = avx2_kernels()) return *kernels;
  return portable_kernels();
}

const Kernels* kernels_by_name(const char* name) {
  if (std::strcmp(name, "auto") == 0) return &best_kernels();
  if (std::strcmp(name, "portable") == 0) return &portable_kernels();
  if (std::strcmp(name, "avx2") == 0) return avx2_kernels();
  if (std::strcmp(name, "avx512") == 0) return avx512_kernels();
  return nullptr;
}

}  // namespace ftfast
