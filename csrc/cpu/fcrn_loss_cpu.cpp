#include "fcrn_loss_cpu.h"

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdlib>
#include <string_view>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fcrn::cpu {
namespace {

// From this many bytes written on, a write past the caches is cheaper: a plain store reads the line
// that it overwrites. Below, whoever reads the gradient next would find it in them, and gains more.
constexpr int64_t kStreamFromBytes = int64_t{12} << 20;

// From this many bytes on, memory that is new to the process is asked for in huge pages.
constexpr int64_t kHugePagesFromBytes = int64_t{4} << 20;

// Cells worth a thread of their own.
constexpr int64_t kGrainCells = 8192;

// Like PyTorch's own kernels, those here keep to the baseline if ATEN_CPU_CAPABILITY says so.
bool has_avx2() {
#if defined(__x86_64__)
  static const bool has = [] {
    const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
    if (capability && std::string_view(capability) == "default") return false;
    unsigned eax, ebx, ecx = 0, edx;  // clang before 19 does not know "f16c" by name
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

bool is_planar(const LossPass& pass) {
  const Grid& grid = pass.grid;
  for (const TensorView* view : {&pass.pred, &pass.target, &pass.grad, &pass.errors}) {
    if (*view && !view->is_planar(grid)) return false;
  }
  return !pass.has_grad_output_per_cell() || !pass.grad_output || pass.grad_output.is_planar(grid);
}

// A gradient comes from PyTorch's allocator, and a large one is new to the process each time: its
// first touch then costs more than the writing, a fault for every 4 KiB. This asks the kernel,
// where it leaves the choice to the program, to map 2 MiB at a fault. What is mapped stays as it
// is.
void advise_huge_pages([[maybe_unused]] const TensorView& view, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (!view || bytes < kHugePagesFromBytes) return;
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto into_page = static_cast<int64_t>(reinterpret_cast<uintptr_t>(view.data) % page);
  madvise(static_cast<char*>(view.data) - into_page, bytes + into_page, MADV_HUGEPAGE);
#endif
}

// Bytes of the gradient, or else of the errors; no pass writes both.
int64_t bytes_written(const LossPass& pass, int64_t cells) {
  const TensorView& written = pass.grad ? pass.grad : pass.errors;
  if (!written || pass.grad_is_for_one) return 0;
  const bool one_per_cell = !pass.grad && pass.reduction == Reduction::cell;
  return cells * (one_per_cell ? 1 : pass.grid.maps) * size_of(written.dtype);
}

}  // namespace

const char* instruction_set() { return has_avx2() ? "avx2" : "baseline"; }

void run(const LossPass& pass) {
  double grad_output = 1.0;
  if (pass.grad_output && !pass.has_grad_output_per_cell()) {
    grad_output = load_as<double>(pass.grad_output.data, pass.grad_output.dtype, 0);
  }
  const double dloss_derror = pass.dloss_derror(grad_output);
  if (pass.grad_is_for_one && dloss_derror == pass.dloss_derror_in_forward()) return;

  const Grid& grid = pass.grid;
  const int64_t cells = grid.images * grid.cells;
  const int64_t written = bytes_written(pass, cells);
  const ChunkPlan plan{pass, dloss_derror, is_planar(pass), written >= kStreamFromBytes};
  if (!pass.grad_is_for_one) advise_huge_pages(pass.grad, written);
  const int64_t num_chunks = (cells + kChunkCells - 1) / kChunkCells;
  std::vector<Sums> sums(num_chunks);
  auto run_range = [&](int64_t first, int64_t last) {
    run_chunks()(plan, first, last, sums.data() + first);
  };
  if (cells <= kGrainCells) {
    run_range(0, num_chunks);
  } else {
    using RunRange = decltype(run_range);
    TORCH_ERROR_CODE_CHECK(torch_parallel_for(
        0, num_chunks, kGrainCells / kChunkCells,
        [](int64_t first, int64_t last, void* run) { (*static_cast<RunRange*>(run))(first, last); },
        &run_range));
  }
  if (!pass.wants_sums) return;
  Sums total;
  for (const Sums& chunk : sums) total.add(chunk);
  if (is_double(pass.pred.dtype, pass.target.dtype)) {
    pass.write_results<double>(total);
  } else {
    pass.write_results<float>(total);
  }
}

}  // namespace fcrn::cpu
