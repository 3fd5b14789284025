#include "common/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace npeff {
namespace {

struct Job {
  int64_t n;
  const std::function<void(int64_t)>* body;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;  // guarded by Pool::mutex_

  void run(std::mutex& mutex) {
    try {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) (*body)(i);
    } catch (...) {
      next.store(n, std::memory_order_relaxed);
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  }
};

class Pool {
 public:
  // False when the pool is busy with another call.
  bool run(Job& job, int helpers) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      try {
        for (; size_ < helpers; ++size_) std::thread([this] { work(); }).detach();
      } catch (const std::system_error&) {
        helpers = size_;  // the system gives no more: the work takes longer
      }
      job_ = &job;
      tickets_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.run(mutex_);
    std::unique_lock<std::mutex> lock(mutex_);
    tickets_ = 0;  // helpers that did not wake up in time are not waited for
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return tickets_ > 0; });
      --tickets_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->run(mutex_);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int size_ = 0, tickets_ = 0, active_ = 0;
};

// Never destroyed: its threads outlive static destructors. A forked child has none of them, and makes a new pool.
Pool* pool = nullptr;

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& body) {
  const int helpers = static_cast<int>(n < threads ? n : threads) - 1;
  Job job;
  job.n = n;
  job.body = &body;
  if (helpers <= 0 || !the_pool().run(job, helpers)) {
    for (int64_t i = 0; i < n; ++i) body(i);
    return;
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace npeff
