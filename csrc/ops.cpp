// The operators' schemas and CPU kernels. Importing the pybind11 module `fcrn_fused._C` registers
// them.
#include <pybind11/pybind11.h>

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

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The operators of fcrn_fused and their CPU kernels.";
  module.attr("compiler") = __VERSION__;
  module.def("instruction_set", &fcrn::cpu::instruction_set, "The CPU loops that run here.");
}
