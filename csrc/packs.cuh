// Elementwise passes with accesses of 16 bytes where the pointers allow them.
#pragma once

#include <type_traits>

#include "launch.cuh"

namespace symtele {

// `width` neighbouring elements in one access.
template <class T, int width>
struct alignas(width * sizeof(T)) Pack {
  T at[width];
};

template <int width>
using Width = std::integral_constant<int, width>;

template <int width, class T>
__device__ Pack<T, width> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, width>*>(from);
}

template <int width, class T>
__device__ void store_pack(T* to, const Pack<T, width>& pack) {
  *reinterpret_cast<Pack<T, width>*>(to) = pack;
}

template <class... Pointers>
__host__ __device__ bool are_aligned(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) | ...) & 15) == 0;
}

// Call act(first element, Width<elements>) for all of `count` elements, shared out over the x dimension of the grid:
// in packs of 16 bytes if `aligned`, and one by one where they end.
template <class T, class Act>
__device__ void for_packs(int64_t count, bool aligned, Act act) {
  constexpr int width = 16 / sizeof(T);
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t packs = aligned ? count / width : 0;
  for (int64_t pack = thread; pack < packs; pack += threads) act(pack * width, Width<width>{});
  for (int64_t i = packs * width + thread; i < count; i += threads) act(i, Width<1>{});
}

// The same for elements that are only read: use(load(first element, Width<elements>)). A thread requests `at_once`
// packs before it waits for the first of them. In place of packs behind the end `use` gets what is all zeros.
template <class T, int at_once, class Load, class Use>
__device__ void read_packs(int64_t count, bool aligned, Load load, Use use) {
  constexpr int width = 16 / sizeof(T);
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  const int64_t packs = aligned ? count / width : 0;
  for (int64_t pack = thread; pack < packs; pack += at_once * threads) {
    decltype(load(pack, Width<width>{})) loaded[at_once] = {};
#pragma unroll
    for (int q = 0; q < at_once; ++q) {
      const int64_t own = pack + q * threads;
      if (own < packs) loaded[q] = load(own * width, Width<width>{});
    }
#pragma unroll
    for (int q = 0; q < at_once; ++q) use(loaded[q]);
  }
  for (int64_t i = packs * width + thread; i < count; i += threads) use(load(i, Width<1>{}));
}

// The launch of a pass over `count` elements: a pack a thread, up to several waves of blocks on the largest device.
constexpr int pack_threads = 256;

template <class T>
unsigned pack_blocks(int64_t count) {
  constexpr int64_t most = 1024;
  return static_cast<unsigned>(min(divide_up(count * int64_t{sizeof(T)}, 16 * pack_threads), most));
}

}  // namespace symtele
