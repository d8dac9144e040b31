#include "fcrn_loss_cpu.h"

#include <cstdlib>
#include <string_view>
#include <vector>

#include "parallel_for.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace fcrn::cpu {
namespace {

// Passes that write at least this many bytes bypass the caches, which saves reading the lines that
// are overwritten. Fewer bytes are better left in the caches for their next use.
constexpr int64_t kStreamFromBytes = int64_t{12} << 20;

// The fewest cells for a thread.
constexpr int64_t kGrainCells = 8192;

// ATEN_CPU_CAPABILITY=default disables AVX2, as in PyTorch's own kernels.
bool has_avx2() {
#if defined(__x86_64__)
  static const bool has = [] {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    if (capability && std::string_view(capability) == "default") return false;
    unsigned eax, ebx, ecx = 0, edx;  // clang before 19 does not know the name "f16c"
    return __builtin_cpu_supports("avx2") && __get_cpuid(1, &eax, &ebx, &ecx, &edx) &&
           (ecx & bit_F16C) != 0;
  }();
  return has;
#else
  return false;
#endif
}

RunChunks run_chunks() {
#if defined(__x86_64__)
  if (has_avx2()) return avx2::run_chunks;
#endif
  return baseline::run_chunks;
}

// Bytes of the gradient or of the errors; no pass writes both.
int64_t bytes_written(const LossPass& pass, int64_t cells) {
  const TensorView& written = pass.grad ? pass.grad : pass.errors;
  if (!written || pass.grad_is_for_one) return 0;
  const bool one_per_cell = !pass.grad && pass.output == Output::cell;
  return cells * (one_per_cell ? 1 : pass.grid.maps) * size_of(written.dtype);
}

}  // namespace

const char* instruction_set() { return has_avx2() ? "avx2" : "baseline"; }

void run(const LossPass& pass) {
  if (pass.has_nothing_to_do()) return;
  const Grid& grid = pass.grid;
  const int64_t cells = grid.images * grid.cells;
  const bool planar = pass.all_views([&](const TensorView& view) { return view.is_planar(grid); });
  const ChunkPlan plan{pass, planar, bytes_written(pass, cells) >= kStreamFromBytes};
  const int64_t num_chunks = (cells + kChunkCells - 1) / kChunkCells;
  std::vector<Sums> sums(num_chunks);
  auto run_range = [&](int64_t first, int64_t last) {
    run_chunks()(plan, first, last, sums.data() + first);
  };
  if (cells <= kGrainCells) {
    run_range(0, num_chunks);
  } else {
    parallel_for(num_chunks, kGrainCells / kChunkCells, run_range);
  }
  if (!pass.wants_sums()) return;
  Sums total;
  for (const Sums& chunk : sums) total.add(chunk);
  if (is_double(pass.pred.dtype, pass.target.dtype)) {
    pass.write_results<double>(total);
  } else {
    pass.write_results<float>(total);
  }
}

}  // namespace fcrn::cpu
