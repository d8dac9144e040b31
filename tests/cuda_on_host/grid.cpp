#include "grid.h"

#include <link.h>

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "race_check.h"

namespace cuda_on_host {

Index3 thread_index, block_index, block_size, grid_size;

namespace {

constexpr std::uint64_t kMaxGridX = 2147483647;
constexpr unsigned kMaxGridYZ = 65535;
constexpr unsigned kMaxThreadsOfBlock = 1024;
// What CUDA promises of a `__shared__` variable's first value is nothing. All ones is NaN to every
// floating type, an index out of any range, and not a bool.
constexpr int kSharedMemoryPoison = 0xFF;

struct Block;

struct Thread {
  enum class State { kReady, kAtBarrier, kAtWarpOperation, kEnded };

  Block* block = nullptr;
  unsigned index = 0;  // in its block
  State state = State::kReady;
  Fiber* fiber = nullptr;
  // Of the rendez-vous that it waits at, or last met.
  Site site;
  WarpOperation operation{};
  unsigned mask = 0;
  std::uint64_t value = 0;
  unsigned source = 0;
  std::uint64_t result = 0;

  unsigned warp() const { return index / kWarpSize; }
  unsigned lane() const { return index % kWarpSize; }
};

// A resident block. `shared` holds its shared memory while another block has the place in memory.
struct Block {
  unsigned slot = 0;
  std::uint64_t index = 0;
  bool active = false;
  std::vector<Thread> threads;
  std::vector<std::uint64_t> ready;  // a bit for each thread
  unsigned at_barrier = 0;
  unsigned ended = 0;
  std::vector<std::byte> shared;

  void set_ready(Thread& thread) {
    thread.state = Thread::State::kReady;
    ready[thread.index / 64] |= std::uint64_t{1} << (thread.index % 64);
  }
  void clear_ready(const Thread& thread) {
    ready[thread.index / 64] &= ~(std::uint64_t{1} << (thread.index % 64));
  }
  bool any_ready() const {
    return std::any_of(ready.begin(), ready.end(), [](std::uint64_t word) { return word != 0; });
  }
};

Thread* running = nullptr;
const Schedule* running_schedule = nullptr;

Index3 unflatten(std::uint64_t index, const Index3& size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

std::string place(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return std::string(slash ? slash + 1 : site.file_name()) + ":" + std::to_string(site.line());
}

std::string name(const Thread& thread) {
  return "block " + std::to_string(thread.block->index) + " thread " +
         std::to_string(thread.index) + " (warp " + std::to_string(thread.warp()) + " lane " +
         std::to_string(thread.lane()) + ")";
}

const char* name(WarpOperation operation) {
  switch (operation) {
    case WarpOperation::kBarrier:
      return "warp barrier";
    case WarpOperation::kShuffle:
      return "shuffle";
    case WarpOperation::kVote:
      return "vote";
  }
  return "";
}

[[noreturn]] void exit_with(const std::string& report) {
  std::fflush(stdout);
  std::fprintf(stderr, "cuda_on_host: %s\n", report.c_str());
  std::fflush(stderr);
  std::_Exit(kFaultExitCode);  // not exit(): this may be a fiber's stack
}

std::string whereabouts(const Thread& thread) {
  switch (thread.state) {
    case Thread::State::kReady:
      return "has not arrived anywhere";
    case Thread::State::kAtBarrier:
      return "waits at the block barrier " + place(thread.site);
    case Thread::State::kAtWarpOperation: {
      char mask[16];
      std::snprintf(mask, sizeof(mask), "0x%08x", thread.mask);
      return std::string("waits at the ") + name(thread.operation) + " " + place(thread.site) +
             " with mask " + mask;
    }
    case Thread::State::kEnded:
      return "has returned from the kernel";
  }
  return "";
}

// Shared memory. `__shared__` becomes `static thread_local` (cuda_runtime.h), so all of a kernel's
// shared variables lie in this program's image of thread-local storage, and in nothing else: one
// range, that can be filled before a block begins and exchanged when several blocks take turns. A
// plain `static` could not be found.
struct SharedMemory {
  std::byte* begin = nullptr;
  std::size_t size = 0;
};

SharedMemory find_shared_memory() {
  SharedMemory shared;
  dl_iterate_phdr(
      [](dl_phdr_info* info, std::size_t, void* result) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
          *static_cast<SharedMemory*>(result) = {static_cast<std::byte*>(info->dlpi_tls_data),
                                                 info->dlpi_phdr[i].p_memsz};
        }
        return 1;  // the program itself comes first; the libraries' storage is their own
      },
      &shared);
  return shared;
}

Fiber* pooled_fiber(std::size_t index) {
  static std::deque<Fiber> pool;
  while (pool.size() <= index) pool.emplace_back();
  return &pool[index];
}

class Grid {
 public:
  Grid(Index3 grid, Index3 block, const Schedule& schedule, const std::function<void()>& kernel)
      : schedule_(schedule),
        kernel_(kernel),
        random_(schedule.seed),
        shared_(find_shared_memory()) {
    grid_size = grid;
    block_size = block;
    threads_of_block_ = block.x * block.y * block.z;
    const std::uint64_t blocks = std::uint64_t{grid.x} * grid.y * grid.z;
    for (std::uint64_t index = 0; index < blocks; ++index) waiting_blocks_.push_back(index);
    if (schedule.order == Order::kBackward) {
      std::reverse(waiting_blocks_.begin(), waiting_blocks_.end());
    } else if (schedule.order == Order::kShuffled) {
      std::shuffle(waiting_blocks_.begin(), waiting_blocks_.end(), random_);
    }
    slots_.resize(std::clamp<std::uint64_t>(schedule.resident_blocks, 1, blocks));
    for (unsigned slot = 0; slot < slots_.size(); ++slot) slots_[slot].slot = slot;
    race_check::begin_launch(static_cast<unsigned>(blocks * threads_of_block_), threads_of_block_,
                             static_cast<unsigned>(slots_.size()), shared_.begin, shared_.size);
  }

