// Exact top-k on CUDA; the contract is csrc/topk.h. One source for nvcc (at install) and NVRTC (at first use): no
// include, no library call. Inner products of low precision come from the tensor cores (cuBLAS, called from Python, a
// tile at a time so that it stays in L2); these kernels do the rest:
//
//   ftfast_collect  reads a tile of approximate scores once, adds the error bound and appends the columns that may
//                   still belong to the k best to a list per query
//   ftfast_rescore  the float64 score of every listed pair, in one fixed order of addition
//   ftfast_reduce   keeps the k best of a list, sorted, by a bitonic sort of (score, index), and sets the threshold
//
// A list that would overflow is flagged instead; the caller then reduces it and repeats that tile. Nothing is dropped
// without proof, and the result depends on no order of execution: append order is arbitrary, the sort is total.

#if defined(__CUDACC_RTC__)
typedef long long int64_t;
typedef unsigned short uint16_t;
#elif !defined(FTFAST_HOST_EMULATION)
#include <cstdint>
#endif

extern "C" {

// approximate (Q, B) float32 row-major with leading dimension `stride`; reach (B), the largest error of a column for a
// query of norm one; norm (Q); offset (B), subtracted (l2: half the squared norm, rounded down); threshold (Q): a column
// is listed unless approximate + norm * reach - offset < threshold. A NaN is listed. `mask` (B) or (Q, mask_stride) or
// null; `exclude` (Q) or null. Grid: (blocks over columns, Q).
__global__ void ftfast_collect(const float* approximate, int64_t stride, const float* reach, const float* norm,
                               const float* offset, const float* threshold, const unsigned char* mask,
                               int64_t mask_stride, const int64_t* exclude, int columns, int64_t first, int capacity,
                               int* count, int* candidates) {
  const int query = blockIdx.y;
  const float limit = threshold[query], weight = norm[query];
  const float* row = approximate + static_cast<int64_t>(query) * stride;
  for (int column = blockIdx.x * blockDim.x + threadIdx.x; column < columns; column += gridDim.x * blockDim.x) {
    const float value = row[column], slack = weight * reach[column], below = offset[column];
    // The sum has three roundings; their size is bounded by the magnitudes of its terms.
    const float rounding = 4.8e-7f * (fabsf(value) + slack + fabsf(below)) + 1e-37f;
    if (value + slack - below + rounding < limit) continue;
    if (mask != nullptr && mask[query * mask_stride + column] == 0) continue;
    if (exclude != nullptr && exclude[query] == first + column) continue;
    const int slot = atomicAdd(count + query, 1);
    if (slot < capacity) candidates[static_cast<int64_t>(query) * capacity + slot] = column;
  }
}

__device__ float ftfast_load(const void* data, int64_t at, int type) {
  if (type == 0) return static_cast<const float*>(data)[at];
  if (type == 3) return static_cast<float>(static_cast<const signed char*>(data)[at]);
  const unsigned int half = static_cast<const uint16_t*>(data)[at];
  if (type == 2) return __uint_as_float(half << 16);
  const unsigned int exponent = (half >> 10) & 31u, mantissa = half & 1023u, sign = (half & 0x8000u) << 16;
  if (exponent == 31u) return __uint_as_float(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0u) return __uint_as_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float tiny = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  return sign != 0u ? -tiny : tiny;
}

// One block of 32 threads per listed pair. Every thread owns one lane of the sum, as on the CPU; lanes are then added by
// the same tree. metric: 0 ip, 1 cosine, 2 l2 (minus the squared distance).
__global__ void ftfast_rescore(const void* queries, int query_type, const void* gallery, int gallery_type, int width,
                               int metric, int64_t first, int capacity, const int* count, const int* candidates,
                               double* scores, int64_t* indices) {
  __shared__ double product[32], left[32], right[32];
  const int query = blockIdx.y, lane = threadIdx.x;
  const int listed = count[query] < capacity ? count[query] : capacity;
  for (int slot = blockIdx.x; slot < listed; slot += gridDim.x) {
    const int64_t at = static_cast<int64_t>(query) * capacity + slot;
    const int64_t row = first + candidates[at];
    double p = 0.0, l = 0.0, r = 0.0;
    for (int j = lane; j < width; j += 32) {
      const double q = ftfast_load(queries, static_cast<int64_t>(query) * width + j, query_type);
      const double x = ftfast_load(gallery, row * width + j, gallery_type);
      if (metric == 2) {
        const double difference = q - x;
        p = __dadd_rn(p, __dmul_rn(difference, difference));
      } else {
        p = __dadd_rn(p, __dmul_rn(q, x));
        l = __dadd_rn(l, __dmul_rn(q, q));
        r = __dadd_rn(r, __dmul_rn(x, x));
      }
    }
    product[lane] = p;
    left[lane] = l;
    right[lane] = r;
    __syncthreads();
    for (int half = 16; half >= 1; half /= 2) {
      if (lane < half) {
        product[lane] += product[lane + half];
        left[lane] += left[lane + half];
        right[lane] += right[lane + half];
      }
      __syncthreads();
    }
    if (lane == 0) {
      double score = metric == 2 ? -product[0] : product[0];
      if (metric == 1) {
        const double scale = sqrt(left[0]) * sqrt(right[0]);
        score = scale == 0.0 ? 0.0 : product[0] / scale;
      }
      scores[at] = score;
      indices[at] = score == score ? row : -1;
    }
    __syncthreads();
  }
}

__device__ bool ftfast_better(double a, int64_t i, double b, int64_t j) {
  if ((i < 0) != (j < 0)) return j < 0;
  return a > b || (a == b && i < j);
}

// Merges the kept k with the listed pairs of a query. One block per query; `work_scores` and `work_indices` hold
// (Q, size) with size a power of two >= k + capacity. Afterwards best_* (Q, k) are sorted, and kth (Q) is the k-th
// score, or minus infinity while there are fewer.
__global__ void ftfast_reduce(int k, int capacity, int size, const int* count, const double* scores,
                              const int64_t* indices, double* work_scores, int64_t* work_indices, double* best_scores,
                              int64_t* best_indices, double* kth) {
  const int query = blockIdx.x;
  const int listed = count[query] < capacity ? count[query] : capacity;
  double* s = work_scores + static_cast<int64_t>(query) * size;
  int64_t* x = work_indices + static_cast<int64_t>(query) * size;
  double* kept = best_scores + static_cast<int64_t>(query) * k;
  int64_t* kept_ids = best_indices + static_cast<int64_t>(query) * k;
  const double lowest = -1.0 / 0.0;
  for (int i = threadIdx.x; i < size; i += blockDim.x) {
    const bool old = i < k, fresh = !old && i - k < listed;
    const int64_t at = static_cast<int64_t>(query) * capacity + (i - k);
    s[i] = old ? kept[i] : fresh ? scores[at] : lowest;
    x[i] = old ? kept_ids[i] : fresh ? indices[at] : -1;
    if (x[i] < 0) s[i] = lowest;
  }
  __syncthreads();
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step >= 1; step /= 2) {
      for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int other = i ^ step;
        if (other > i) {
          const bool forward = (i & run) == 0;
          if (ftfast_better(s[other], x[other], s[i], x[i]) == forward) {
            const double score = s[i];
            const int64_t index = x[i];
            s[i] = s[other];
            x[i] = x[other];
            s[other] = score;
            x[other] = index;
          }
        }
      }
      __syncthreads();
    }
  }
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    kept[i] = s[i];
    kept_ids[i] = x[i];
  }
  if (threadIdx.x == 0) kth[query] = x[k - 1] < 0 ? lowest : s[k - 1];
}

}  // extern "C"
