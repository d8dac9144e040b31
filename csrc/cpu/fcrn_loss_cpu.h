// The pass on the CPU. It is split into chunks whose sums are added in order, so that the result
// does not depend on the number of threads.
#pragma once

#include "../loss_pass.h"

namespace fcrn::cpu {

// Cells of a chunk, which may span images. Few enough that its confidences stay in the L1 cache
// until the pose maps are computed, many enough that a row is 8 KiB of float32.
constexpr int64_t kChunkCells = 2048;

struct ChunkPlan {
  const LossPass& pass;
  bool planar;  // the cells of a map are contiguous in all tensors
  bool stream;  // bypass the caches when writing
};

// Computes chunks [first, last) and their sums. Compiled for two instruction sets.
using RunChunks = void (*)(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
namespace baseline {
void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
}
namespace avx2 {
void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
}

// Runs the pass on PyTorch's threads.
void run(const LossPass& pass);

// The sum of `count` contiguous weights.
double weight_sum(const void* weights, DType dtype, int64_t count);

// The instruction set whose loops run on this machine: "avx2" or "baseline".
const char* instruction_set();

}  // namespace fcrn::cpu
