// The queries of a batch as the search needs them: float32 values, a low-precision copy, and what each contributes to
// the bound of topk.h.
#pragma once

#include "kernels.h"

namespace ftfast {

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

struct QueryTile {
  std::vector<uint8_t> values;  // [step][width][4 bytes]
  float residual_weight[kTile], norm_weight[kTile], offset_weight[kTile];
  int32_t start[kTile];
};

class QueryBatch {
 public:
  // `scan`: the stored rows are multiplied as they are, so no low-precision copy of the queries is made.
  QueryBatch(const Matrix& queries, const Matrix& gallery, const Shadow& shadow, Metric metric, bool scan,
             const Kernels& kernels);

  // The smallest bound that a row with at least this float64 score can have, in the kernel's units.
  float threshold(int64_t query, double score) const;

  // The float64 score of one pair, larger is better; `scratch` holds one row of floats.
  double score(int64_t query, int64_t row, float* scratch) const;

  int64_t count;
  int tile_width;  // queries per tile: 1, 2, 4 or 8
  std::vector<Query> queries;
  std::vector<QueryTile> tiles;

 private:
  void prepare(int64_t index);
  void encode(int64_t index, const std::vector<double>& centred, double norm);

  const Matrix& gallery_;
  const Shadow& shadow_;
  const Metric metric_;
  const bool scan_;
  const Kernels& kernels_;
  std::vector<float> values_;
};

}  // namespace ftfast
