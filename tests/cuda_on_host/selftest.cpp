// Kernels that show what the harness accepts and what it reports: `selftest SCENARIO ORDER SEED
// BLOCKS`. A right scenario prints its results, the same in every order; a wrong one must not get
// that far.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "race_check.h"

namespace {

using cuda_on_host::race_check::watch_global;

constexpr unsigned kThreads = 96;
constexpr unsigned kBlocks = 7;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

struct SumParameters {
  const float* input;  // [kBlocks * kThreads]
  double* partials;    // [kBlocks]
  unsigned* ticket;    // [1]
  double* sum;         // [1]
};

enum class Mistake {
  kNone,
  kNoBarrierBeforeWarpZeroReads,
  kNoBarrierAfterTicket,
  kNoFenceBeforeTicket,
  kNoFenceAfterTicket,
  kTicketNotAtomic,
  kTicketLost,
  kTicketResetByHand,
};

// The sum of a grid in one launch, in fixed order, as the loss kernel takes it.
template <Mistake kMistake>
__global__ void __launch_bounds__(kThreads) sum_kernel(SumParameters parameters) {
  __shared__ double of_warp[kThreads / 32];
  __shared__ bool is_last;
  double value = parameters.input[blockIdx.x * kThreads + threadIdx.x];
  for (int delta = warpSize / 2; delta > 0; delta /= 2) {
    value += __shfl_down_sync(kAllLanes, value, delta);
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  if constexpr (kMistake != Mistake::kNoBarrierBeforeWarpZeroReads) __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (unsigned warp = 0; warp < kThreads / 32; ++warp) sum += of_warp[warp];
    parameters.partials[blockIdx.x] = sum;
    if constexpr (kMistake != Mistake::kNoFenceBeforeTicket) __threadfence();
    if constexpr (kMistake == Mistake::kTicketNotAtomic) {
      const unsigned old = *parameters.ticket;
      *parameters.ticket = old + 1 < gridDim.x ? old + 1 : 0;
      is_last = old == gridDim.x - 1;
    } else if constexpr (kMistake == Mistake::kTicketLost) {
      is_last = blockIdx.x != 3 && atomicInc(parameters.ticket, gridDim.x - 1) == gridDim.x - 1;
    } else if constexpr (kMistake == Mistake::kTicketResetByHand) {
      is_last = atomicAdd(parameters.ticket, 1u) == gridDim.x - 1;
      if (is_last) *parameters.ticket = 0;
    } else {
      is_last = atomicInc(parameters.ticket, gridDim.x - 1) == gridDim.x - 1;
    }
  }
  if constexpr (kMistake != Mistake::kNoBarrierAfterTicket) __syncthreads();
  if (!is_last) return;
  if constexpr (kMistake != Mistake::kNoFenceAfterTicket) __threadfence();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (unsigned block = 0; block < gridDim.x; ++block) sum += __ldcg(parameters.partials + block);
    *parameters.sum = sum;
  }
}

template <Mistake kMistake>
void sum(const cuda_on_host::Schedule& schedule) {
  std::vector<float> input(kBlocks * kThreads);
  double expected = 0;
  for (std::size_t i = 0; i < input.size(); ++i) expected += input[i] = static_cast<float>(i % 101);
  std::vector<double> partials(kBlocks, -1);
  unsigned ticket = 0;
  watch_global(input.data(), input.size() * sizeof(float), "input");
  watch_global(partials.data(), partials.size() * sizeof(double), "partials");
  double result = -1;
  watch_global(&result, sizeof(result), "sum");
  watch_global(&ticket, sizeof(ticket), "ticket");
  for (int repetition = 0; repetition < 2; ++repetition) {  // the ticket resets itself
    result = -1;
    const SumParameters parameters{input.data(), partials.data(), &ticket, &result};
    cuda_on_host::launch({kBlocks, 1, 1}, {kThreads, 1, 1}, schedule,
                         [&] { sum_kernel<kMistake>(parameters); });
    std::printf("%s", result == expected && ticket == 0 ? "sum right\n" : "sum WRONG\n");
  }
}

