// One team of threads for the products of one matrix, or of many (experts).
#pragma once

#include <omp.h>

#include <algorithm>
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

// A thread has neighbouring tasks, so that its stream of weights goes on from one to the next.
inline void run(const Jobs& jobs, int threads) {
  auto cost = [](const Job& job) { return job.rows() + job.weights_cost(); };
  int64_t total = 0;
  for (auto& job : jobs) total += job->tasks() * cost(*job);
#pragma omp parallel num_threads(threads)
  {
    int64_t thread = omp_get_thread_num(), count = omp_get_num_threads(), start = 0;
    for (auto& job : jobs) {
      int64_t row = job->rows() * thread / count, end = job->rows() * (thread + 1) / count;
      if (row < end) job->lay_out(row, end);
    }
#pragma omp barrier
    for (auto& job : jobs) {
      auto task = [&](int64_t share) {  // the first task that lies behind `share` of the work
        int64_t each = cost(*job), before = total * share / count - start;
        return std::clamp<int64_t>((before + each - 1) / each, 0, job->tasks());
      };
      if (int64_t first = task(thread), end = task(thread + 1); first < end) job->work(first, end);
      start += job->tasks() * cost(*job);
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
