#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_ASM_SWITCH 1
#else
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_host {

#ifdef CUDA_ON_HOST_ASM_SWITCH
// swapcontext() saves the signal mask, two system calls a switch; a kernel switches twice a thread
// at each rendez-vous. This saves what the System V ABI makes the callee keep, and nothing else:
// the floating-point modes are never changed here. Elsewhere than on x86-64, and in the build that
// tests it, swapcontext() serves.
extern "C" void cuda_on_host_switch(void** saved_stack_pointer, void* next_stack_pointer);
asm(R"(
.text
.globl cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, .-cuda_on_host_switch
)");

struct FiberContext {
  void* stack_pointer = nullptr;
  static void swap(FiberContext& from, FiberContext& to) {
    cuda_on_host_switch(&from.stack_pointer, to.stack_pointer);
  }
  void prepare(void* stack, std::size_t size, void (*entry)()) {
    // What cuda_on_host_switch pops: six registers, then the address it returns to. A function is
    // entered with the stack pointer 8 bytes below a multiple of 16.
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack) + size - 56);
    *top = nullptr;  // where entry would return to; it never does
    *--top = reinterpret_cast<void*>(entry);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer = top;
  }
};
#else
struct FiberContext {
  ucontext_t context;
  static void swap(FiberContext& from, FiberContext& to) {
    swapcontext(&from.context, &to.context);
  }
  void prepare(void* stack, std::size_t size, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
};
#endif

namespace {

constexpr std::size_t kStackSize = std::size_t{64} << 10;
Fiber* running = nullptr;

// AddressSanitizer keeps a shadow of each stack and must be told of every switch;
// `leaving_for_good` frees what it keeps for a fiber that will not come back.
void* announce_switch(bool leaving_for_good, const void* stack, std::size_t size) {
  void* fake_stack = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(leaving_for_good ? nullptr : &fake_stack, stack, size);
#else
  (void)leaving_for_good, (void)stack, (void)size;
#endif
  return fake_stack;
}

const void* scheduler_stack = nullptr;
std::size_t scheduler_stack_size = 0;

void complete_switch(void* fake_stack, bool in_fiber) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack = nullptr;
  std::size_t size = 0;
  __sanitizer_finish_switch_fiber(fake_stack, &stack, &size);
  if (in_fiber) scheduler_stack = stack, scheduler_stack_size = size;
#else
  (void)fake_stack, (void)in_fiber;
#endif
}

FiberContext& scheduler_context() {
  static FiberContext context;
  return context;
}

}  // namespace

Fiber::Fiber() : context_(new FiberContext) {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapping = mmap(nullptr, page + kStackSize, PROT_NONE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) std::perror("mmap of a fiber's stack"), std::abort();
  stack_ = static_cast<char*>(mapping) + page;
  if (mprotect(stack_, kStackSize, PROT_READ | PROT_WRITE) != 0)
    std::perror("mprotect"), std::abort();
}

Fiber::~Fiber() {
  const std::size_t page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  munmap(static_cast<char*>(stack_) - page, page + kStackSize);
  delete context_;
}

void Fiber::start(const std::function<void()>* function) {
  function_ = function;
  ended_ = false;
#if defined(__SANITIZE_ADDRESS__)
  // The last owner of the stack left the frames that it never returned from poisoned.
  __asan_unpoison_memory_region(stack_, kStackSize);
#endif
  context_->prepare(stack_, kStackSize, &Fiber::enter);
}

void Fiber::resume() {
  running = this;
  void* fake_stack = announce_switch(false, stack_, kStackSize);
  FiberContext::swap(scheduler_context(), *context_);
  complete_switch(fake_stack, false);
}

void Fiber::suspend() {
  void* fake_stack = announce_switch(false, scheduler_stack, scheduler_stack_size);
  FiberContext::swap(*running->context_, scheduler_context());
  complete_switch(fake_stack, true);
}

void Fiber::enter() {
  complete_switch(nullptr, true);
  (*running->function_)();
  running->ended_ = true;
  announce_switch(true, scheduler_stack, scheduler_stack_size);
  FiberContext::swap(*running->context_, scheduler_context());
  std::abort();  // an ended fiber was resumed
}

}  // namespace cuda_on_host
