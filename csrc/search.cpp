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

#include "queries.h"

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

struct Pending {
  float bound;
  int64_t id;
};

struct State {
  std::vector<Hit> heap;  // the worst of the kept hits on top
  Pending pending[kPending];
  int count = 0;
};

enum class Source { shadow, blocks, rows };

class Search {
 public:
  Search(const Matrix& queries, const Matrix& gallery, const Shadow& shadow, Source source, const Options& options,
         const Kernels& kernels)
      : gallery_(gallery), shadow_(shadow), ready_(source == Source::shadow), scan_(source == Source::rows),
        options_(options), kernels_(kernels), batch_(queries, gallery, shadow, options.metric, scan_, kernels) {}

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

  void work(Worker& worker, const Chunk& chunk, int64_t first_row, int64_t rows);
  void work_scan(Worker& worker, int64_t first_row, int64_t rows);
  void collect(Worker& worker, const Tile& tile, int64_t tile_index, int64_t first_row, int64_t rows);
  void push(Worker& worker, int64_t query, int64_t row, float bound);
  void flush(Worker& worker, int64_t query);
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
  int64_t first_query_ = 0;  // of this batch, for masks
  QueryBatch batch_;
  const int64_t count_ = batch_.count;
  const int width_ = batch_.tile_width;  // queries per tile
};

bool Search::allowed(int64_t query, int64_t row) const {
  const int64_t index = first_query_ + query;
  if (options_.exclude != nullptr && options_.exclude[index] == row) return false;
  if (options_.mask == nullptr) return true;
  return options_.mask[options_.mask_per_query ? index * gallery_.rows + row : row] != 0;
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
    const Hit hit{batch_.score(query, state.pending[i].id, worker.row.data()), state.pending[i].id};
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
    if (state.heap.size() == k) limit = batch_.threshold(query, state.heap.front().score);
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
      const QueryTile& query = batch_.tiles[t];
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
      for (int c = 0; c < queries; ++c) values[c] = batch_.queries[q + c].values;
      kernels_.scan(pointers, height, values, queries, width, dots, squares);
      for (int c = 0; c < queries; ++c) {
        const QueryTile& tile = batch_.tiles[(q + c) / width_];
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
  const int64_t tiles = static_cast<int64_t>(batch_.tiles.size());
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
        worker.thresholds[q - first] = batch_.threshold(q, options_.metric == Metric::l2 ? -radius : radius);
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
