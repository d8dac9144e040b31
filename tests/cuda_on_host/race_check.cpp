#include "race_check.h"

#ifdef CUDA_ON_HOST_RACE_CHECK

#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <unordered_map>

#include "grid.h"

namespace cuda_on_host::race_check {
namespace {

// clock[t] is the time of thread t up to which everything is known to have happened. A thread's own
// time moves on when it lets others know of it.
using Clock = std::vector<std::uint32_t>;

void join_into(Clock& into, const Clock& from) {
  if (into.size() < from.size()) into.resize(from.size(), 0);
  for (std::size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

struct ThreadClocks {
  Clock knows;
  // CUDA's fences order as those of C++: an atomic publishes what its thread knew at its last
  // fence, and what an atomic reads counts from the next fence on.
  Clock at_last_fence;
  Clock read_by_atomics;
};

struct Access {
  std::uint32_t thread = 0;
  std::uint32_t time = 0;       // 0: none. A thread's time begins at 1.
  const void* where = nullptr;  // a code address; nullptr: an atomic
};

// One byte of memory: the last store, and the loads and atomics since.
struct Byte {
  Access store;
  std::vector<Access> loads, atomics;
  bool forbidden = false;
};

struct Range {
  std::string name;
  std::uintptr_t begin = 0;
  std::vector<Byte> bytes;
};

std::map<std::uintptr_t, Range> global_memory;  // by its end
std::vector<Range> shared_memory;               // one for each resident block
std::vector<ThreadClocks> threads;
std::unordered_map<const void*, Clock> atomics;
unsigned threads_of_block = 0;
bool in_kernel = false;
unsigned current_thread = 0;
unsigned current_slot = 0;

constexpr unsigned kMaxThreads =
    1u << 13;  // a clock has a number for each; there are that many clocks

std::string thread_name(std::uint32_t thread) {
  return "block " + std::to_string(thread / threads_of_block) + " thread " +
         std::to_string(thread % threads_of_block);
}

// The source line of a code address. The program is linked to a fixed address, so binutils can
// tell.
std::string source_line(const void* code) {
  if (code == nullptr) return "an atomic";
  char command[128];
  // The address is a return address: the call is before it.
  std::snprintf(command, sizeof(command), "addr2line -s -i -e /proc/%d/exe %#zx 2>/dev/null",
                static_cast<int>(getpid()), reinterpret_cast<std::size_t>(code) - 1);
  std::string line = "?";
  if (std::FILE* pipe = popen(command, "r")) {
    // From the innermost of the inlined calls outwards; the shim's own functions say little.
    for (char text[512]; std::fgets(text, sizeof(text), pipe);) {
      line = text;
      line.resize(line.find_last_not_of('\n') + 1);
      if (!line.starts_with("cuda_runtime.h")) break;
    }
    pclose(pipe);
  }
  return line;
}

[[noreturn]] void report(const Range& range, std::uintptr_t address, const char* access,
                         const void* where, const char* earlier_access, const Access& earlier) {
  std::fprintf(stderr,
               "cuda_on_host: race: %s %s %s + %zu at %s, and %s %s it at %s; no barrier or fenced "
               "atomic orders the two\n",
               thread_name(current_thread).c_str(), access, range.name.c_str(),
               static_cast<std::size_t>(address - range.begin), source_line(where).c_str(),
               thread_name(earlier.thread).c_str(), earlier_access,
               source_line(earlier.where).c_str());
  std::fflush(stderr);
  std::_Exit(kFaultExitCode);
}

[[noreturn]] void report_forbidden(const Range& range, std::uintptr_t address, const void* where) {
  std::fprintf(stderr, "cuda_on_host: %s loads %s + %zu at %s, which it has no business to read\n",
               thread_name(current_thread).c_str(), range.name.c_str(),
               static_cast<std::size_t>(address - range.begin), source_line(where).c_str());
  std::fflush(stderr);
  std::_Exit(kFaultExitCode);
}

Range* find(std::uintptr_t address) {
  Range& shared = shared_memory[current_slot];
  if (address - shared.begin < shared.bytes.size()) return &shared;
  const auto after = global_memory.upper_bound(address);
  if (after == global_memory.end() || address < after->second.begin) return nullptr;
  return &after->second;
}

// `where` is nullptr for an atomic; two of those do not race.
void check(std::uintptr_t address, std::size_t size, bool is_store, const void* where) {
  Range* range = find(address);
  if (range == nullptr) return;
  const Clock& knows = threads[current_thread].knows;
  const auto unordered = [&](const Access& access) {
    return access.time > knows[access.thread] && access.thread != current_thread;
  };
  const Access access{current_thread, knows[current_thread], where};
  const char* name = is_store ? "stores" : "loads";
  for (std::size_t i = 0; i < size; ++i, ++address) {
    const std::size_t offset = address - range->begin;
    if (offset >= range->bytes.size()) return;
    Byte& byte = range->bytes[offset];
    if (byte.forbidden && !is_store) report_forbidden(*range, address, where);
    const auto conflict = [&](const std::vector<Access>& earlier, const char* earlier_name) {
      for (const Access& other : earlier) {
        if (unordered(other)) report(*range, address, name, where, earlier_name, other);
      }
    };
    const bool is_atomic = where == nullptr;
    if (unordered(byte.store)) report(*range, address, name, where, "stores", byte.store);
    if (is_store) conflict(byte.loads, "loads");
    if (!is_atomic) conflict(byte.atomics, "stores");
    if (is_atomic) {
      byte.atomics.push_back(access);
    } else if (is_store) {
      byte.store = access;
      byte.loads.clear();
      byte.atomics.clear();
    } else if (byte.loads.empty() || byte.loads.back().thread != current_thread) {
      byte.loads.push_back(access);
    } else {
      byte.loads.back() = access;
    }
  }
}

}  // namespace

void watch_global(const void* begin, std::size_t size, const std::string& name) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  if (size > 0) global_memory[address + size] = {name, address, std::vector<Byte>(size)};
}

void forget_global(const void* begin) {
  const auto found = global_memory.upper_bound(reinterpret_cast<std::uintptr_t>(begin));
  if (found != global_memory.end()) global_memory.erase(found);
}

void forbid(const void* begin, std::size_t size) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const auto found = global_memory.upper_bound(address);
  if (found == global_memory.end() || address < found->second.begin) return;
  for (std::size_t i = 0; i < size; ++i) {
    found->second.bytes[address - found->second.begin + i].forbidden = true;
  }
}

void begin_launch(unsigned thread_count, unsigned threads_of_a_block, unsigned slots,
                  const void* shared, std::size_t shared_size) {
  if (thread_count > kMaxThreads) {
    std::fprintf(stderr, "cuda_on_host: the race check is for up to %u threads, not %u\n",
                 kMaxThreads, thread_count);
    std::_Exit(kFaultExitCode);
  }
  threads_of_block = threads_of_a_block;
  threads.assign(thread_count, {});
  for (unsigned thread = 0; thread < thread_count; ++thread) {
    threads[thread].knows.assign(thread_count, 0);
    threads[thread].knows[thread] = 1;
  }
  atomics.clear();
  // A kernel begins after the one before it has ended: nothing of that races.
  for (auto& [end, range] : global_memory) {
    for (Byte& byte : range.bytes) byte.store = {}, byte.loads.clear(), byte.atomics.clear();
  }
  shared_memory.assign(slots, {"shared memory", reinterpret_cast<std::uintptr_t>(shared),
                               std::vector<Byte>(shared_size)});
}

void begin_block(unsigned slot) {
  shared_memory[slot].bytes.assign(shared_memory[slot].bytes.size(), {});
}

void run_thread(unsigned thread, unsigned slot) {
  current_thread = thread;
  current_slot = slot;
  in_kernel = true;
}

void run_scheduler() { in_kernel = false; }

void end_launch() { in_kernel = false; }

void join(const std::vector<unsigned>& members) {
  Clock together;
  for (unsigned member : members) join_into(together, threads[member].knows);
  for (unsigned member : members) {
    threads[member].knows = together;
    ++threads[member].knows[member];
  }
}

void fence(unsigned thread) {
  ThreadClocks& clocks = threads[thread];
  join_into(clocks.knows, clocks.read_by_atomics);
  clocks.at_last_fence = clocks.knows;
  ++clocks.knows[thread];
}

void atomic(unsigned thread, const void* address, std::size_t size) {
  check(reinterpret_cast<std::uintptr_t>(address), size, true, nullptr);
  Clock& published = atomics[address];
  join_into(threads[thread].read_by_atomics, published);
  join_into(published, threads[thread].at_last_fence);
}

void compiled_access(const void* address, std::size_t size, bool is_store, const void* where) {
  if (in_kernel) check(reinterpret_cast<std::uintptr_t>(address), size, is_store, where);
}

}  // namespace cuda_on_host::race_check

