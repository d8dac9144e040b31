// PyTorch's at::parallel_for, through the stable ABI.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>

namespace fcrn::cpu {

// Calls `run(first, last)` for ranges of at least `grain` that together are [0, count).
template <typename Run>
void parallel_for(int64_t count, int64_t grain, Run& run) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(
      0, count, grain,
      [](int64_t first, int64_t last, void* of) { (*static_cast<Run*>(of))(first, last); }, &run));
}

}  // namespace fcrn::cpu
