// The operator's schema and its CPU kernel. Importing the pybind11 module `fcrn_fused._C` registers
// them.
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

STABLE_TORCH_LIBRARY(fcrn_fused, library) { library.def(FCRN_LOSS_PASS_SCHEMA); }

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CPU, library) {
  library.impl("loss_pass", TORCH_BOX(&fcrn::loss_pass<Cpu>));
}

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The operator of fcrn_fused and its CPU kernels.";
  module.attr("compiler") = __VERSION__;
  module.def("instruction_set", &fcrn::cpu::instruction_set, "The CPU loops that run here.");
}
