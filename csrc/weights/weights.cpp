// Python module ftfast._W: passes over weights on the CPU, one read and one write of memory each.
//
// Torch-free: tensors arrive as rows of addresses in an int64 table, so the module needs no PyTorch to build and does
// not break when PyTorch changes its ABI. The caller (ftfast/kernels/weight_cpu.py) guarantees that each row's tensors
// are float32 (importances may be bfloat16), dense, of one size, and laid out alike.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace py = pybind11;

namespace {

struct Row {
  float* theta;
  float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const float* start;
  const void* precision;
  int64_t numel;
  bool precision_is_bf16;
  double coefficient;
};

struct Hyper {
  float lr, beta1, beta2, one_minus_beta1, one_minus_beta2, eps, keep, rate, root;
  int mode;
};

struct Strided {  // (samples, length, columns) with unit stride along columns
  const void* data;
  int64_t sample_stride, step_stride, length;
  bool is_bf16;
};

struct FisherJob {
  float* fisher;
  int64_t fisher_stride, rows, columns, samples;
  Strided inputs, grads;
  float weight;
};

struct Fp32 {
  using type = float;
  static inline float load(float value) { return value; }
};
struct Bf16 {
  using type = uint16_t;
  static inline float load(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
};
// Where a row's importances are read from: a pointer the loops keep in a register.
struct PrecisionOne {
  explicit PrecisionOne(const void*) {}
  inline float operator[](int64_t) const { return 1.0f; }
  inline PrecisionOne operator+(int64_t) const { return *this; }
};
struct PrecisionFp32 {
  const float* values;
  explicit PrecisionFp32(const void* from) : values(static_cast<const float*>(from)) {}
  inline float operator[](int64_t i) const { return values[i]; }
  inline PrecisionFp32 operator+(int64_t i) const { return PrecisionFp32(values + i); }
};
struct PrecisionBf16 {
  const uint16_t* values;
  explicit PrecisionBf16(const void* from) : values(static_cast<const uint16_t*>(from)) {}
  inline float operator[](int64_t i) const { return Bf16::load(values[i]); }
  inline PrecisionBf16 operator+(int64_t i) const { return PrecisionBf16(values + i); }
};

// One instruction set's versions of the loops.
struct Loops {
  double (*adamw)(const Row&, const Hyper&, int64_t, int64_t);
  double (*penalty)(const Row&, int64_t, int64_t);
  void (*fisher)(float*, const float*, float, float, int64_t, int64_t);
  double (*square_sum)(const float*, int64_t, int64_t);
  void (*fisher_columns)(const FisherJob&, const float*, int64_t, int64_t, int64_t, int64_t, float*);
  void (*pack_grads)(const FisherJob&, int64_t, int64_t, float*);
  int rows;
  int64_t columns;
};

}  // namespace

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FTFAST_X86 1
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,prefer-vector-width=512")
namespace {
namespace avx512 {
#define VEC 16
#define KEEP_IN_REGISTERS(x, y) __asm__("" : "+v"(x), "+v"(y))
#define ROWS 14
#include "loops.inc"
#undef VEC
#undef KEEP_IN_REGISTERS
#undef ROWS
}  // namespace avx512
}  // namespace
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace {
namespace avx2 {
#define VEC 8
#define KEEP_IN_REGISTERS(x, y) __asm__("" : "+x"(x), "+x"(y))
#define ROWS 6
#include "loops.inc"
#undef VEC
#undef KEEP_IN_REGISTERS
#undef ROWS
}  // namespace avx2
}  // namespace
#pragma GCC pop_options
#endif

namespace {
namespace portable {
#define VEC 4
#define KEEP_IN_REGISTERS(x, y)
#define ROWS 4
#include "loops.inc"
#undef VEC
#undef KEEP_IN_REGISTERS
#undef ROWS
}  // namespace portable

const Loops* loops_named(const std::string& name) {
#ifdef FTFAST_X86
  if (name == "avx512") return &avx512::kLoops;
  if (name == "avx2") return &avx2::kLoops;
#endif
  if (name == "portable") return &portable::kLoops;
  return nullptr;
}

std::vector<std::string> available() {
  std::vector<std::string> names;
#ifdef FTFAST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    names.push_back("avx512");
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) names.push_back("avx2");
#endif
  names.push_back("portable");
  return names;
}

const Loops& choose(const std::string& wanted) {
  for (const auto& name : available())
    if (wanted.empty() || wanted == name) return *loops_named(name);
  throw std::invalid_argument("instruction set '" + wanted + "' is not available on this processor");
}

constexpr int64_t kChunk = 1 << 16;  // elements per work item: small enough to balance two cores, large enough to stream

struct Work {
  int64_t row, begin, end;
};

std::vector<Work> divide(const std::vector<Row>& rows) {
  std::vector<Work> work;
  for (int64_t r = 0; r < static_cast<int64_t>(rows.size()); ++r)
    for (int64_t begin = 0; begin < rows[r].numel; begin += kChunk)
      work.push_back({r, begin, begin + kChunk < rows[r].numel ? begin + kChunk : rows[r].numel});
  return work;
}

// Threads worth waking: below a few chunks of work the wake-up costs more than it saves.
int useful(int threads, int64_t chunks) { return chunks < 4 ? 1 : threads; }

using Table = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Numbers = py::array_t<double, py::array::c_style | py::array::forcecast>;

// Columns: theta, grad, exp_avg, exp_avg_sq, start, precision (addresses, 0 for none), elements, precision is bf16.
std::vector<Row> rows_of(const Table& table, const Numbers& coefficients) {
  if (table.ndim() != 2 || table.shape(1) != 8 || coefficients.size() != table.shape(0))
    throw std::invalid_argument("expected an (n, 8) table and n coefficients");
  std::vector<Row> rows;
  const auto cells = table.unchecked<2>();
  const auto address = [&](int64_t r, int c) { return reinterpret_cast<float*>(static_cast<intptr_t>(cells(r, c))); };
  for (int64_t r = 0; r < table.shape(0); ++r)
    rows.push_back({address(r, 0), address(r, 1), address(r, 2), address(r, 3), address(r, 4), address(r, 5),
                    cells(r, 6), cells(r, 7) != 0, coefficients.data()[r]});
  return rows;
}

// Runs `body(work item) -> double` over all items and adds the results in item order, whatever thread made them.
template <class Body>
double reduce(const std::vector<Row>& rows, int threads, Body body) {
  const std::vector<Work> work = divide(rows);
  std::vector<double> parts(work.size(), 0.0);
  const int64_t count = static_cast<int64_t>(work.size());
  int64_t elements = 0;
  for (const Row& row : rows) elements += row.numel;
  const int team = useful(threads, elements / kChunk);
#pragma omp parallel for schedule(dynamic, 4) num_threads(team)
  for (int64_t w = 0; w < count; ++w) parts[w] = body(work[w]);
  double total = 0.0;
  for (double part : parts) total += part;
  return total;
}

double adamw(const Table& table, const Numbers& coefficients, const Numbers& numbers, int mode, int threads,
             const std::string& isa) {
  if (numbers.size() != 6) throw std::invalid_argument("expected lr, beta1, beta2, eps, weight_decay, step");
  const std::vector<Row> rows = rows_of(table, coefficients);
  const double* n = numbers.data();
  const double lr = n[0], beta1 = n[1], beta2 = n[2], step = n[5];
  const double correction1 = 1.0 - std::pow(beta1, step), correction2 = 1.0 - std::pow(beta2, step);
  const auto f = [](double value) { return static_cast<float>(value); };
  const Hyper hyper = {f(lr),   f(beta1),         f(beta2),          f(1.0 - beta1),
                       f(1.0 - beta2), f(n[3]), f(1.0 - lr * n[4]), f(lr / correction1),
                       f(1.0 / std::sqrt(correction2)), mode};
  const Loops& loops = choose(isa);
  py::gil_scoped_release release;
  return reduce(rows, threads, [&](const Work& w) { return loops.adamw(rows[w.row], hyper, w.begin, w.end); });
}

double penalty(const Table& table, const Numbers& coefficients, int threads, const std::string& isa) {
  const std::vector<Row> rows = rows_of(table, coefficients);
  const Loops& loops = choose(isa);
  py::gil_scoped_release release;
  return reduce(rows, threads, [&](const Work& w) { return loops.penalty(rows[w.row], w.begin, w.end); });
}

// Uses theta as F and grad as g. `normalize` divides each row's squares by their mean first.
void accumulate(const Table& table, double decay, double weight, bool normalize, int threads, const std::string& isa) {
  const std::vector<Row> rows = rows_of(table, Numbers(table.shape(0)));
  const Loops& loops = choose(isa);
  py::gil_scoped_release release;
  const std::vector<Work> work = divide(rows);
  const int64_t count = static_cast<int64_t>(work.size());
  int64_t elements = 0;
  for (const Row& row : rows) elements += row.numel;
  threads = useful(threads, elements / kChunk);
  std::vector<double> scales(rows.size(), weight), parts(work.size(), 0.0);
  if (normalize) {
    std::vector<double> sums(rows.size(), 0.0);
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
    for (int64_t w = 0; w < count; ++w)
      parts[w] = loops.square_sum(rows[work[w].row].grad, work[w].begin, work[w].end);
    for (int64_t w = 0; w < count; ++w) sums[work[w].row] += parts[w];
    for (size_t r = 0; r < rows.size(); ++r) scales[r] = sums[r] > 0.0 ? weight * rows[r].numel / sums[r] : 0.0;
  }
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads)
  for (int64_t w = 0; w < count; ++w) {
    const Row& row = rows[work[w].row];
    loops.fisher(row.theta, row.grad, static_cast<float>(decay), static_cast<float>(scales[work[w].row]),
                 work[w].begin, work[w].end);
  }
}

