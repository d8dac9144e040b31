// Runs a grid of CUDA threads on one host thread, each CUDA thread a fiber.
//
// Threads run one at a time and change places only where CUDA makes them wait for one another: at a
// block barrier or a warp operation (here: a rendez-vous). Which thread goes on, of those that can,
// is the schedule's choice, so a run is a function of its schedule. Each rendez-vous knows which
// threads must arrive; when one cannot arrive any more, the run ends with a report that names the
// threads and the source lines, and exit code kFaultExitCode.
#ifndef TESTS_CUDA_ON_HOST_GRID_H_
#define TESTS_CUDA_ON_HOST_GRID_H_

#include <cstdint>
#include <functional>
#include <source_location>

namespace cuda_on_host {

inline constexpr int kFaultExitCode = 3;
inline constexpr unsigned kWarpSize = 32;

using Site = std::source_location;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

enum class Order { kForward, kBackward, kShuffled };

struct Schedule {
  // Forward runs the lowest block and, in it, the lowest thread that can go on; backward the
  // highest. Shuffled draws the block and the thread at every step, and lets other threads in at
  // every atomic and every fence too.
  Order order = Order::kForward;
  std::uint64_t seed = 0;
  // How many blocks take turns. With one, each block ends before the next begins.
  unsigned resident_blocks = 1;
};

// Runs `kernel` once for each thread of the grid. Throws std::invalid_argument for a launch that a
// GPU would refuse.
void launch(Index3 grid, Index3 block, const Schedule& schedule,
            const std::function<void()>& kernel);

// The coordinates of the running thread.
extern Index3 thread_index, block_index, block_size, grid_size;

// Reports a fault of the running thread at `site`, and exits.
[[noreturn]] void fault(const Site& site, const char* format, ...)
    __attribute__((format(printf, 2, 3)));

void block_barrier(const Site& site);

enum class WarpOperation { kBarrier, kShuffle, kVote };

// Waits for every lane of `mask` to arrive with the same operation, mask and site. Returns for a
// shuffle the `value` of lane `source`, and for a vote the mask of the lanes whose `value` is not
// 0.
std::uint64_t warp_rendezvous(WarpOperation operation, unsigned mask, std::uint64_t value,
                              unsigned source, const Site& site);
unsigned lane_index();

enum class AtomicOperation { kIncrement, kAdd, kExchange };
unsigned atomic_operation(AtomicOperation operation, unsigned* address, unsigned operand,
                          const Site& site);
std::uint64_t atomic_operation(AtomicOperation operation, std::uint64_t* address,
                               std::uint64_t operand, const Site& site);
void memory_fence();

}  // namespace cuda_on_host

#endif  // TESTS_CUDA_ON_HOST_GRID_H_
