// The CPU's pass over the cells: cut into chunks whose sums are added in order, so that the result
// does not depend on the number of threads.
#pragma once

#include "../loss_pass.h"

namespace fcrn::cpu {

// Cells of a chunk, counted through all images. Small enough for its confidences to stay in the
// first-level cache between the two sweeps, large enough that a sweep writes a run of 8 KiB.
constexpr int64_t kChunkCells = 2048;

// What is the same for all chunks of a pass.
struct ChunkPlan {
  const LossPass& pass;
  bool planar;  // the cells of a map lie side by side in every tensor
  bool stream;  // write past the caches
};

// Computes chunks [first, last) and their sums. The same loops, compiled for two instruction sets.
using RunChunks = void (*)(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
namespace baseline {
void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
}
namespace avx2 {
void run_chunks(const ChunkPlan& plan, int64_t first, int64_t last, Sums* sums);
}

// Computes the pass with PyTorch's threads.
void run(const LossPass& pass);

// The sum of `count` weights that lie side by side.
double weight_sum(const void* weights, DType dtype, int64_t count);

// The instruction set whose loops run on this machine: "avx2" or "baseline".
const char* instruction_set();

}  // namespace fcrn::cpu
