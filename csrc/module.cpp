// Python binding: raw pointers and shapes in, results written into arrays the caller owns. Knows no torch.
#include <pybind11/pybind11.h>

#ifdef _OPENMP
#include <omp.h>
#endif

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "kernels.h"

namespace py = pybind11;

namespace ftfast {
namespace {

const Kernels& find_kernels(const std::string& name) {
  const Kernels* kernels = kernels_by_name(name.c_str());
  if (kernels == nullptr) throw std::invalid_argument("this processor cannot run the instruction set '" + name + "'");
  return *kernels;
}

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Matrix matrix(std::uintptr_t data, int64_t rows, int64_t width, int type) {
  require(data != 0 && rows > 0 && width > 0 && type >= 0 && type <= 3, "a matrix needs data, rows, a width and a type");
  return {reinterpret_cast<const void*>(data), rows, width, static_cast<Type>(type)};
}

void check_mode(Mode mode, int64_t width, const Kernels& kernels) {
  const int index = static_cast<int>(mode);
  require(index >= 0 && index <= 2, "the mode must be fp32 (0), bf16 (1) or int8 (2)");
  require(kernels.tile[index] != nullptr, "this instruction set has no products of that mode");
  require(mode != Mode::int8 || width <= 32768, "int8 sums overflow beyond a width of 32768");
}

// Called between blocks by the thread that entered from Python; signal handlers run in the main thread only.
bool signal_pending() {
  py::gil_scoped_acquire held;
  return PyErr_CheckSignals() != 0;
}

struct Request {
  Matrix queries, gallery;
  const Shadow* shadow;
  Options options;
};

Request parse(const py::dict& settings, const Shadow* shadow, const Kernels& kernels) {
  const auto integer = [&](const char* key) { return settings[key].cast<int64_t>(); };
  const auto pointer = [&](const char* key) { return settings[key].cast<std::uintptr_t>(); };
  Request r;
  r.queries = matrix(pointer("queries"), integer("query_rows"), integer("width"), static_cast<int>(integer("query_type")));
  r.gallery =
      matrix(pointer("gallery"), integer("gallery_rows"), integer("width"), static_cast<int>(integer("gallery_type")));
  r.shadow = shadow;
  r.options.k = integer("k");
  r.options.metric = static_cast<Metric>(integer("metric"));
  r.options.mode = shadow != nullptr ? shadow->mode : static_cast<Mode>(integer("mode"));
  r.options.threads = static_cast<int>(integer("threads"));
  r.options.mask = reinterpret_cast<const uint8_t*>(pointer("mask"));
  r.options.mask_per_query = integer("mask_per_query") != 0;
  r.options.exclude = reinterpret_cast<const int64_t*>(pointer("exclude"));
  r.options.interrupted = signal_pending;
  require(integer("metric") >= 0 && integer("metric") <= 2, "the metric must be ip (0), cosine (1) or l2 (2)");
  require(r.options.threads >= 1 && r.options.threads <= 4096, "threads must be between 1 and 4096");
  check_mode(r.options.mode, r.gallery.width, kernels);
  require(shadow == nullptr || (shadow->rows == r.gallery.rows && shadow->width == r.gallery.width &&
                                shadow->metric == r.options.metric),
          "the shadow was built from another gallery");
  return r;
}

std::vector<std::vector<Hit>> run(const Request& request, const Kernels& kernels, Counters& counters) {
  bool stopped = false;
  std::vector<std::vector<Hit>> hits;
  {
    py::gil_scoped_release released;
    try {
      hits = search(request.queries, request.gallery, request.shadow, request.options, kernels, counters);
    } catch (const Stopped&) {
      stopped = true;
    }
  }
  if (stopped) throw py::error_already_set();
  return hits;
}

py::tuple counts(const Counters& counters) {
  return py::make_tuple(counters.scanned, counters.candidates, counters.rescored);
}

py::tuple topk(const py::dict& settings, const Shadow* shadow, std::uintptr_t scores, std::uintptr_t indices,
               const std::string& isa) {
  const Kernels& kernels = find_kernels(isa);
  const Request request = parse(settings, shadow, kernels);
  const int64_t k = request.options.k;
  require(k >= 1 && k <= request.gallery.rows, "k must be between 1 and the number of gallery rows");
  Counters counters;
  const auto hits = run(request, kernels, counters);
  double* score = reinterpret_cast<double*>(scores);
  int64_t* index = reinterpret_cast<int64_t*>(indices);
  const double sign = request.options.metric == Metric::l2 ? -1.0 : 1.0;
  for (const auto& list : hits)
    for (int64_t j = 0; j < k; ++j) {
      const bool present = j < static_cast<int64_t>(list.size());
      const double value = present ? list[j].score : -std::numeric_limits<double>::infinity();
      *score++ = sign * value;
      *index++ = present ? list[j].id : -1;
    }
  return counts(counters);
}

// Returns the three buffers of a range search as bytes: per-query counts (int64), ids (int64), scores (float32).
py::tuple range_search(const py::dict& settings, const Shadow* shadow, float radius, const std::string& isa) {
  const Kernels& kernels = find_kernels(isa);
  Request request = parse(settings, shadow, kernels);
  request.options.range = true;
  request.options.radius = radius;
  Counters counters;
  const auto hits = run(request, kernels, counters);
  std::vector<int64_t> sizes, ids;
  std::vector<float> scores;
  for (const auto& list : hits) {
    sizes.push_back(static_cast<int64_t>(list.size()));
    for (const Hit& hit : list) {
      ids.push_back(hit.id);
      scores.push_back(static_cast<float>(request.options.metric == Metric::l2 ? -hit.score : hit.score));
    }
  }
  const auto bytes = [](const void* data, size_t size) { return py::bytes(static_cast<const char*>(data), size); };
  return py::make_tuple(bytes(sizes.data(), sizes.size() * 8), bytes(ids.data(), ids.size() * 8),
                        bytes(scores.data(), scores.size() * 4), counts(counters));
}

void append(Shadow& shadow, std::uintptr_t data, int64_t rows, int type, int threads, const std::string& isa) {
  const Kernels& kernels = find_kernels(isa);
  check_mode(shadow.mode, shadow.width, kernels);
  const Matrix added = matrix(data, rows, shadow.width, type);
  py::gil_scoped_release released;
  shadow.append(added, kernels, threads < 1 ? 1 : threads);
}

py::dict describe() {
  const Kernels& kernels = best_kernels();
  py::dict result;
  result["instructions"] = kernels.name;
  result["int8"] = kernels.has_int8;
  result["bf16"] = kernels.has_bf16;
#ifdef _OPENMP
  result["openmp"] = true;
#else
  result["openmp"] = false;
#endif
  py::list sets;
  for (const char* name : {"portable", "avx2", "avx512"})
    if (kernels_by_name(name) != nullptr) sets.append(name);
  result["instruction_sets"] = sets;
  return result;
}

}  // namespace
}  // namespace ftfast

