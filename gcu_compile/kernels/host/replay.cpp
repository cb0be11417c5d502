// Makes a list of calls again that Python once made: kernels of ours and of Inductor's, one after the other.
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <utility>

// 8 bytes a field, in the order of gcu_compile/replay/graph.py.
struct Call {
  void* function;
  int64_t count;
  const int64_t* arguments;  // `count` integers and pointers
  int64_t returns_status;    // whether it returns an int32_t, which is to be 0
};

struct Patch {  // *at = values[value] + offset
  int64_t* at;
  int64_t value, offset;
};

struct Graph {
  const Call* calls;
  const Patch* patches;
  int64_t patch_count;
  const int64_t* values;
  char* error;  // what an exception said, if one came
  int64_t error_size;
};

namespace {

constexpr size_t MOST = 32;  // arguments; MOST_ARGUMENTS in capture.py

// Pointers and 64-bit integers are passed alike, in registers and on the stack.
template <size_t... I>
int32_t call(const Call& c, std::index_sequence<I...>) {
  auto number = [&](size_t i) { return c.arguments[i]; };
  if (c.returns_status) return reinterpret_cast<int32_t (*)(decltype(int64_t(I))...)>(c.function)(number(I)...);
  reinterpret_cast<void (*)(decltype(int64_t(I))...)>(c.function)(number(I)...);
  return 0;
}

template <size_t COUNT>
int32_t call_with(const Call& c) {
  return call(c, std::make_index_sequence<COUNT>());
}

template <size_t... COUNT>
int32_t dispatch(const Call& c, std::index_sequence<COUNT...>) {
  static constexpr int32_t (*BY_COUNT[])(const Call&) = {call_with<COUNT>...};
  return BY_COUNT[c.count](c);
}

void say(const Graph* graph, const char* what) {
  std::strncpy(graph->error, what, graph->error_size - 1);
  graph->error[graph->error_size - 1] = 0;
}

}  // namespace

// Makes calls [first, end); before the first of all, writes what changes from run to run. Returns 0, or the number, from 1,
// of the call that refused its arguments or threw; none after it was made.
extern "C" int32_t gcu_replay(const Graph* graph, int32_t first, int32_t end) {
  graph->error[0] = 0;
  for (int64_t i = 0; first == 0 && i < graph->patch_count; ++i) {
    const Patch& patch = graph->patches[i];
    *patch.at = graph->values[patch.value] + patch.offset;
  }
  for (int32_t i = first; i < end; ++i) {
    try {
      if (dispatch(graph->calls[i], std::make_index_sequence<MOST + 1>())) return i + 1;
    } catch (const std::exception& error) {
      say(graph, error.what());
      return i + 1;
    } catch (...) {
      say(graph, "an exception of no known kind");
      return i + 1;
    }
  }
  return 0;
}