  void run() {
    for (Block& block : slots_) begin_next(block);
    while (true) {
      Block* block = choose_block();
      if (block == nullptr) break;
      if (!block->any_ready()) report_stuck(*block);
      step(*block, block->threads[choose_thread(*block)]);
      if (block->ended == threads_of_block_) begin_next(*block);
    }
    race_check::end_launch();
  }

 private:
  void begin_next(Block& block) {
    block.active = !waiting_blocks_.empty();
    if (!block.active) return;
    block.index = waiting_blocks_.front();
    waiting_blocks_.pop_front();
    block.at_barrier = block.ended = 0;
    block.threads.assign(threads_of_block_, Thread{});
    block.ready.assign((threads_of_block_ + 63) / 64, 0);
    for (unsigned index = 0; index < threads_of_block_; ++index) {
      Thread& thread = block.threads[index];
      thread.block = &block;
      thread.index = index;
      thread.fiber = pooled_fiber(std::size_t{block.slot} * threads_of_block_ + index);
      thread.fiber->start(&kernel_);
      block.set_ready(thread);
    }
    block.shared.assign(shared_.size, std::byte{kSharedMemoryPoison});
    if (shared_owner_ == &block) shared_owner_ = nullptr;
    race_check::begin_block(block.slot);
  }

  Block* choose_block() {
    std::size_t active = 0;
    for (const Block& block : slots_) active += block.active;
    if (active == 0) return nullptr;
    std::size_t skip = active > 1 ? random_() % active : 0;
    for (Block& block : slots_) {
      if (block.active && skip-- == 0) return &block;
    }
    return nullptr;
  }

  unsigned choose_thread(const Block& block) {
    const unsigned words = static_cast<unsigned>(block.ready.size());
    if (schedule_.order == Order::kBackward) {
      for (unsigned word = words; word-- > 0;) {
        if (block.ready[word]) return word * 64 + 63 - std::countl_zero(block.ready[word]);
      }
    }
    // The first that is ready, from a start that is 0 or drawn.
    const unsigned start = schedule_.order == Order::kShuffled
                               ? static_cast<unsigned>(random_() % threads_of_block_)
                               : 0;
    const std::uint64_t from_start = ~std::uint64_t{0} << (start % 64);
    if (const std::uint64_t word = block.ready[start / 64] & from_start) {
      return start / 64 * 64 + std::countr_zero(word);
    }
    for (unsigned i = 1; i <= words; ++i) {
      const unsigned word = (start / 64 + i) % words;
      if (block.ready[word]) return word * 64 + std::countr_zero(block.ready[word]);
    }
    return 0;
  }

