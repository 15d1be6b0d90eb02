// The inner loops, one table of functions per instruction set, chosen at run time.
#pragma once

#include "topk.h"

namespace ftfast {

// One register tile: up to three panels of sixteen rows against up to eight queries.
struct Tile {
  const uint8_t* panels;
  size_t panel_bytes;
  const float* params;  // of the first panel
  int panel_count;      // 1..kMaxPanels
  const uint8_t* queries;  // [step][width][4 bytes]
  int width;               // queries in the tile: 1, 2, 4 or 8
  int64_t steps;
  const float* residual_weight;  // per query, all in units of the query's scale
  const float* norm_weight;
  const float* offset_weight;
  const float* threshold;
  const int32_t* start;  // int8: minus 128 times the sum of the query, since rows are stored as value + 128
  float* bounds;         // out: [panel][query][kPanel]
  uint16_t* masks;       // out: [panel][query], one bit per row whose bound is not below the threshold
};

using TileFunction = bool (*)(const Tile&);

struct EncodedRow {
  float scale, residual, norm, offset;
};

struct EncodeArgs {
  const float* row;   // padded with zeros
  const float* mean;  // padded with zeros
  int64_t padded;
  int64_t width;
  double mean_norm;
  Metric metric;
  float* scratch;  // padded floats
};

struct Kernels {
  const char* name;
  bool has_bf16;
  bool has_int8;
  void (*to_float)(const void* source, Type type, int64_t count, float* target);
  // sum q x and, when `square` is not null, sum x x, both in float64 with one fixed order of addition.
  double (*dot)(const float* q, const float* x, int64_t width, double* square);
  double (*distance)(const float* q, const float* x, int64_t width);
  EncodedRow (*encode)(const EncodeArgs& args, Mode mode, uint32_t* target);  // target stride: kPanel words
  // Plain float32 dot products of sixteen (or fewer) contiguous rows with up to four queries, and the rows' squares.
  void (*scan)(const float* const* rows, int row_count, const float* const* queries, int query_count, int64_t width,
               float* dots, float* squares);
  TileFunction tile[3];  // by Mode; null where the instruction set has none
};

const Kernels& portable_kernels();
const Kernels* avx2_kernels();    // null where the compiler or the processor has none
const Kernels* avx512_kernels();  // bf16 and int8 members are set by what the processor has
const Kernels& best_kernels();
const Kernels* kernels_by_name(const char* name);

}  // namespace ftfast
