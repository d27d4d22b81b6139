// Switching between fibres: stacks that take turns on one operating system thread.
//
// A kernel of 1024 threads that meet at every simd_sum switches millions of times. Assembly does
// it in nanoseconds; ucontext makes a system call each time, and serves every other CPU
// (and any with -DMSL_USE_UCONTEXT).
#pragma once
#include <cstddef>
#include <cstring>

// AddressSanitizer must be told of every switch, or it takes a fibre's stack for an overflow.
#ifdef MSL_ASAN
// Of <sanitizer/common_interface_defs.h>, which not every compiler package has.
extern "C" {
void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_bottom, size_t* old_bytes);
}
#endif

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(MSL_USE_UCONTEXT)
#define MSL_USE_UCONTEXT 1
#endif

#ifdef MSL_USE_UCONTEXT
#include <ucontext.h>
#else
// Saves the callee-saved registers on the current stack and its pointer in *from, then takes
// those of `to`. The asm label keeps one symbol name on ELF and Mach-O, which prefixes a "_".
void msl_switch(void** from, void* to) asm("msl_switch");
#endif

#if !defined(MSL_USE_UCONTEXT) && defined(__x86_64__)
asm(R"(
.text
.globl msl_switch
msl_switch:
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
)");
#elif !defined(MSL_USE_UCONTEXT) && defined(__aarch64__)
// AAPCS64: x19-x28, the frame pointer x29, the return address x30, the low halves of v8-v15.
asm(R"(
.text
.p2align 2
.globl msl_switch
msl_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
#endif

class Fibre {
 public:
  // A fibre that will run entry() on the given stack. entry must end with leave(true).
  void start(char* stack, size_t bytes, void (*entry)()) {
    stack_ = stack;
    bytes_ = bytes;
#ifdef MSL_USE_UCONTEXT
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack;
    own_.uc_stack.ss_size = bytes;
    own_.uc_link = nullptr;
    makecontext(&own_, entry, 0);
#elif defined(__x86_64__)
    // Six registers, the address that `ret` takes, and a null return address for entry itself:
    // a function starts with its stack 8 bytes off a multiple of 16.
    void** top = reinterpret_cast<void**>(stack + bytes) - 1;
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    own_ = memset(top - 6, 0, 6 * sizeof(void*));
#else
    void** frame = reinterpret_cast<void**>(stack + bytes - 160);
    memset(frame, 0, 160);
    frame[11] = reinterpret_cast<void*>(entry);  // x30
    own_ = frame;
#endif
  }

  // From the scheduler: run the fibre until it leaves.
  void enter() {
#ifdef MSL_ASAN
    void* fake_stack;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, bytes_);
#endif
#ifdef MSL_USE_UCONTEXT
    swapcontext(&scheduler_, &own_);
#else
    msl_switch(&scheduler_, own_);
#endif
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // From the fibre's entry, first of all.
  static void entered() {
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

  // From the fibre: back to the scheduler, for good if `finished`.
  void leave(bool finished) {
#ifdef MSL_ASAN
    void* fake_stack;
    __sanitizer_start_switch_fiber(finished ? nullptr : &fake_stack, scheduler_stack_,
                                   scheduler_bytes_);
#endif
#ifdef MSL_USE_UCONTEXT
    swapcontext(&own_, &scheduler_);
#else
    msl_switch(&own_, scheduler_);
#endif
#ifdef MSL_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

 private:
#ifdef MSL_USE_UCONTEXT
  using Context = ucontext_t;
#else
  using Context = void*;  // the stack pointer; the registers are on the stack
#endif
  char* stack_ = nullptr;
  size_t bytes_ = 0;
  Context own_;
  static inline Context scheduler_;
  static inline const void* scheduler_stack_ = nullptr;
  static inline size_t scheduler_bytes_ = 0;
};
