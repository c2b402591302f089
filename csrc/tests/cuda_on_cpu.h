// A small CUDA for tests on machines without a GPU: runs a block's threads as fibers on one processor thread, block
// after block. A kernel compiled as host C++ against this header computes what it would on the device, bit for bit but
// for the approximate functions, which are given errors as large as the device's may be.
//
// It also finds what a device would hang on or get silently wrong:
//   barriers     a barrier that not all threads of the block (or lanes of the warp) reach fails with a message
//   bounds       writes just outside the shared memory fail; reading what was never written gives NaN
//   races        threads run in the order of their index and asynchronous copies arrive at once, or they run backwards
//                and copies arrive when they are waited for (`reverse_order`): a kernel without races gives the same
//                bits in both
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__

struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
// Of the thread that runs.
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 256 * 1024, kGuard = 4096;
constexpr unsigned char kUnwritten = 0xff;  // as floats: NaN

inline bool reverse_order = false;  // set by the environment variable CUDA_ON_CPU_REVERSE_ORDER

enum class Wait { nothing, block, warp, finished };

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf where;
  bool started = false;
  Wait wait = Wait::nothing;
  const char* site = "";  // the collective function it waits in
  int exchanges = 0;
  std::vector<std::function<void()>> copies;
};

struct WarpSlots {
  alignas(16) unsigned char lane[2][kWarp][32];  // of even and odd exchanges, so that one barrier for each is enough
};

// The one block that runs.
class Block {
 public:
  void run(const std::function<void()>& body, unsigned threads, std::size_t shared_bytes) {
    body_ = &body;
    while (fibers_.size() < threads) fibers_.emplace_back(new Fiber);
    threads_ = threads;
    slots_.resize((threads + kWarp - 1) / kWarp);
    memory_.assign(shared_bytes + 2 * kGuard + 16, kUnwritten);
    shared_ = reinterpret_cast<unsigned char*>((reinterpret_cast<std::uintptr_t>(memory_.data()) + kGuard + 15) & ~15);
    for (unsigned i = 0; i < threads; ++i) prepare(*fibers_[i]);
    failure_ = nullptr;
    while (step()) release();
    for (const unsigned char* p = memory_.data(); p != memory_.data() + memory_.size(); ++p) {
      const bool inside = p >= shared_ && p < shared_ + shared_bytes;
      if (!inside && *p != kUnwritten) throw std::runtime_error("a kernel wrote outside its shared memory");
    }
  }

  void wait(Wait kind, const char* site) {
    Fiber& fiber = *fibers_[current_];
    fiber.wait = kind;
    fiber.site = site;
    if (_setjmp(fiber.where) == 0) _longjmp(scheduler_, 1);
  }

  // Every lane gives a value; the result is the values of all lanes, 32 bytes each, until the lane's next but one
  // exchange.
  const unsigned char (*exchange(const void* value, std::size_t size, const char* site))[32] {
    const unsigned warp = current_ / kWarp, lane = current_ % kWarp;
    auto& slots = slots_[warp].lane[fibers_[current_]->exchanges++ % 2];
    std::memcpy(slots[lane], value, size);
    wait(Wait::warp, site);
    return slots;
  }

  void copy_async(std::function<void()> copy) {
    if (reverse_order) {
      fibers_[current_]->copies.push_back(std::move(copy));
    } else {
      copy();
    }
  }
  void wait_for_copies() {
    for (const auto& copy : fibers_[current_]->copies) copy();
    fibers_[current_]->copies.clear();
  }

  void fail(const char* message) {
    failure_ = message;
    wait(Wait::finished, "a failure");
  }

  unsigned lane() const { return current_ % kWarp; }
  unsigned char* shared() const { return shared_; }

 private:
  static void enter();

  void prepare(Fiber& fiber) {
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, enter, 0);
    fiber.started = false;
    fiber.wait = Wait::nothing;
    fiber.exchanges = 0;
    fiber.copies.clear();
  }

  // Runs every thread that waits for nothing until it waits or ends. False once all have ended.
  bool step() {
    bool any = false;
    for (unsigned i = 0; i < threads_; ++i) {
      current_ = reverse_order ? threads_ - 1 - i : i;
      if (fibers_[current_]->wait == Wait::nothing) resume();
      if (failure_ != nullptr) throw std::runtime_error(failure_);
    }
    for (unsigned i = 0; i < threads_; ++i) any |= fibers_[i]->wait != Wait::finished;
    return any;
  }

  void resume() {
    Fiber& fiber = *fibers_[current_];
    threadIdx.x = current_;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.started) _longjmp(fiber.where, 1);
    fiber.started = true;
    setcontext(&fiber.start);
  }

  // Lets a warp go on whose lanes have all arrived at one place, and the block likewise.
  void release() {
    bool progress = false;
    for (unsigned first = 0; first < threads_; first += kWarp) {
      if (same(first, std::min(first + kWarp, threads_), Wait::warp)) progress = true;
    }
    if (same(0, threads_, Wait::block)) progress = true;
    if (progress) return;
    std::string where;
    for (unsigned i = 0; i < threads_; i += kWarp) where.append(" ").append(fibers_[i]->site);
    throw std::runtime_error("a kernel's threads wait for each other in different places; the first of each warp in" +
                             where);
  }
  bool same(unsigned begin, unsigned end, Wait kind) {
    for (unsigned i = begin; i < end; ++i) {
      if (fibers_[i]->wait != kind || std::strcmp(fibers_[i]->site, fibers_[begin]->site) != 0) return false;
    }
    for (unsigned i = begin; i < end; ++i) fibers_[i]->wait = Wait::nothing;
    return true;
  }

  const std::function<void()>* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<WarpSlots> slots_;
  std::vector<unsigned char> memory_;
  unsigned char* shared_ = nullptr;
  unsigned threads_ = 0, current_ = 0;
  const char* failure_ = nullptr;
  jmp_buf scheduler_;
};
inline Block block;

inline void Block::enter() {
  (*block.body_)();
  block.wait(Wait::finished, "the end");
}

inline void check(bool condition) {
  if (!condition) block.fail("a kernel's check failed");
}

template <class... Parameters>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, std::size_t shared_bytes,
            const Parameters&... parameters) {
  reverse_order = std::getenv("CUDA_ON_CPU_REVERSE_ORDER") != nullptr;
  gridDim = grid;
  blockDim = {threads, 1, 1};
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      block.run([&] { kernel(parameters...); }, threads, shared_bytes);
    }
  }
}

// A relative error of at most `bound`, always the same for the same value.
inline float with_error(float value, float bound) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits ^ (bits >> 15)) * 0x2c1b3c6du;
  bits = (bits ^ (bits >> 12)) * 0x297a2d39u;
  return static_cast<float>(value * (1.0 + bound * (static_cast<double>(bits) / 2147483648.0 - 1.0)));
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::block.wait(cuda_on_cpu::Wait::block, "__syncthreads"); }
inline void __syncwarp() { cuda_on_cpu::block.wait(cuda_on_cpu::Wait::warp, "__syncwarp"); }
