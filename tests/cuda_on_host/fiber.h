// A fiber: a function with a stack of its own that can stop in the middle and go on later.
//
// One CUDA thread is one fiber. An operating-system thread for each would cost 160 times as much (a
// kernel of 100 blocks of 256 threads makes 25,600 of them), would add races of the harness's own,
// and would leave the order of threads to chance; here the order is chosen, and a run can be
// repeated.
//
// Only two contexts are ever involved: the scheduler, which resumes a fiber, and that fiber, which
// suspends itself back to the scheduler.
#ifndef TESTS_CUDA_ON_HOST_FIBER_H_
#define TESTS_CUDA_ON_HOST_FIBER_H_

#include <cstddef>
#include <functional>

namespace cuda_on_host {

struct FiberContext;

class Fiber {
 public:
  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The function is entered at the next resume(), on this fiber's stack. Its predecessor must have
  // ended.
  void start(const std::function<void()>* function);
  // Runs the fiber until it suspends or ends. Called from the scheduler only.
  void resume();
  // Goes back to the scheduler. Called from within a fiber only.
  static void suspend();

  bool ended() const { return ended_; }

 private:
  static void enter();
  void* stack_ = nullptr;  // lowest usable address; the page beneath it is not mapped
  FiberContext* context_ = nullptr;
  const std::function<void()>* function_ = nullptr;
  bool ended_ = true;
};

}  // namespace cuda_on_host

#endif  // TESTS_CUDA_ON_HOST_FIBER_H_
