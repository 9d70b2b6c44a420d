#include "pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace fxq {
namespace {

void rest() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::this_thread::yield();
#endif
}

class Pool {
 public:
  // Before several pieces of work: on `threads` threads, which do not sleep until `end`. False where others are at it.
  bool begin(int64_t threads) {
    if (taken_.exchange(true)) return false;
    threads_ = std::min(threads, kMost);
    try {
      for (; workers_ < threads_ - 1; ++workers_) std::thread(&Pool::work, this, workers_ + 1).detach();
    } catch (...) {
      taken_ = false;
      throw;
    }
    if (asleep_) {
      { const std::lock_guard<std::mutex> lock(mutex_); }
      awake_.notify_all();
    }
    return true;
  }
  void end() { taken_ = false; }

  // Every thread begins with a share of its own, whose neighbours it has had in its caches since the last operation, and
  // then helps the others.
  void share_out(int64_t parts, void (*run)(const void*, int64_t), const void* f) {
    const int64_t threads = threads_;
    run_ = run;
    f_ = f;
    done_ = 0;
    ++number_;
    for (int64_t i = 0; i < threads; ++i)
      shares_[i].next = uint64_t(number_) << 32 | uint64_t((i + 1) * parts / threads) << 16 | uint64_t(i * parts / threads);
    while (take(0)) {
    }
    for (int waited = 0; done_.load(std::memory_order_acquire) < parts; ++waited)
      if (waited < 2000)
        rest();
      else
        std::this_thread::yield();  // to a worker that the system has put behind this thread
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  // The parts that a thread begins with: the number of the work << 32 | the end << 16 | the next one. The number keeps
  // who comes late from taking what is not there any more.
  struct alignas(64) Share {
    std::atomic<uint64_t> next{0};
  };
  static bool is_left(uint64_t next) { return (next & 0xFFFF) < (next >> 16 & 0xFFFF); }

  // Whether there was a part to do for thread `index`, its own or another's.
  bool take(int64_t index) {
    const int64_t threads = threads_;
    for (int64_t i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& next = shares_[(index + i) % threads].next;
      uint64_t seen = next.load(std::memory_order_acquire);
      while (is_left(seen))
        if (next.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
          run(int64_t(seen & 0xFFFF));
          return true;
        }
    }
    return false;
  }

  void run(int64_t part) {
    try {
      run_(f_, part);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      error_ = std::current_exception();
    }
    done_.fetch_add(1, std::memory_order_release);
  }

  bool is_wanted(int64_t index) const { return taken_ && index < threads_; }

  void work(int64_t index) {
    using Clock = std::chrono::steady_clock;
    for (Clock::time_point since = Clock::now();;) {
      if (is_wanted(index)) {
        if (!take(index)) rest();
        since = Clock::now();
      } else if (Clock::now() - since < kSpin) {
        rest();
      } else {
        std::unique_lock<std::mutex> lock(mutex_);
        ++asleep_;
        awake_.wait(lock, [&] { return is_wanted(index); });
        --asleep_;
      }
    }
  }

  static constexpr std::chrono::milliseconds kSpin{1};  // until the next call, perhaps

  static constexpr int64_t kMost = 256;  // threads

  Share shares_[kMost];
  std::atomic<int64_t> done_{0}, threads_{0};
  uint32_t number_ = 0;
  int64_t workers_ = 0;
  void (*run_)(const void*, int64_t) = nullptr;
  const void* f_ = nullptr;
  std::exception_ptr error_;
  std::mutex mutex_;
  std::condition_variable awake_;
  std::atomic<int> asleep_{0};
  std::atomic<bool> taken_{false};  // between `begin` and `end`
};

// Never destroyed: its threads run until the process ends. A child process has none of them, and begins a new one.
Pool* pool = new Pool;
thread_local Pool* own = nullptr;
#if defined(__unix__) || defined(__APPLE__)
const int forgotten = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  own = nullptr;
});
#endif

}  // namespace

Together::Together(int64_t threads) : own_(threads > 1 && !own && pool->begin(threads)) {
  if (own_) own = pool;
}

Together::~Together() {
  if (!own_) return;
  own->end();
  own = nullptr;
}

bool has_pool() { return own; }

void share_out(int64_t parts, void (*run)(const void*, int64_t), const void* f) {
  own->share_out(parts, run, f);
}

}  // namespace fxq
