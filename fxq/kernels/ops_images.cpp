// A run of operations on images as one torch operator: the program that fxq/ops/images.py writes.
#include <algorithm>
#include <cstring>

#include "program.h"

namespace fxq {

std::unordered_map<std::string, Call>& calls() {
  static std::unordered_map<std::string, Call> all;
  return all;
}

namespace {
constexpr const char* kImages = "qimages";
}

const char* Arguments::skip(const char* word) const {
  const char* end = word;
  if (*word == '\'')
    end = std::strchr(word + 1, '\'');
  else if (*word == '[')
    end = std::strchr(word, ']');
  else
    return word + std::strcspn(word, " \n]");
  if (!end) fail(kImages, ": the program is cut off");
  return end + 1;
}

const char* Arguments::read(const char* line) {
  words_.clear();
  while (*line == ' ') {
    words_.push_back(++line);
    line = skip(line);
  }
  if (*line != '\n') fail(kImages, ": the program is cut off");
  return line + 1;
}

int64_t Arguments::number(const char* word) const {
  const bool negative = *word == '-';
  int64_t value = 0;
  word += negative;
  if (*word < '0' || *word > '9') fail(kImages, ": a word of the program is no number");
  for (; *word >= '0' && *word <= '9'; ++word)
    if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *word - '0', &value))
      fail(kImages, ": the program has a number of more than 64 bits");
  return negative ? -value : value;
}

const Tensor& Arguments::of(Type<const Tensor&>, const char* word) const {
  const std::vector<Tensor>& among = *word == 'v' ? values_ : constants_;
  if (*word != 'v' && *word != 'c') fail(kImages, ": a word of the program is no tensor");
  const int64_t i = number(word + 1);
  if (i < 0 || i >= int64_t(among.size()) || !among[i].is_there())
    fail(kImages, ": the program reads tensor ", i, " of ", among.size());
  return among[i];
}

std::string Arguments::of(Type<std::string>, const char* word) const {
  if (*word != '\'') fail(kImages, ": a word of the program is no text");
  return std::string(word + 1, skip(word) - 1);
}

template <class Function>
void Arguments::for_each_last(const Function& f) const {
  for (const char* word : words_)
    for (const char* const end = skip(word); word < end; ++word)
      if (*word == '\'')
        break;
      else if (*word == 'v')
        if (const char* const last = word + 1 + std::strspn(word + 1, "0123456789"); *last == '.') f(number(word + 1));
}

namespace {

// torch.flatten of a value between two others, which it shares no memory with.
Tensor flatten(const Tensor& x, int64_t first, int64_t last) {
  const Shape shape = x.shape();
  if (first < 0) first += shape.dim;
  if (last < 0) last += shape.dim;
  if (first < 0 || last < first || last >= shape.dim) fail("flatten: dimensions ", first, " to ", last, " of ", shape);
  int64_t sizes[Tensor::kMaxDim], dim = 0;
  for (int64_t i = 0; i < shape.dim; ++i) {
    if (i > first && i <= last)
      sizes[dim - 1] *= shape.sizes[i];
    else
      sizes[dim++] = shape.sizes[i];
  }
  const Contiguous from(x);
  Tensor y = Tensor::empty({sizes, dim}, x.dtype());
  const int64_t bytes = x.numel() * (x.dtype() == aoti_torch_dtype_float32() ? 4 : 1);
  if (bytes) std::memcpy(y.data<void>(), from.data<void>(), bytes);
  return y;
}

// Results of operations lie in `arena` while it lives.
class Within {
 public:
  explicit Within(Arena* arena) { Arena::current() = arena; }
  ~Within() { Arena::current() = nullptr; }
};

// First the values that are results, then a line for each operation: its name and its arguments.
std::vector<Tensor> qimages(std::vector<Tensor> values, const std::vector<Tensor>& constants,
                            const std::string& program) {
  static thread_local Arena arena;
  arena.settle();
  const int64_t inputs = values.size();
  Arguments words(values, constants);
  const char* at = words.read(program.c_str());
  std::vector<int64_t> results(words.size());
  for (std::size_t i = 0; i < results.size(); ++i) results[i] = words.get<int64_t>(i);
  values.reserve(values.size() + std::count(program.begin(), program.end(), '\n'));
  std::string name;
  while (*at) {
    const char* const end = at + std::strcspn(at, " \n");
    name.assign(at, end);
    const auto call = calls().find(name);
    if (call == calls().end()) fail(kImages, ": the program calls ", name);
    at = words.read(end);
    const bool is_result = std::count(results.begin(), results.end(), int64_t(values.size()));
    {
      const Within within(is_result ? nullptr : &arena);
      values.push_back(call->second(words));
    }
    words.for_each_last([&](int64_t i) {
      if (i >= int64_t(values.size())) fail(kImages, ": the program gives back value ", i, " of ", values.size());
      values[i] = Tensor(nullptr);
    });
  }
  std::vector<Tensor> found;
  for (const int64_t i : results) {
    if (i < inputs || i >= int64_t(values.size()) || !values[i].is_there())
      fail(kImages, ": the program has no result ", i);
    found.push_back(std::move(values[i]));
  }
  return found;
}

}  // namespace
}  // namespace fxq

STABLE_TORCH_LIBRARY_IMPL(fxq, CPU, m) {
  m.impl("qimages", fxq::boxed<fxq::qimages>);
  fxq::calls()["flatten"] = fxq::call_in_program<fxq::flatten>;
}
