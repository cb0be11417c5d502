// One team of threads for the products of one matrix, or of many (experts).
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "../simd.h"

namespace {

// The product of some rows and one matrix.
struct Job {
  virtual ~Job() = default;
  virtual int64_t rows() const = 0;
  virtual int64_t tasks() const = 0;  // parts of the result, each made by one thread
  virtual int64_t weights_cost() const { return 8; }  // reading the weights of a task takes as long as so many rows
  virtual void lay_out(int64_t row, int64_t end) = 0;
  virtual void work(int64_t task, int64_t end) const = 0;
};

typedef std::vector<std::unique_ptr<Job>> Jobs;

// How many parts of its share of much work a thread takes one by one, so that another can help it: cores are not equally
// fast for long, least of all those of a virtual machine.
constexpr int64_t MOST_PARTS = 8, LEAST_COST = 2048;

// A thread has neighbouring tasks, so that its stream of weights goes on from one to the next; and when it has done its
// share, what others have not begun of theirs.
inline void run(const Jobs& jobs, int threads) {
  auto cost = [](const Job& job) { return job.rows() + job.weights_cost(); };
  int64_t total = 0;
  for (auto& job : jobs) total += job->tasks() * cost(*job);
  int64_t parts = std::clamp<int64_t>(total / threads / LEAST_COST, 1, MOST_PARTS);
  struct alignas(64) Share {
    std::atomic<int64_t> begun{0};
  };
  std::vector<Share> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
    for (auto& job : jobs) {
      int64_t row = job->rows() * thread / count, end = job->rows() * (thread + 1) / count;
      if (row < end) job->lay_out(row, end);
    }
#pragma omp barrier
    auto work = [&](int64_t part) {  // of parts * count
      int64_t start = 0;
      for (auto& job : jobs) {
        auto task = [&](int64_t part) {  // the first task that lies behind so many parts
          int64_t each = cost(*job), before = total * part / (parts * count) - start;
          return std::clamp<int64_t>((before + each - 1) / each, 0, job->tasks());
        };
        if (int64_t first = task(part), end = task(part + 1); first < end) job->work(first, end);
        start += job->tasks() * cost(*job);
      }
    };
    for (int64_t other = 0; other < count; ++other) {
      int64_t owner = (thread + other) % count;
      for (int64_t part; (part = shares[owner].begun++) < parts;) work(owner * parts + part);
    }
  }
}

// Products of one matrix for each expert. Field order is that of `GROUPED` in host/dequant_gemm.py and int8_gemm.py.
template <class Arguments>
struct Grouped {
  Arguments all;           // of the first expert, with the rows of all
  const int64_t* offsets;  // [experts + 1]: expert e has the rows [offsets[e], offsets[e + 1])
  int64_t experts;
};

// make(expert, its first row, the number of its rows), for every expert that has rows.
template <class Arguments, class Make>
inline void run(const Grouped<Arguments>& in, Make make) {
  Jobs jobs;
  for (int64_t e = 0; e < in.experts; ++e)
    if (int64_t first = in.offsets[e], rows = in.offsets[e + 1] - first; rows > 0) jobs.push_back(make(e, first, rows));
  run(jobs, in.all.threads);
}

// p += elements, of an array of any dtype; null stays null.
template <class T>
inline void advance(T*& p, int64_t elements, int32_t dtype) {
  if (p) p = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(p) + elements * size_of(dtype));
}

}  // namespace
