// The operators' schemas and their CPU kernels. Importing the pybind11 module `fcrn_fused._C`
// registers them.
#include <pybind11/pybind11.h>

#include "cpu/fcrn_loss_cpu.h"
#include "loss_op.h"

namespace {

struct Cpu {
  static void run(const fcrn::LossPass& pass, const fcrn::Tensor&, const fcrn::OptionalTensor&) {
    fcrn::cpu::run(pass);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY(fcrn_fused, library) {
  library.def(FCRN_FORWARD_INTO_SCHEMA);
  library.def(FCRN_BACKWARD_INTO_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CPU, library) {
  library.impl("forward_into", TORCH_BOX(&fcrn::forward_into<Cpu>));
  library.impl("backward_into", TORCH_BOX(&fcrn::backward_into<Cpu>));
}

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The operators of fcrn_fused and their CPU kernels.";
  module.attr("compiler") = __VERSION__;
  module.def("instruction_set", &fcrn::cpu::instruction_set, "The CPU loops that run here.");
}