  void step(Block& block, Thread& thread) {
    if (shared_owner_ != &block && shared_.size > 0) {
      if (shared_owner_) std::memcpy(shared_owner_->shared.data(), shared_.begin, shared_.size);
      std::memcpy(shared_.begin, block.shared.data(), shared_.size);
      shared_owner_ = &block;
    }
    thread_index = unflatten(thread.index, block_size);
    block_index = unflatten(block.index, grid_size);
    running = &thread;
    running_schedule = &schedule_;
    race_check::run_thread(static_cast<unsigned>(block.index) * threads_of_block_ + thread.index,
                           block.slot);
    thread.fiber->resume();
    race_check::run_scheduler();
    running = nullptr;
    if (thread.fiber->ended()) {
      thread.state = Thread::State::kEnded;
      block.clear_ready(thread);
      ++block.ended;
    }
  }

  // Nothing in the block can go on: some threads wait for others that went elsewhere or returned.
  [[noreturn]] void report_stuck(const Block& block) {
    const auto waits = [](const Thread& t) { return t.state != Thread::State::kEnded; };
    const Thread& first = *std::find_if(block.threads.begin(), block.threads.end(), waits);
    std::string report = name(first) + " " + whereabouts(first) + ", but not all can arrive:";
    // Runs of threads that are in the same state are told as one line.
    for (unsigned begin = 0, end = 0; begin < threads_of_block_; begin = end) {
      const std::string state = whereabouts(block.threads[begin]);
      while (end < threads_of_block_ && whereabouts(block.threads[end]) == state) ++end;
      report += "\n  threads " + std::to_string(begin) + " to " + std::to_string(end - 1) + ": " +
                (state.starts_with("has") ? state : "each " + state);
    }
    exit_with(report);
  }

  const Schedule& schedule_;
  const std::function<void()>& kernel_;
  std::mt19937_64 random_;
  SharedMemory shared_;
  Block* shared_owner_ = nullptr;
  unsigned threads_of_block_ = 0;
  std::deque<std::uint64_t> waiting_blocks_;
  std::vector<Block> slots_;
};

Thread& current(const Site& site) {
  if (running == nullptr) {
    exit_with("a device function was called outside a kernel at " + place(site));
  }
  return *running;
}

unsigned index_in_grid(const Thread& thread) {
  return static_cast<unsigned>(thread.block->index * thread.block->threads.size()) + thread.index;
}

void wait(Thread& thread, Thread::State state) {
  thread.state = state;
  thread.block->clear_ready(thread);
  Fiber::suspend();
}

// Lets other threads in where the hardware could, without waiting for any.
void interleave() {
  if (running_schedule->order == Order::kShuffled) Fiber::suspend();
}

template <typename Word>
Word apply_atomic(AtomicOperation operation, Word* address, Word operand, const Site& site) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Word) != 0) {
    fault(site, "an atomic on the misaligned address %p", static_cast<void*>(address));
  }
  interleave();
  race_check::atomic(index_in_grid(current(site)), address, sizeof(Word));
  const Word old = *address;
  switch (operation) {
    case AtomicOperation::kIncrement:
      *address = old >= operand ? 0 : old + 1;
      break;
    case AtomicOperation::kAdd:
      *address = old + operand;
      break;
    case AtomicOperation::kExchange:
      *address = operand;
      break;
  }
  return old;
}

}  // namespace

void launch(Index3 grid, Index3 block, const Schedule& schedule,
            const std::function<void()>& kernel) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreadsOfBlock || block.z > 64) {
    throw std::invalid_argument("a block of " + std::to_string(threads) + " threads");
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ ||
      grid.z > kMaxGridYZ) {
    throw std::invalid_argument("a grid of " + std::to_string(grid.x) + " x " +
                                std::to_string(grid.y) + " x " + std::to_string(grid.z) +
                                " blocks");
  }
  Grid(grid, block, schedule, kernel).run();
}

