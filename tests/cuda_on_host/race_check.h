// Finds data races, and missing fences, by the rules of the CUDA memory model instead of by luck.
//
// In the build that has it, the compiler puts a call before every load and store of the kernel
// (-fsanitize=thread), and those calls come here, not to ThreadSanitizer's own runtime, which knows
// nothing of warps, block barriers and fences. Each CUDA thread carries a vector clock: what it
// knows to have happened. A block barrier joins the clocks of the block, __syncwarp those of its
// lanes; a shuffle or a vote joins nothing, for CUDA promises no ordering of memory there.
// __threadfence before an atomic and __threadfence after the atomic that reads it join the two
// threads; an atomic without fences orders nothing. Two accesses to one byte, one of them a store,
// that no clock orders are a race, in whatever order they were run.
//
// In other builds the functions are empty.
#ifndef TESTS_CUDA_ON_HOST_RACE_CHECK_H_
#define TESTS_CUDA_ON_HOST_RACE_CHECK_H_

#include <cstddef>
#include <string>
#include <vector>

namespace cuda_on_host::race_check {

#ifdef CUDA_ON_HOST_RACE_CHECK
// A range of global memory that the kernel may use. Accesses elsewhere are not looked at.
void watch_global(const void* begin, std::size_t size, const std::string& name);
void forget_global(const void* begin);
// Bytes in a watched range that no thread may load.
void forbid(const void* begin, std::size_t size);

// Called by the scheduler. `thread` counts through the whole grid, `slot` is that of a resident
// block, whose shared memory lies at `shared` while one of its threads runs.
void begin_launch(unsigned threads, unsigned threads_of_block, unsigned slots, const void* shared,
                  std::size_t shared_size);
void begin_block(unsigned slot);
void run_thread(unsigned thread, unsigned slot);
void run_scheduler();
void end_launch();
void join(const std::vector<unsigned>& threads);
void fence(unsigned thread);
void atomic(unsigned thread, const void* address, std::size_t size);
#else
inline void watch_global(const void*, std::size_t, const std::string&) {}
inline void forget_global(const void*) {}
inline void forbid(const void*, std::size_t) {}
inline void begin_launch(unsigned, unsigned, unsigned, const void*, std::size_t) {}
inline void begin_block(unsigned) {}
inline void run_thread(unsigned, unsigned) {}
inline void run_scheduler() {}
inline void end_launch() {}
inline void join(const std::vector<unsigned>&) {}
inline void fence(unsigned) {}
inline void atomic(unsigned, const void*, std::size_t) {}
#endif

}  // namespace cuda_on_host::race_check

#endif  // TESTS_CUDA_ON_HOST_RACE_CHECK_H_
