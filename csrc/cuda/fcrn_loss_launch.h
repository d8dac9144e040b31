// What the CUDA library's two halves say to each other: the half that nvcc compiles knows kernels,
// the half that g++ compiles knows PyTorch.
#pragma once

#include <cuda_runtime_api.h>

#include "../loss_pass.h"

namespace fcrn::cuda {

// Gives a launch of so many blocks room for their sums, in the order of its stream.
class WorkspaceSource {
 public:
  virtual Sums* block_sums(unsigned blocks) = 0;
  virtual ~WorkspaceSource() = default;
};

// Launches the kernel for the pass on `stream`, whose device must be the current one.
cudaError_t launch_pass(const LossPass& pass, int device, cudaStream_t stream,
                        WorkspaceSource& source);

// Writes numbers to device memory by kernel arguments: no copy from memory that may be gone when a
// captured graph is replayed.
cudaError_t write_numbers(double* to, const double* numbers, int64_t count, cudaStream_t stream);

// Whether the current device can run the kernels: cudaErrorNoKernelImageForDevice and the like.
cudaError_t check_device();

}  // namespace fcrn::cuda