// Every operation of a warp, with each lane's answer worked out by other means.
__global__ void warp_kernel(unsigned* wrong) {  // [gridDim.x * blockDim.x]
  const int lane = threadIdx.x % 32;
  const int value = 1000 + lane;
  unsigned errors = 0;
  errors += __shfl_sync(kAllLanes, value, 5) != 1005;
  errors += __shfl_sync(kAllLanes, value, 3, 8) != 1000 + lane / 8 * 8 + 3;
  errors += __shfl_down_sync(kAllLanes, value, 4) != (lane < 28 ? value + 4 : value);
  errors += __shfl_down_sync(kAllLanes, value, 1, 4) != (lane % 4 < 3 ? value + 1 : value);
  errors += __shfl_up_sync(kAllLanes, value, 2) != (lane >= 2 ? value - 2 : value);
  errors += __shfl_xor_sync(kAllLanes, value, 16) != 1000 + (lane ^ 16);
  errors += __shfl_xor_sync(kAllLanes, 0.5 + lane, 1) != 0.5 + (lane ^ 1);
  errors += __shfl_down_sync(kAllLanes, (1LL << 40) + lane, 1) !=
            (1LL << 40) + (lane < 31 ? lane + 1 : lane);
  errors += __ballot_sync(kAllLanes, lane % 3 == 0) != 0x49249249u;
  errors += __any_sync(kAllLanes, lane == 31) != 1;
  errors += __any_sync(kAllLanes, 0) != 0;
  errors += __all_sync(kAllLanes, 1) != 1;
  errors += __all_sync(kAllLanes, lane != 7) != 0;
  // Two halves of a warp on different ways, each with its own mask.
  if (lane < 16) {
    errors += __ballot_sync(0x0000FFFFu, 1) != 0x0000FFFFu;
    __syncwarp(0x0000FFFFu);
  } else {
    errors += __shfl_xor_sync(0xFFFF0000u, value, 1) != 1000 + (lane ^ 1);
    errors += __ballot_sync(0xFFFF0000u, lane % 2) != 0xAAAA0000u;
  }
  wrong[blockIdx.x * blockDim.x + threadIdx.x] = errors;
}

void warp(const cuda_on_host::Schedule& schedule) {
  std::vector<unsigned> wrong(kBlocks * kThreads, 1);
  cuda_on_host::launch({kBlocks, 1, 1}, {kThreads, 1, 1}, schedule,
                       [&] { warp_kernel(wrong.data()); });
  for (unsigned errors : wrong) {
    if (errors != 0) std::printf("warp operation WRONG\n");
  }
  std::printf("warp operations done\n");
}

// A block's shared memory is its own, whichever blocks take turns, and starts as all ones.
__global__ void shared_kernel(unsigned* wrong) {
  __shared__ unsigned written[kThreads];
  unsigned errors = written[threadIdx.x] != 0xFFFFFFFFu;
  __syncthreads();
  written[threadIdx.x] = blockIdx.y * 1000 + threadIdx.x;
  __syncthreads();
  for (unsigned i = 0; i < kThreads; ++i) errors += written[i] != blockIdx.y * 1000 + i;
  wrong[(blockIdx.y * gridDim.x + blockIdx.x) * kThreads + threadIdx.x] = errors;
}

void shared(const cuda_on_host::Schedule& schedule) {
  std::vector<unsigned> wrong(2 * kBlocks * kThreads, 1);
  cuda_on_host::launch({2, kBlocks, 1}, {kThreads, 1, 1}, schedule,
                       [&] { shared_kernel(wrong.data()); });
  for (unsigned errors : wrong) {
    if (errors != 0) std::printf("shared memory WRONG\n");
  }
  std::printf("shared memory done\n");
}

// Addends that are exact in any order: the order shows in who sees which old value, not in the
// total.
__global__ void atomic_kernel(unsigned* count, unsigned long long* total, unsigned* last) {
  atomicAdd(count, 1u);
  atomicAdd(total, 1ull << 33);
  atomicExch(last, threadIdx.x);
}

void atomics(const cuda_on_host::Schedule& schedule) {
  unsigned count = 0, last = kThreads;
  unsigned long long total = 0;
  cuda_on_host::launch({kBlocks, 1, 1}, {kThreads, 1, 1}, schedule,
                       [&] { atomic_kernel(&count, &total, &last); });
  std::printf("%s\n",
              count == kBlocks * kThreads && total == count * (1ull << 33) && last < kThreads
                  ? "atomics right"
                  : "atomics WRONG");
}

// What follows is wrong.

template <typename Kernel>
auto one_block(Kernel kernel) {
  return [kernel](const cuda_on_host::Schedule& schedule) {
    cuda_on_host::launch({kBlocks, 1, 1}, {kThreads, 1, 1}, schedule, kernel);
    std::printf("NOT REPORTED\n");
  };
}

void barrier_in_branch() {
  if (threadIdx.x != 40) __syncthreads();
}