PYBIND11_MODULE(_C, m) {
  using namespace ftfast;
  m.doc() = "Exact top-k search on the CPU; see csrc/topk.h for the contract.";
  py::class_<Shadow>(m, "Shadow")
      .def(py::init([](int metric, int mode, int64_t width) {
             require(metric >= 0 && metric <= 2 && mode >= 0 && mode <= 2 && width > 0, "bad metric, mode or width");
             return std::make_unique<Shadow>(static_cast<Metric>(metric), static_cast<Mode>(mode), width);
           }),
           py::arg("metric"), py::arg("mode"), py::arg("width"))
      .def("append", &append, py::arg("data"), py::arg("rows"), py::arg("type"), py::arg("threads"), py::arg("isa"))
      .def_property_readonly("mode", [](const Shadow& shadow) { return static_cast<int>(shadow.mode); })
      .def_property_readonly("nbytes", [](const Shadow& s) { return s.chunks.size() * kChunk / kPanel * (s.panel_bytes() + 256); })
      .def_readonly("rows", &Shadow::rows);
  m.def("topk", &topk, py::arg("settings"), py::arg("shadow").none(true), py::arg("scores"), py::arg("indices"),
        py::arg("isa"));
  m.def("range_search", &range_search, py::arg("settings"), py::arg("shadow").none(true), py::arg("radius"),
        py::arg("isa"));
  m.def("describe", &describe);
}
