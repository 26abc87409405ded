// Runs CUDA kernels on the CPU: the part of CUDA that csrc/*.cuh uses, for g++.
//
// The threads of a block are fibers, and the blocks of a grid run one after the other. A fiber gives way only at a
// barrier, so between two barriers the threads run in an order that the program chooses: ascending, descending or
// shuffled, and so do the blocks. Two threads that touch one element between two barriers, one of them writing, do it
// in both orders when a program runs ascending and descending: a missing barrier shows as two different results. The
// same holds for two blocks of one launch.
//
// What is reported, with the thread and the line, and ends the program with status 3: a barrier that some threads of
// the block (of the warp) do not reach, or reach at another line. A launch that a device would refuse (block, grid or
// shared memory too large) returns an error, as there. Shared memory is a heap buffer of exactly the launched size,
// filled with NaN before every block, so that AddressSanitizer sees overruns and reads before writes show.
//
// Not modelled: blocks that wait for each other, partial masks, static __shared__ variables, memory ordering.
#pragma once

#include <math.h>  // with the overloads for float in the global namespace, as in CUDA
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

// --- types -----------------------------------------------------------------------------------------------------------

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

struct cudaLaunchConfig_t {
  dim3 gridDim;
  dim3 blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  void* attrs;
  unsigned numAttrs;
};

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

// --- the order of threads and blocks ---------------------------------------------------------------------------------

enum class Order { ascending, descending, shuffled };

inline Order order = Order::ascending;
inline std::mt19937 generator;

// "ascending", "descending", or the seed of a shuffle that is drawn anew at every barrier.
inline void set_order(const std::string& name) {
  order = name == "ascending" ? Order::ascending : name == "descending" ? Order::descending : Order::shuffled;
  if (order == Order::shuffled) generator.seed(static_cast<unsigned>(std::stoul(name)));
}

inline std::vector<unsigned> draw_order(unsigned count) {
  std::vector<unsigned> indices(count);
  std::iota(indices.begin(), indices.end(), 0U);
  if (order == Order::descending) std::reverse(indices.begin(), indices.end());
  if (order == Order::shuffled) std::shuffle(indices.begin(), indices.end(), generator);
  return indices;
}

// --- fibers ----------------------------------------------------------------------------------------------------------

constexpr size_t stack_bytes = size_t{128} << 10;

enum class State { ready, at_block_barrier, at_warp_barrier, done };

#ifdef __x86_64__

// Where a fiber goes on: the top of its stack, which holds the registers that a call must keep and the next address.
using Context = void*;

// swapcontext makes a system call, and AddressSanitizer clears the marks of a whole stack with it: at every barrier, two
// thirds of the time of a program.
extern "C" void switch_context(Context* from, const Context* to);
asm(R"(
.pushsection .text.switch_context, "axG", @progbits, switch_context, comdat
.weak switch_context
.hidden switch_context
.type switch_context, @function
switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size switch_context, . - switch_context
.popsection
)");

// A context that begins with `entry`, which does not return.
inline void begin_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  const auto top = (reinterpret_cast<uintptr_t>(stack) + bytes) / 16 * 16;
  void** const frame = reinterpret_cast<void**>(top) - 8;  // six registers, the entry, and where it would return to
  std::fill(frame, frame + 8, nullptr);
  frame[6] = reinterpret_cast<void*>(entry);
  context = frame;
}

#else

using Context = ucontext_t;

inline void switch_context(Context* from, const Context* to) { swapcontext(from, to); }

inline void begin_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack;
  uint3 thread;
  State state = State::done;
  int line = 0;  // of the barrier
  unsigned char exchanged[8];
  void* fake_stack = nullptr;
};

inline Context scheduler;
inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
inline Fiber* running = nullptr;
inline std::function<void()> body;
inline std::unique_ptr<unsigned char[]> shared;

// AddressSanitizer must know which stack is in use. `leaving` keeps what belongs to the stack that is left.
inline void announce_switch([[maybe_unused]] void** leaving, [[maybe_unused]] const void* stack,
                            [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(leaving, stack, bytes);
#endif
}

inline void confirm_switch([[maybe_unused]] void* fake_stack, [[maybe_unused]] const void** left_stack,
                           [[maybe_unused]] size_t* left_bytes) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(fake_stack, left_stack, left_bytes);
#endif
}

