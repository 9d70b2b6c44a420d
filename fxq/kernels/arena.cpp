#include "arena.h"

#include <algorithm>

namespace fxq {

void* Arena::take(int64_t bytes) {
  const int64_t lines = bytes / int64_t(sizeof(Line)) + 1;
  Held held = {0, 0, nullptr, nullptr};
  auto next = held_.begin();
  for (; next != held_.end() && next->begin < held.begin + lines; ++next) held.begin = next->end;
  held.end = held.begin + lines;
  most_ = std::max(most_, held.end);
  if (held.end > size_) held.own.reset(new Line[lines]);
  Line* const data = held.own ? held.own.get() : memory_.get() + held.begin;
  held.data = data;
  held_.insert(next, std::move(held));
  return data;
}

void Arena::give(const void* data) {
  held_.erase(std::find_if(held_.begin(), held_.end(), [&](const Held& held) { return held.data == data; }));
}

void Arena::settle() {
  if (!held_.empty()) return;
  if (most_ > size_ || most_ < size_ / 4) {
    memory_.reset();
    memory_.reset(new Line[most_]);
    size_ = most_;
  }
  most_ = 0;
}

Arena*& Arena::current() {
  static thread_local Arena* arena = nullptr;
  return arena;
}

}  // namespace fxq