void barrier_at_two_sites() {
  if (threadIdx.x < 64) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void barrier_after_return() {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

void shuffle_without_lane() {
  if (threadIdx.x % 32 < 31) __shfl_down_sync(kAllLanes, 1.0, 1);
}

void shuffle_mask_without_caller() { __shfl_down_sync(0x0000FFFFu, 1, 1); }

void shuffle_from_outside_mask() {
  if (threadIdx.x % 32 < 16) __shfl_xor_sync(0x0000FFFFu, 1, 16);
}

void shuffle_at_two_sites() {
  if (threadIdx.x % 32 < 16) {
    __shfl_xor_sync(kAllLanes, 1, 1);
  } else {
    __shfl_xor_sync(kAllLanes, 2, 1);
  }
}

void shuffle_and_barrier() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

void shuffle_width_of_three() { __shfl_sync(kAllLanes, 1, 0, 3); }

alignas(16) float buffer[8];

void misaligned_load() { __ldcs(reinterpret_cast<const float4*>(buffer + 1)); }

void misaligned_store() { __stcs(reinterpret_cast<float2*>(buffer + 1), float2{0, 0}); }

// Lanes hand a value on through shared memory with no __syncwarp, relying on lock step.
template <bool kSynchronised>
__global__ void neighbour_kernel(float* output) {  // [gridDim.x * kThreads]
  __shared__ float of_thread[kThreads];
  of_thread[threadIdx.x] = static_cast<float>(threadIdx.x);
  if constexpr (kSynchronised) __syncwarp();
  output[blockIdx.x * kThreads + threadIdx.x] = of_thread[threadIdx.x ^ 1];
}

template <bool kSynchronised>
void neighbour(const cuda_on_host::Schedule& schedule) {
  std::vector<float> output(kBlocks * kThreads, -1);
  watch_global(output.data(), output.size() * sizeof(float), "output");
  cuda_on_host::launch({kBlocks, 1, 1}, {kThreads, 1, 1}, schedule,
                       [&] { neighbour_kernel<kSynchronised>(output.data()); });
  bool right = true;
  for (unsigned i = 0; i < output.size(); ++i)
    right &= output[i] == static_cast<float>(i % kThreads ^ 1);
  std::printf(right ? "neighbour right\n" : "neighbour WRONG\n");
}

void block_too_large(const cuda_on_host::Schedule& schedule) {
  cuda_on_host::launch({1, 1, 1}, {1025, 1, 1}, schedule, [] {});
}

// __syncthreads() after a plain call, deep enough to run off a fiber's stack.
int deep(int depth) {
  volatile char frame[4096] = {};
  return depth == 0 ? frame[0] : deep(depth - 1) + frame[1];
}

const std::map<std::string, std::function<void(const cuda_on_host::Schedule&)>> kScenarios = {
    {"sum", sum<Mistake::kNone>},
    {"warp", warp},
    {"shared", shared},
    {"atomics", atomics},
    {"neighbour", neighbour<true>},
    {"sum_no_barrier_before_read", sum<Mistake::kNoBarrierBeforeWarpZeroReads>},
    {"sum_no_barrier_after_ticket", sum<Mistake::kNoBarrierAfterTicket>},
    {"sum_no_fence_before_ticket", sum<Mistake::kNoFenceBeforeTicket>},
    {"sum_no_fence_after_ticket", sum<Mistake::kNoFenceAfterTicket>},
    {"sum_ticket_not_atomic", sum<Mistake::kTicketNotAtomic>},
    {"sum_ticket_reset_by_hand", sum<Mistake::kTicketResetByHand>},
    {"sum_ticket_lost", sum<Mistake::kTicketLost>},
    {"neighbour_not_synchronised", neighbour<false>},
    {"barrier_in_branch", one_block(barrier_in_branch)},
    {"barrier_at_two_sites", one_block(barrier_at_two_sites)},
    {"barrier_after_return", one_block(barrier_after_return)},
    {"shuffle_without_lane", one_block(shuffle_without_lane)},
    {"shuffle_mask_without_caller", one_block(shuffle_mask_without_caller)},
    {"shuffle_from_outside_mask", one_block(shuffle_from_outside_mask)},
    {"shuffle_at_two_sites", one_block(shuffle_at_two_sites)},
    {"shuffle_and_barrier", one_block(shuffle_and_barrier)},
    {"shuffle_width_of_three", one_block(shuffle_width_of_three)},
    {"misaligned_load", one_block(misaligned_load)},
    {"misaligned_store", one_block(misaligned_store)},
    {"stack_overflow", one_block([] { deep(64); })},
    {"block_too_large", block_too_large},
};

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) return std::fprintf(stderr, "selftest SCENARIO ORDER SEED RESIDENT_BLOCKS\n"), 2;
  const std::map<std::string, cuda_on_host::Order> orders = {
      {"forward", cuda_on_host::Order::kForward},
      {"backward", cuda_on_host::Order::kBackward},
      {"shuffled", cuda_on_host::Order::kShuffled}};
  const cuda_on_host::Schedule schedule{orders.at(argv[2]), std::strtoull(argv[3], nullptr, 10),
                                        static_cast<unsigned>(std::atoi(argv[4]))};
  try {
    kScenarios.at(argv[1])(schedule);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "cuda_on_host: %s\n", error.what());
    return cuda_on_host::kFaultExitCode;
  }
  return 0;
}
