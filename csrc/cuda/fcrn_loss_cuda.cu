// The operators on CUDA devices: device, stream and launch. Importing the pybind11 module
// `fcrn_fused._cuda` registers them; it is apart from `_C` because it needs libraries that a CPU
// build of PyTorch, or one for another CUDA version, does not have.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "../loss_op.h"
#include "fcrn_loss_kernels.cuh"

namespace fcrn::cuda {
namespace {

// So many blocks of a kernel run on the current device at once.
template <typename Kernel>
int64_t resident_blocks(Kernel kernel, int device) {
  int multiprocessors = 0, blocks = 0;  // what the runtime keeps: no synchronisation
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
  return int64_t{multiprocessors} * blocks;
}

// The blocks' sums and the ticket, in memory that belongs to this launch alone: any number of
// launches may run at the same time or be captured.
Workspace workspace_in(const OptionalTensor& memory, unsigned blocks, cudaStream_t stream) {
  const int64_t bytes = (blocks + 1) * int64_t{sizeof(Sums)};
  STD_TORCH_CHECK(memory && memory->numel() * static_cast<int64_t>(memory->element_size()) >= bytes,
                  "workspace must have at least ", bytes, " bytes");
  auto* sums = static_cast<Sums*>(memory->mutable_data_ptr());
  auto* ticket = reinterpret_cast<unsigned*>(sums + blocks);
  STD_CUDA_CHECK(cudaMemsetAsync(ticket, 0, sizeof(*ticket), stream));
  return {sums, ticket};
}

cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

struct Cuda {
  static void run(const LossPass& pass, const Tensor& pred, const OptionalTensor& memory) {
    const int device = pred.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    const cudaStream_t stream = current_stream(device);
    run_pass(pass, [&](auto kernel, int64_t threads) {
      const unsigned blocks = num_blocks(threads, resident_blocks(kernel, device));
      Workspace workspace;
      if (pass.wants_sums()) workspace = workspace_in(memory, blocks, stream);
      kernel<<<blocks, kThreads, 0, stream>>>(pass, workspace);
      STD_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
};

void sum_into(const Tensor& weight, int64_t repeats, const Tensor& sum,
              const OptionalTensor& memory) {
  const int device = weight.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const cudaStream_t stream = current_stream(device);
  auto* to = sum_of_weights(weight, sum);
  visit_element(dtype_of(weight, "weight", Elements::floating_or_bool), [&](auto element) {
    using T = decltype(element);
    const int64_t count = weight.numel(), threads = count * int64_t{sizeof(T)} / 16;
    const unsigned blocks = num_blocks(threads, resident_blocks(weight_sum_kernel<T>, device));
    weight_sum_kernel<T>
        <<<blocks, kThreads, 0, stream>>>(static_cast<const T*>(weight.const_data_ptr()), count,
                                          repeats, to, workspace_in(memory, blocks, stream));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

// Why the device cannot run the kernels, in the words of the CUDA runtime; "" if it can.
std::string problem(int device) {
  int former = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&former);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    error = cudaFuncGetAttributes(&attributes, strided_kernel<float, uint32_t, true>);
    cudaSetDevice(former);
  }
  cudaGetLastError();  // it is reported, not left behind for the next call
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace
}  // namespace fcrn::cuda

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CUDA, library) {
  library.impl("forward_into", TORCH_BOX(&fcrn::forward_into<fcrn::cuda::Cuda>));
  library.impl("backward_into", TORCH_BOX(&fcrn::backward_into<fcrn::cuda::Cuda>));
  library.impl("sum_into", TORCH_BOX(&fcrn::cuda::sum_into));
}

PYBIND11_MODULE(_cuda, m, pybind11::mod_gil_not_used()) {
  m.doc() = "The CUDA kernels of fcrn_fused.";
  m.attr("blocks_per_multiprocessor") = fcrn::cuda::kMostResidentBlocks;
  m.def("problem", &fcrn::cuda::problem, pybind11::arg("device"));
}
