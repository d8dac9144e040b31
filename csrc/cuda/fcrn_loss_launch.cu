#include <array>
#include <map>
#include <mutex>

#include "fcrn_loss_kernels.cuh"
#include "fcrn_loss_launch.h"

namespace fcrn::cuda {
namespace {

// Tickets for the launches in flight, zeroed when the module is loaded; every launch leaves the one
// it used zero again, so none is ever cleared. Two launches that can run at the same time must not
// have the same: a stream has one of its own, and so has every captured launch, since a graph may
// be replayed anywhere, at any time.
constexpr unsigned kTickets = 1u << 16;
__device__ unsigned tickets[kTickets];

// Number of the ticket for a launch on this stream; kTickets when there are no more.
unsigned ticket_number(int device, cudaStream_t stream) {
  static std::mutex mutex;
  static std::map<int, unsigned> next_of_device;
  static std::map<std::pair<int, unsigned long long>, unsigned> of_stream;
  cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
  if (cudaStreamIsCapturing(stream, &capturing) != cudaSuccess) cudaGetLastError();
  unsigned long long stream_id = 0;  // never used twice, as a stream's handle may be
  if (capturing == cudaStreamCaptureStatusNone) cudaStreamGetId(stream, &stream_id);
  const std::lock_guard<std::mutex> lock(mutex);
  unsigned& next = next_of_device[device];
  if (capturing != cudaStreamCaptureStatusNone) return next < kTickets ? next++ : kTickets;
  const auto [entry, is_new] = of_stream.try_emplace({device, stream_id}, kTickets);
  if (entry->second == kTickets && next < kTickets) entry->second = next++;
  return entry->second;
}

cudaError_t ticket_of(int device, cudaStream_t stream, unsigned** ticket) {
  const unsigned number = ticket_number(device, stream);
  if (number == kTickets) return cudaErrorMemoryAllocation;
  void* address = nullptr;
  const cudaError_t error = cudaGetSymbolAddress(&address, tickets);
  *ticket = static_cast<unsigned*>(address) + number;
  return error;
}

int num_multiprocessors(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  int& number = known[device];
  if (number == 0) cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
  return number;
}

constexpr int kNumbersAtOnce = 64;
struct Numbers {
  double values[kNumbersAtOnce];
};

__global__ void numbers_kernel(double* to, const __grid_constant__ Numbers numbers, int count) {
  if (threadIdx.x < count) to[threadIdx.x] = numbers.values[threadIdx.x];
}

}  // namespace

cudaError_t launch_pass(const LossPass& pass, int device, cudaStream_t stream,
                        WorkspaceSource& source) {
  cudaError_t error = cudaSuccess;
  run_pass(pass, num_multiprocessors(device), [&](auto kernel, unsigned blocks) {
    Workspace workspace;
    if (pass.wants_sums || pass.errors) {
      workspace.block_sums = source.block_sums(blocks);
      error = ticket_of(device, stream, &workspace.ticket);
      if (error != cudaSuccess) return;
    }
    kernel<<<blocks, kThreads, 0, stream>>>(pass, workspace);
    error = cudaGetLastError();
  });
  return error;
}

cudaError_t write_numbers(double* to, const double* numbers, int64_t count, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kNumbersAtOnce) {
    Numbers some = {};
    const int now =
        static_cast<int>(count - first < kNumbersAtOnce ? count - first : kNumbersAtOnce);
    for (int i = 0; i < now; ++i) some.values[i] = numbers[first + i];
    numbers_kernel<<<1, kNumbersAtOnce, 0, stream>>>(to + first, some, now);
  }
  return cudaGetLastError();
}

cudaError_t check_device() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, numbers_kernel);
  cudaGetLastError();  // it is reported, not left behind for the next call
  return error;
}

}  // namespace fcrn::cuda