// What the compiler calls.

#define CUDA_ON_HOST_ACCESS(name, size, is_store)                           \
  void name(void* address) {                                                \
    cuda_on_host::race_check::compiled_access(address, size, is_store,      \
                                              __builtin_return_address(0)); \
  }
#define CUDA_ON_HOST_ACCESSES(size)                             \
  CUDA_ON_HOST_ACCESS(__tsan_read##size, size, false)           \
  CUDA_ON_HOST_ACCESS(__tsan_write##size, size, true)           \
  CUDA_ON_HOST_ACCESS(__tsan_unaligned_read##size, size, false) \
  CUDA_ON_HOST_ACCESS(__tsan_unaligned_write##size, size, true) \
  CUDA_ON_HOST_ACCESS(__tsan_volatile_read##size, size, false)  \
  CUDA_ON_HOST_ACCESS(__tsan_volatile_write##size, size, true)

extern "C" {
CUDA_ON_HOST_ACCESSES(1)
CUDA_ON_HOST_ACCESSES(2)
CUDA_ON_HOST_ACCESSES(4)
CUDA_ON_HOST_ACCESSES(8)
CUDA_ON_HOST_ACCESSES(16)
void __tsan_read_range(void* address, std::size_t size) {
  cuda_on_host::race_check::compiled_access(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, std::size_t size) {
  cuda_on_host::race_check::compiled_access(address, size, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}

#endif  // CUDA_ON_HOST_RACE_CHECK
