// Operators that a program (ops_images.cpp) may call, and how they find their arguments in its text.
#pragma once
#include <cstdlib>
#include <string>
#include <unordered_map>
#include <vector>

#include "checks.h"

namespace fxq {

// The arguments of one call, as words: 3, 0.5, True, None, '3x3 stride 2', [1 1], v3 (a value), c4 (a constant).
class Arguments {
 public:
  Arguments(const std::vector<Tensor>& values, const std::vector<Tensor>& constants)
      : values_(values), constants_(constants) {}
  // The words of one line up to its end, which is returned.
  const char* read(const char* line);
  std::size_t size() const { return words_.size(); }
  template <class T>
  decltype(auto) get(std::size_t i) const {
    return of(Type<T>(), words_[i]);
  }
  // The values that no later call reads: a dot ends such a word.
  template <class Function>
  void for_each_last(const Function& f) const;

 private:
  template <class T>
  struct Type {};

  const char* skip(const char* word) const;  // to where the word ends
  int64_t number(const char* word) const;
  const Tensor& of(Type<const Tensor&>, const char* word) const;
  Tensor of(Type<Tensor>, const char* word) const { return of(Type<const Tensor&>(), word).alias(); }
  int64_t of(Type<int64_t>, const char* word) const { return number(word); }
  double of(Type<double>, const char* word) const { return std::strtod(word, nullptr); }
  bool of(Type<bool>, const char* word) const { return *word == 'T'; }
  std::string of(Type<std::string>, const char* word) const;
  template <class T>
  T of(Type<const T&>, const char* word) const {
    return of(Type<T>(), word);
  }
  template <class T>
  std::optional<T> of(Type<std::optional<T>>, const char* word) const {
    if (*word == 'N') return {};
    return of(Type<T>(), word);
  }
  template <class T>
  std::vector<T> of(Type<std::vector<T>>, const char* word) const {
    if (*word != '[') fail("qimages: a word of the program is no list");
    std::vector<T> list;
    for (++word; *word && *word != ']'; word = skip(word), word += *word == ' ') list.push_back(of(Type<T>(), word));
    return list;
  }

  const std::vector<Tensor>&values_, &constants_;
  std::vector<const char*> words_;
};

using Call = Tensor (*)(const Arguments&);

// Operators by name.
std::unordered_map<std::string, Call>& calls();

template <class... A, std::size_t... I>
Tensor call_with(Tensor (*function)(A...), const Arguments& arguments, std::index_sequence<I...>) {
  if (arguments.size() != sizeof...(A)) fail("qimages: ", arguments.size(), " arguments, expected ", sizeof...(A));
  return function(arguments.get<A>(I)...);
}
template <class... A>
Tensor call_with(Tensor (*function)(A...), const Arguments& arguments) {
  return call_with(function, arguments, std::index_sequence_for<A...>());
}

// `function` for programs.
template <auto function>
Tensor call_in_program(const Arguments& arguments) {
  return call_with(function, arguments);
}

// `function` as an operator of torch, and for programs.
template <auto function, class Library>
void serve(Library& library, const char* name) {
  library.impl(name, boxed<function>);
  calls()[name] = call_in_program<function>;
}

}  // namespace fxq
