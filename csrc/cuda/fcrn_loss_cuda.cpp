// The operators on CUDA devices: allocation, device and stream. Importing the pybind11 module
// `fcrn_fused._cuda` registers them; it is apart from `_C` because it needs libraries that a CPU
// build of PyTorch, or one for another CUDA version, does not have.
#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

#include "../loss_op.h"
#include "fcrn_loss_launch.h"

namespace fcrn::cuda {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("the CUDA kernel of fcrn_fused was not launched: ") +
                           cudaGetErrorString(error));
}

// Makes a tensor's device the current one, and the former again at the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&former_));
    if (device != former_) check(cudaSetDevice(device));
    changed_ = device != former_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int former_ = 0;
  bool changed_ = false;
};

// From PyTorch's allocator, which knows the order of the stream and the memory of a captured graph.
class TorchWorkspace : public WorkspaceSource {
 public:
  explicit TorchWorkspace(const Tensor& like) : like_(like) {}

  Sums* block_sums(unsigned blocks) override {
    static_assert(sizeof(Sums) % sizeof(double) == 0 && alignof(Sums) == alignof(double));
    constexpr int64_t doubles_each = sizeof(Sums) / sizeof(double);
    return reinterpret_cast<Sums*>(doubles(blocks * doubles_each));
  }

  double* doubles(int64_t count) {
    const int64_t stride = 1;
    memory_.push_back(empty_strided(like_, 1, &count, &stride, aoti_torch_dtype_float64()));
    return static_cast<double*>(memory_.back().data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> memory_;
};

struct Cuda {
  static void run(LossPass pass, const Tensor& pred) {
    const int device = pred.get_device_index();
    const DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    TorchWorkspace workspace(pred);
    const auto cuda_stream = static_cast<cudaStream_t>(stream);
    CoordWeights& coord = pass.coord_weights;
    if (coord.data && coord.data_on_host) {
      std::vector<double> numbers(coord.count);
      for (int64_t map = 0; map < coord.count; ++map) {
        numbers[map] = load_as<double>(coord.data, coord.dtype, map * coord.stride);
      }
      double* on_device = workspace.doubles(coord.count);
      check(write_numbers(on_device, numbers.data(), coord.count, cuda_stream));
      coord.data = on_device;
      coord.dtype = DType::float64;
      coord.stride = 1;
    }
    check(launch_pass(pass, device, cuda_stream, workspace));
  }
};

}  // namespace
}  // namespace fcrn::cuda

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CUDA, library) {
  fcrn::register_ops<fcrn::cuda::Cuda>(library);
}

// Why a device cannot run the kernels, in the words of the CUDA runtime; "" if it can.
static std::string problem(int device) {
  int former = 0;
  cudaError_t error = cudaGetDevice(&former);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = fcrn::cuda::check_device();
  if (error == cudaSuccess) error = cudaSetDevice(former);
  cudaGetLastError();
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

PYBIND11_MODULE(_cuda, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The CUDA kernels of fcrn_fused.";
  module.def("problem", &problem, pybind11::arg("device"));
}