// sizes: rows, columns, samples, length, stride of F; then sample and step strides of inputs and of grads; then whether
// inputs and grads are bf16.
void per_sample_fisher(intptr_t fisher, intptr_t inputs, intptr_t grads, const Table& sizes, double weight, int threads,
                       const std::string& isa) {
  if (sizes.size() != 11) throw std::invalid_argument("expected 11 sizes");
  const int64_t* s = sizes.data();
  const FisherJob job = {reinterpret_cast<float*>(fisher), s[4], s[0], s[1], s[2],
                         {reinterpret_cast<const void*>(inputs), s[5], s[6], s[3], s[9] != 0},
                         {reinterpret_cast<const void*>(grads), s[7], s[8], s[3], s[10] != 0},
                         static_cast<float>(weight)};
  if (job.rows == 0 || job.columns == 0 || job.samples == 0 || job.inputs.length == 0) return;
  const Loops& loops = choose(isa);
  py::gil_scoped_release release;
  // Samples at once: their packed inputs (64 columns) should stay in a 1 MB second-level cache.
  const int64_t length = job.inputs.length, block = 2 * loops.columns;
  if (job.rows * job.columns * job.samples * length < (1 << 22)) threads = 1;
  int64_t together = 2048 / length;
  together = together < 1 ? 1 : (together > job.samples ? job.samples : together);
  const int64_t tiles = (job.rows + loops.rows - 1) / loops.rows, blocks = (job.columns + block - 1) / block;
  const std::unique_ptr<float[]> packed(new float[together * tiles * length * loops.rows]);
  for (int64_t n0 = 0; n0 < job.samples; n0 += together) {
    const int64_t n1 = n0 + together < job.samples ? n0 + together : job.samples;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(dynamic, 1)
      for (int64_t n = n0; n < n1; ++n) loops.pack_grads(job, n0, n, packed.get());
      const std::unique_ptr<float[]> panels(new float[together * length * block]);
#pragma omp for schedule(dynamic, 1)
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t end = (b + 1) * block < job.columns ? (b + 1) * block : job.columns;
        loops.fisher_columns(job, packed.get(), n0, n1, b * block, end, panels.get());
      }
    }
  }
}

}  // namespace

PYBIND11_MODULE(_W, m) {
  m.doc() = "Passes over weights on the CPU: anchored AdamW, anchor penalty, Fisher accumulation.";
  m.def("instruction_sets", &available, "Instruction sets usable here, best first.");
  m.def("adamw", &adamw, py::arg("table"), py::arg("coefficients"), py::arg("numbers"), py::arg("mode"),
        py::arg("threads"), py::arg("isa") = "");
  m.def("penalty", &penalty, py::arg("table"), py::arg("coefficients"), py::arg("threads"), py::arg("isa") = "");
  m.def("accumulate", &accumulate, py::arg("table"), py::arg("decay"), py::arg("weight"), py::arg("normalize"),
        py::arg("threads"), py::arg("isa") = "");
  m.def("per_sample_fisher", &per_sample_fisher, py::arg("fisher"), py::arg("inputs"), py::arg("grads"),
        py::arg("sizes"), py::arg("weight"), py::arg("threads"), py::arg("isa") = "");
}
