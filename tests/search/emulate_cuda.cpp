// Runs the kernels of csrc/cuda/topk.cu on the CPU, one thread per CUDA thread, so that their logic is tested without a
// GPU. The calling convention is cuLaunchKernel's.
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

struct Index {
  int x, y;
};
static thread_local Index threadIdx, blockIdx;
static Index blockDim, gridDim;
static pthread_barrier_t barrier;

#define __global__
#define __device__
#define __shared__ static
static void __syncthreads() { pthread_barrier_wait(&barrier); }
static int atomicAdd(int* at, int value) { return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST); }
static double __dadd_rn(double a, double b) { return a + b; }
static double __dmul_rn(double a, double b) { return a * b; }
static float __uint_as_float(unsigned int bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
using std::fabs;
#define FTFAST_HOST_EMULATION
#include "../../csrc/cuda/topk.cu"

template <class... A, size_t... I>
static void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(args[I])...);
}

template <class... A>
static std::function<void()> bind(void (*kernel)(A...), void** args) {
  return [=] { call(kernel, args, std::index_sequence_for<A...>{}); };
}

extern "C" int emulate(const char* name, int gx, int gy, int threads, void** args) {
  const std::string wanted = name;
  std::function<void()> kernel;
  if (wanted == "ftfast_collect") kernel = bind(ftfast_collect, args);
  else if (wanted == "ftfast_rescore") kernel = bind(ftfast_rescore, args);
  else if (wanted == "ftfast_reduce") kernel = bind(ftfast_reduce, args);
  else return 1;
  blockDim = {threads, 1};
  gridDim = {gx, gy};
  pthread_barrier_init(&barrier, nullptr, threads);
  std::vector<std::thread> team;
  for (int t = 0; t < threads; ++t)
    team.emplace_back([&, t] {
      for (int y = 0; y < gy; ++y)
        for (int x = 0; x < gx; ++x) {
          threadIdx = {t, 0};
          blockIdx = {x, y};
          kernel();
          pthread_barrier_wait(&barrier);
        }
    });
  for (auto& thread : team) thread.join();
  pthread_barrier_destroy(&barrier);
  return 0;
}