inline const void* scheduler_stack = nullptr;
inline size_t scheduler_bytes = 0;

inline void resume(Fiber& fiber) {
  void* fake_stack = nullptr;
  running = &fiber;
  threadIdx = fiber.thread;
  announce_switch(&fake_stack, fiber.stack.get(), stack_bytes);
  switch_context(&scheduler, &fiber.context);
  confirm_switch(fake_stack, nullptr, nullptr);
}

inline void give_way(State state, int line) {
  Fiber& fiber = *running;
  fiber.state = state;
  fiber.line = line;
  announce_switch(&fiber.fake_stack, scheduler_stack, scheduler_bytes);
  switch_context(&fiber.context, &scheduler);
  confirm_switch(fiber.fake_stack, &scheduler_stack, &scheduler_bytes);
}

inline void live() {
  confirm_switch(nullptr, &scheduler_stack, &scheduler_bytes);
  for (;;) {
    body();
    give_way(State::done, 0);
  }
}

inline std::unique_ptr<Fiber> make_fiber() {
  auto fiber = std::make_unique<Fiber>();
  fiber->stack.reset(new char[stack_bytes]);
  begin_context(fiber->context, fiber->stack.get(), stack_bytes, live);
  return fiber;
}

// --- barriers --------------------------------------------------------------------------------------------------------

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", what);
  std::fflush(nullptr);
  std::_Exit(3);
}

[[noreturn]] inline void fail_barrier(const Fiber& waiting, const Fiber& other) {
  const std::string what = other.state == State::done ? "has returned" : "waits at line " + std::to_string(other.line);
  std::fprintf(stderr,
               "block (%u, %u, %u): thread (%u, %u, %u) waits at a barrier in line %d, thread (%u, %u, %u) %s\n",
               blockIdx.x, blockIdx.y, blockIdx.z, waiting.thread.x, waiting.thread.y, waiting.thread.z, waiting.line,
               other.thread.x, other.thread.y, other.thread.z, what.c_str());
  fail("a barrier that not all threads reach");
}

inline bool together(const Fiber& a, const Fiber& b) { return a.state == b.state && a.line == b.line; }

// Let fibers [begin, end) go on if all wait at one barrier of this kind.
inline bool release(State barrier, unsigned begin, unsigned end) {
  for (unsigned i = begin; i < end; ++i) {
    if (fibers[i]->state != barrier || !together(*fibers[i], *fibers[begin])) return false;
  }
  for (unsigned i = begin; i < end; ++i) fibers[i]->state = State::ready;
  return true;
}

inline bool release_any(unsigned threads) {
  bool released = false;
  for (unsigned begin = 0; begin < threads; begin += warpSize) {
    released |= release(State::at_warp_barrier, begin, std::min(begin + warpSize, threads));
  }
  return released || release(State::at_block_barrier, 0, threads);
}

inline void check_all_done(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    if (fibers[i]->state == State::done) continue;
    const bool in_warp = fibers[i]->state == State::at_warp_barrier;
    const unsigned begin = in_warp ? i / warpSize * warpSize : 0;
    const unsigned end = in_warp ? std::min(begin + warpSize, threads) : threads;
    for (unsigned j = begin; j < end; ++j) {
      if (!together(*fibers[i], *fibers[j])) fail_barrier(*fibers[i], *fibers[j]);
    }
  }
}

inline void run_block(unsigned threads) {
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i]->state = State::ready;
    fibers[i]->thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  }
  do {
    for (const unsigned i : draw_order(threads)) {
      if (fibers[i]->state == State::ready) resume(*fibers[i]);
    }
  } while (release_any(threads));
  check_all_done(threads);
}

// --- launches --------------------------------------------------------------------------------------------------------

constexpr size_t default_shared_bytes = size_t{48} << 10;
constexpr size_t largest_shared_bytes = size_t{163} << 10;  // of compute capability 8.0; 9.0 has 227 KB

