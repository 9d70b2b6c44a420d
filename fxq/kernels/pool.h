// Threads for a run of operations that follow one another closely.
//
// torch's own share out an operation in equal parts and wait until every thread has come and gone. Where another process
// has one of the cores, they wait for whole time slices, once for each operation. Here a thread takes one part after the
// other as long as there are any, and who waits, waits only for parts that somebody works on.
#pragma once
#include <cstdint>

namespace fxq {

// While it lives, `parallel` (checks.h) on this thread shares out among `threads` threads of the pool, which stay awake;
// where another thread has the pool, among torch's.
class Together {
 public:
  explicit Together(int64_t threads);
  ~Together();

 private:
  bool own_;
};

// Whether this thread has the pool; then run(f, part) for all parts in [0, parts), which are fewer than 65536.
bool has_pool();
void share_out(int64_t parts, void (*run)(const void* f, int64_t part), const void* f);

}  // namespace fxq
