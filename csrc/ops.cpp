// The operators' schemas, their CPU kernels, and the pybind11 module `fcrn_fused._C`, which says
// what was built in and loads the CUDA library. Importing the module registers the operators.
#include <dlfcn.h>
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/fcrn_loss_cpu.h"
#include "loss_op.h"

#define FCRN_RULE_SCHEMA                                                 \
  "Tensor? negative_weight_tensor, Tensor? coord_weight_tensor, "        \
  "float negative_weight, float positive_weight, float[] coord_weight, " \
  "float? ignore_value, int reduction"

STABLE_TORCH_LIBRARY(fcrn_fused, library) {
  library.def("forward(Tensor pred, Tensor target, " FCRN_RULE_SCHEMA
              ", bool want_grad, bool want_stats) -> Tensor[]");
  library.def("backward(Tensor grad_output, Tensor pred, Tensor target, " FCRN_RULE_SCHEMA
              ", Tensor? num_positive, bool wrt_target) -> Tensor");
  library.def(
      "rescale_(Tensor(a!) grad, Tensor grad_output, Tensor pred, Tensor target, " FCRN_RULE_SCHEMA
      ", Tensor? num_positive) -> ()");
}

namespace {

struct Cpu {
  static void run(const fcrn::LossPass& pass, const fcrn::Tensor&) { fcrn::cpu::run(pass); }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CPU, library) { fcrn::register_ops<Cpu>(library); }

namespace {

void* cuda_library = nullptr;

// Loads the library with the CUDA kernels, whose static initialisers register them; "" or the
// reason why it does not load.
std::string load_cuda_library(const std::string& path) {
  cuda_library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (cuda_library) return "";
  const char* error = dlerror();
  return error ? error : "unknown error of the dynamic linker";
}

// Why a CUDA device cannot run the kernels ("" if it can); begins to use the device.
std::string cuda_problem(int device) {
  if (!cuda_library) return "the CUDA library is not loaded";
  const auto problem =
      reinterpret_cast<const char* (*)(int)>(dlsym(cuda_library, "fcrn_fused_cuda_problem"));
  const char* text = problem ? problem(device) : "the CUDA library is of another version";
  return text ? text : "";
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["PyTorch built against"] = FCRN_BUILT_TORCH;
  info["compiler"] = __VERSION__;
  info["CUDA built with"] = FCRN_BUILT_CUDA;
  info["CUDA architectures"] = FCRN_BUILT_ARCHITECTURES;
  info["CPU instruction set"] = fcrn::cpu::instruction_set();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "The compiled kernels of fcrn_fused.";
  module.def("load_cuda_library", &load_cuda_library, pybind11::arg("path"));
  module.def("cuda_problem", &cuda_problem, pybind11::arg("device"));
  module.def("build_info", &build_info);
}
