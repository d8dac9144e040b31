// The operators' schemas and CPU kernels, registered when Python imports `fcrn_fused._C`.
#include <pybind11/pybind11.h>

#include "cpu/fcrn_loss_cpu.h"
#include "loss_op.h"

namespace {

struct Cpu {
  static void run(const fcrn::LossPass& pass, const fcrn::Tensor&, const fcrn::OptionalTensor&) {
    fcrn::cpu::run(pass);
  }
};

void sum_into(const fcrn::Tensor& weight, int64_t repeats, const fcrn::Tensor& sum,
              const fcrn::OptionalTensor&) {
  auto* to = fcrn::sum_of_weights(weight, sum);
  const auto dtype = fcrn::dtype_of(weight, "weight", fcrn::Elements::floating_or_bool);
  const double total = fcrn::cpu::weight_sum(weight.const_data_ptr(), dtype, weight.numel());
  *to = fcrn::divisor_of_mean(total, repeats);
}

}  // namespace

STABLE_TORCH_LIBRARY(fcrn_fused, library) {
  library.def(FCRN_FORWARD_INTO_SCHEMA);
  library.def(FCRN_BACKWARD_INTO_SCHEMA);
  library.def(FCRN_SUM_INTO_SCHEMA);
}

STABLE_TORCH_LIBRARY_IMPL(fcrn_fused, CPU, library) {
  library.impl("forward_into", TORCH_BOX(&fcrn::forward_into<Cpu>));
  library.impl("backward_into", TORCH_BOX(&fcrn::backward_into<Cpu>));
  library.impl("sum_into", TORCH_BOX(&sum_into));
}

PYBIND11_MODULE(_C, module, pybind11::mod_gil_not_used()) {
  module.doc() = "The operators of fcrn_fused and their CPU kernels.";
  module.attr("compiler") = __VERSION__;
  module.def("instruction_set", &fcrn::cpu::instruction_set,
             "The instruction set of the CPU loops that run here.");
}