void fault(const Site& site, const char* format, ...) {
  char message[512];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof(message), format, arguments);
  va_end(arguments);
  exit_with((running ? name(*running) + ": " : std::string()) + message + " at " + place(site));
}

void block_barrier(const Site& site) {
  Thread& thread = current(site);
  Block& block = *thread.block;
  thread.site = site;
  thread.state = Thread::State::kAtBarrier;
  if (++block.at_barrier < block.threads.size()) {
    wait(thread, Thread::State::kAtBarrier);
    return;
  }
  std::vector<unsigned> members;
  for (Thread& other : block.threads) {
    if (other.site.line() != site.line() ||
        std::strcmp(other.site.file_name(), site.file_name()) != 0) {
      fault(site, "is at this block barrier while thread %u %s", other.index,
            whereabouts(other).c_str());
    }
    members.push_back(index_in_grid(other));
    block.set_ready(other);
  }
  block.at_barrier = 0;
  race_check::join(members);
  Fiber::suspend();  // the last to arrive has no right to go on first
}

unsigned lane_index() { return running->lane(); }

std::uint64_t warp_rendezvous(WarpOperation operation, unsigned mask, std::uint64_t value,
                              unsigned source, const Site& site) {
  Thread& thread = current(site);
  Block& block = *thread.block;
  if ((mask >> thread.lane() & 1) == 0) {
    fault(site, "calls a %s whose mask 0x%08x leaves it out", name(operation), mask);
  }
  const unsigned first = thread.index - thread.lane();
  const auto lane = [&](unsigned i) -> Thread& { return block.threads[first + i]; };
  thread.site = site;
  thread.operation = operation;
  thread.mask = mask;
  thread.value = value;
  thread.source = source;

  unsigned arrived = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) == 0) continue;
    if (first + i >= block.threads.size()) {
      fault(site, "calls a %s whose mask 0x%08x names lane %u, which does not exist",
            name(operation), mask, i);
    }
    const Thread& other = lane(i);
    if (&other == &thread) {
      ++arrived;
    } else if (other.state == Thread::State::kAtWarpOperation) {
      if (other.operation != operation || other.mask != mask || other.site.line() != site.line() ||
          std::strcmp(other.site.file_name(), site.file_name()) != 0) {
        fault(site, "calls a %s with mask 0x%08x while lane %u %s", name(operation), mask, i,
              whereabouts(other).c_str());
      }
      ++arrived;
    } else if (other.state != Thread::State::kReady) {
      fault(site, "calls a %s with mask 0x%08x while lane %u %s", name(operation), mask, i,
            whereabouts(other).c_str());
    }
  }
  if (arrived < static_cast<unsigned>(std::popcount(mask))) {
    wait(thread, Thread::State::kAtWarpOperation);
    return thread.result;
  }

  unsigned votes = 0;
  std::vector<unsigned> members;
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if (mask >> i & 1) votes |= static_cast<unsigned>(lane(i).value != 0) << i;
  }
  for (unsigned i = 0; i < kWarpSize; ++i) {
    if ((mask >> i & 1) == 0) continue;
    Thread& member = lane(i);
    if (operation == WarpOperation::kShuffle) {
      if ((mask >> member.source & 1) == 0) {
        fault(site,
              "completes a shuffle with mask 0x%08x in which lane %u reads lane %u, which is not "
              "in it",
              mask, i, member.source);
      }
      member.result = lane(member.source).value;
    } else {
      member.result = votes;
    }
    members.push_back(index_in_grid(member));
    block.set_ready(member);
  }
  if (operation == WarpOperation::kBarrier) race_check::join(members);
  Fiber::suspend();  // the last to arrive has no right to go on first
  return thread.result;
}

unsigned atomic_operation(AtomicOperation operation, unsigned* address, unsigned operand,
                          const Site& site) {
  return apply_atomic(operation, address, operand, site);
}

std::uint64_t atomic_operation(AtomicOperation operation, std::uint64_t* address,
                               std::uint64_t operand, const Site& site) {
  return apply_atomic(operation, address, operand, site);
}

void memory_fence() {
  interleave();
  race_check::fence(index_in_grid(*running));
}

}  // namespace cuda_on_host