inline std::map<const void*, size_t> shared_limits;

inline bool can_launch(const cudaLaunchConfig_t& config, const void* kernel) {
  const dim3 block = config.blockDim, grid = config.gridDim;
  const auto found = shared_limits.find(kernel);
  const size_t shared_limit = found == shared_limits.end() ? default_shared_bytes : found->second;
  const bool block_fits = uint64_t{block.x} * block.y * block.z <= 1024 && block.z <= 64;
  const bool grid_fits = grid.x < (1U << 31) && grid.y < (1U << 16) && grid.z < (1U << 16);
  const bool nothing_empty = block.x && block.y && block.z && grid.x && grid.y && grid.z;
  return block_fits && grid_fits && nothing_empty && config.dynamicSmemBytes <= shared_limit;
}

inline void run_grid(const cudaLaunchConfig_t& config, std::function<void()> kernel) {
  body = std::move(kernel);
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  while (fibers.size() < threads) fibers.push_back(make_fiber());
  shared.reset(new unsigned char[config.dynamicSmemBytes]);
  for (const unsigned i : draw_order(gridDim.x * gridDim.y * gridDim.z)) {
    blockIdx = {i % gridDim.x, i / gridDim.x % gridDim.y, i / gridDim.x / gridDim.y};
    std::memset(shared.get(), 0xff, config.dynamicSmemBytes);
    run_block(threads);
  }
  shared.reset();
}

inline cudaError_t last_error = cudaSuccess;

// The value that lane `source` of this warp gives.
template <class T>
T exchange(T value, int source, int line) {
  static_assert(sizeof(T) <= sizeof(Fiber::exchanged));
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  std::memcpy(running->exchanged, &value, sizeof(T));
  give_way(State::at_warp_barrier, line);
  std::memcpy(&value, fibers[thread / warpSize * warpSize + source]->exchanged, sizeof(T));
  give_way(State::at_warp_barrier, line);
  return value;
}

inline int lane() { return (threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % warpSize; }

inline void check_mask(unsigned mask) {
  if (mask != 0xffffffffU) fail("only the full warp mask is modelled");
}

}  // namespace cuda_on_cpu

// --- CUDA's own names ------------------------------------------------------------------------------------------------

inline void __syncthreads(int line = __builtin_LINE()) {
  cuda_on_cpu::give_way(cuda_on_cpu::State::at_block_barrier, line);
}

inline void __syncwarp(unsigned mask = 0xffffffffU, int line = __builtin_LINE()) {
  cuda_on_cpu::check_mask(mask);
  cuda_on_cpu::give_way(cuda_on_cpu::State::at_warp_barrier, line);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int line = __builtin_LINE()) {
  cuda_on_cpu::check_mask(mask);
  return cuda_on_cpu::exchange(value, source % warpSize, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  cuda_on_cpu::check_mask(mask);
  return cuda_on_cpu::exchange(value, cuda_on_cpu::lane() ^ lanes, line);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int line = __builtin_LINE()) {
  cuda_on_cpu::check_mask(mask);
  const int source = cuda_on_cpu::lane() + static_cast<int>(distance);
  return cuda_on_cpu::exchange(value, source < warpSize ? source : cuda_on_cpu::lane(), line);
}

inline void __threadfence() {}

template <class T>
T __ldg(const T* from) {
  return *from;
}

using std::max;
using std::min;

template <class... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  if (bytes < 0 || static_cast<size_t>(bytes) > cuda_on_cpu::largest_shared_bytes) {
    return cuda_on_cpu::last_error = cudaErrorInvalidValue;
  }
  cuda_on_cpu::shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  if (!cuda_on_cpu::can_launch(*config, reinterpret_cast<const void*>(kernel))) {
    return cuda_on_cpu::last_error = cudaErrorInvalidConfiguration;
  }
  cuda_on_cpu::run_grid(*config, [&] { kernel(arguments...); });
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }

inline cudaError_t cudaMemsetAsync(void* target, int byte, size_t bytes, cudaStream_t) {
  std::memset(target, byte, bytes);
  return cudaSuccess;
}
