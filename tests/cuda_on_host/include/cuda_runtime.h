// The part of CUDA C++ that the kernels use, for a host compiler. Put this folder first on the
// include path, and a kernel that includes <cuda_runtime.h> compiles as C++ and runs through
// launch() of grid.h.
//
// What is not here does not compile: a name that the shim lacks is undeclared, and what it refuses
// on purpose says so.
#ifndef TESTS_CUDA_ON_HOST_INCLUDE_CUDA_RUNTIME_H_
#define TESTS_CUDA_ON_HOST_INCLUDE_CUDA_RUNTIME_H_

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../grid.h"

#if defined(__CUDACC__) || defined(__CUDA_ARCH__)
#error "tests/cuda_on_host is for a host compiler; nvcc has the real cuda_runtime.h"
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// One block's variables at a time are in memory, and grid.cpp finds, fills and exchanges them all
// as the program's thread-local storage.
#define __shared__ static thread_local

inline constexpr int warpSize = cuda_on_host::kWarpSize;

using dim3 = cuda_on_host::Index3;
inline const cuda_on_host::Index3& threadIdx = cuda_on_host::thread_index;
inline const cuda_on_host::Index3& blockIdx = cuda_on_host::block_index;
inline const cuda_on_host::Index3& blockDim = cuda_on_host::block_size;
inline const cuda_on_host::Index3& gridDim = cuda_on_host::grid_size;

// Vector types, as wide and as aligned as CUDA's.

// clang-format off
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(4) ushort2 { unsigned short x, y; };
struct alignas(8) ushort4 { unsigned short x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) longlong2 { long long x, y; };
struct alignas(16) ulonglong2 { unsigned long long x, y; };
// clang-format on

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline ushort4 make_ushort4(unsigned short x, unsigned short y, unsigned short z,
                            unsigned short w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Loads and stores with a cache hint. A GPU faults on a misaligned address; so does this. Plain
// dereferences are checked by the build with -fsanitize=alignment.

namespace cuda_on_host {

template <typename T>
void check_alignment(const T* address, const char* access, const Site& site) {
  static_assert(
      std::is_trivially_copyable_v<T> && std::has_single_bit(sizeof(T)) && sizeof(T) <= 16,
      "CUDA loads and stores 1, 2, 4, 8 or 16 bytes at a time");
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) {
    fault(site, "%s of %zu bytes at the misaligned address %p", access, sizeof(T),
          static_cast<const void*>(address));
  }
}

template <typename T>
T load(const T* address, const char* name, const Site& site) {
  check_alignment(address, name, site);
  return *address;
}

template <typename T>
void store(T* address, const T& value, const char* name, const Site& site) {
  check_alignment(address, name, site);
  *address = value;
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_LOAD(name)                                                              \
  template <typename T>                                                                      \
  inline T name(const T* address, cuda_on_host::Site site = cuda_on_host::Site::current()) { \
    return cuda_on_host::load(address, #name, site);                                         \
  }
#define CUDA_ON_HOST_STORE(name)                                              \
  template <typename T>                                                       \
  inline void name(T* address, std::type_identity_t<T> value,                 \
                   cuda_on_host::Site site = cuda_on_host::Site::current()) { \
    cuda_on_host::store(address, value, #name, site);                         \
  }
CUDA_ON_HOST_LOAD(__ldg)
CUDA_ON_HOST_LOAD(__ldca)
CUDA_ON_HOST_LOAD(__ldcg)
CUDA_ON_HOST_LOAD(__ldcs)
CUDA_ON_HOST_LOAD(__ldlu)
CUDA_ON_HOST_LOAD(__ldcv)
CUDA_ON_HOST_STORE(__stcs)
CUDA_ON_HOST_STORE(__stcg)
CUDA_ON_HOST_STORE(__stwb)
CUDA_ON_HOST_STORE(__stwt)
#undef CUDA_ON_HOST_LOAD
#undef CUDA_ON_HOST_STORE

// Rendez-vous.

inline void __syncthreads(cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::block_barrier(site);
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu,
                       cuda_on_host::Site site = cuda_on_host::Site::current()) {
  cuda_on_host::warp_rendezvous(cuda_on_host::WarpOperation::kBarrier, mask, 0, 0, site);
}

inline int __popc(unsigned bits) { return std::popcount(bits); }

inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }

inline unsigned __ballot_sync(unsigned mask, int predicate,
                              cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return static_cast<unsigned>(cuda_on_host::warp_rendezvous(cuda_on_host::WarpOperation::kVote,
                                                             mask, predicate != 0, 0, site));
}

inline int __any_sync(unsigned mask, int predicate,
                      cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}

inline int __all_sync(unsigned mask, int predicate,
                      cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

namespace cuda_on_host {

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, int width, const Site& site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles arithmetic types of 4 and 8 bytes");
  if (width <= 0 || width > warpSize || !std::has_single_bit(static_cast<unsigned>(width))) {
    fault(site, "shuffles with width %d, which is not a power of 2 up to 32", width);
  }
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = warp_rendezvous(WarpOperation::kShuffle, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_host

// A source outside the segment of `width` lanes means: the lane's own value.

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
                     cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const unsigned segment = cuda_on_host::lane_index() & ~(width - 1u);
  return cuda_on_host::shuffle(mask, value, segment | (source & (width - 1u)), width, site);
}

template <typename T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                          cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const unsigned lane = cuda_on_host::lane_index();
  const bool inside = (lane & (width - 1u)) + delta < static_cast<unsigned>(width);
  return cuda_on_host::shuffle(mask, value, inside ? lane + delta : lane, width, site);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize,
                        cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const unsigned lane = cuda_on_host::lane_index();
  const bool inside = (lane & (width - 1u)) >= delta;
  return cuda_on_host::shuffle(mask, value, inside ? lane - delta : lane, width, site);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize,
                         cuda_on_host::Site site = cuda_on_host::Site::current()) {
  const unsigned lane = cuda_on_host::lane_index();
  const unsigned source = lane ^ static_cast<unsigned>(lane_mask);
  // A later segment is out of reach; an earlier one is not.
  const bool inside = source < (lane & ~(width - 1u)) + width;
  return cuda_on_host::shuffle(mask, value, inside ? source : lane, width, site);
}

// Atomics and fences.

inline void __threadfence() { cuda_on_host::memory_fence(); }

inline unsigned atomicInc(unsigned* address, unsigned limit,
                          cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::atomic_operation(cuda_on_host::AtomicOperation::kIncrement, address, limit,
                                        site);
}

template <typename T>
inline T atomicAdd(T* address, std::type_identity_t<T> value,
                   cuda_on_host::Site site = cuda_on_host::Site::current()) {
  static_assert(!std::is_floating_point_v<T>,
                "no floating-point atomics: the sum would depend on the order of the threads");
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA adds integers of 4 and 8 bytes atomically");
  using Word = std::conditional_t<sizeof(T) == 4, unsigned, std::uint64_t>;
  return static_cast<T>(cuda_on_host::atomic_operation(cuda_on_host::AtomicOperation::kAdd,
                                                       reinterpret_cast<Word*>(address),
                                                       static_cast<Word>(value), site));
}

inline unsigned atomicExch(unsigned* address, unsigned value,
                           cuda_on_host::Site site = cuda_on_host::Site::current()) {
  return cuda_on_host::atomic_operation(cuda_on_host::AtomicOperation::kExchange, address, value,
                                        site);
}

#endif  // TESTS_CUDA_ON_HOST_INCLUDE_CUDA_RUNTIME_H_
