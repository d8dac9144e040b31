// Runs one pass of the loss, described in a file, by the CUDA kernels on the host: `run_pass IN
// OUT`. passes.py writes the description and reads the results.
//
// The description is lines of text, then the bytes of all pieces in the order of their lines:
//
//   grid BATCH MAPS IMAGES CELLS SIZE...          the sizes of the grid's spatial dimensions
//   rule OUTPUT DIVISOR WRT_TARGET GRAD_IS_FOR_ONE POSITIVE_WEIGHT IGNORE_VALUE   (nan: none is)
//   kinds YES                                     no: every map is one of poses
//   weight_repeat CELLS                           so many of the last dimension have one weight
//   negative_weight NUMBER
//   coord_weights NUMBER...
//   machine BLOCKS                                so many can run at once
//   wide_index YES                                offsets of 64 bits, though 32 would do
//   buffer NAME DTYPE ELEMENTS MISALIGNED_BY READ WRITTEN
//   piece NAME BEGIN SIZE                         bytes of a buffer that are given in the data
//   view NAME IMAGE_STRIDE MAP_STRIDE CELL_STRIDE...
//   never_read NAME BEGIN END                     bytes of a buffer that no thread may read
//   schedule ORDER SEED RESIDENT_BLOCKS           one run for each such line
//   data
//
// Each run prints the kernel that was chosen and its number of blocks. The results are, for each
// run, the bytes of each written buffer in the order of their lines; of a large one, those of its
// pieces.
#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <fstream>
#include <iostream>

#include "cuda_runtime.h"
// The kernels take the names of CUDA for granted.
#include "cuda/fcrn_loss_kernels.cuh"
#include "pass_file.h"
#include "race_check.h"

namespace {

std::string name_of(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr) return "?";
  char* demangled = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, nullptr);
  const std::string name = demangled ? demangled : info.dli_sname;
  std::free(demangled);
  return name;
}

void run(const Description& description, const cuda_on_host::Schedule& schedule) {
  const fcrn::LossPass& pass = description.pass;
  const auto launch = [&](auto kernel, int64_t threads) {
    const unsigned blocks = fcrn::cuda::num_blocks(threads, description.resident_blocks);
    std::cout << name_of(reinterpret_cast<const void*>(kernel)) << " in " << blocks << " blocks\n";
    // Exactly as much as the launch is given on a GPU, and filled with what it may hold there: a
    // ticket that was cleared. A pass without sums is given nothing.
    unsigned ticket = 0;
    const std::size_t bytes = blocks * sizeof(fcrn::Sums);
    auto* block_sums = static_cast<fcrn::Sums*>(std::malloc(bytes));
    std::memset(static_cast<void*>(block_sums), kPoison, bytes);
    fcrn::cuda::Workspace workspace;
    if (pass.wants_sums()) workspace = {block_sums, &ticket};
    cuda_on_host::race_check::watch_global(block_sums, bytes, "block_sums");
    cuda_on_host::race_check::watch_global(&ticket, sizeof(ticket), "ticket");
    cuda_on_host::launch({blocks, 1, 1}, {fcrn::cuda::kThreads, 1, 1}, schedule,
                         [&] { kernel(pass, workspace); });
    cuda_on_host::race_check::forget_global(&ticket);
    cuda_on_host::race_check::forget_global(block_sums);
    std::free(block_sums);
    if (ticket != (pass.wants_sums() ? blocks : 0)) {
      refuse(std::to_string(blocks) + " blocks drew " + std::to_string(ticket) + " tickets");
    }
  };
  fcrn::cuda::run_pass(pass, launch, description.wide_index);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) refuse("run_pass IN OUT");
  Description description = read_description(argv[1]);
  for (Buffer& buffer : description.buffers) buffer.fill();
  for (const Description::Forbidden& part : description.never_read)
    part.buffer->forbid(part.begin, part.end);
  std::ofstream results(argv[2], std::ios::binary);
  for (const cuda_on_host::Schedule& schedule : description.schedules) {
    for (Buffer& buffer : description.buffers) {
      if (buffer.written) buffer.fill();
    }
    run(description, schedule);
    for (const Buffer& buffer : description.buffers) {
      if (buffer.written) buffer.write_to(results);
    }
  }
  return results.flush() ? 0 : 2;
}
