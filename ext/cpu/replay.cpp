// A step's operations once more, by the records of the first time. What comes next is known: the
// threads fetch the beginnings of the next weights while they wait for each other, and the pages of
// the next attention while they multiply many rows; of prompts, they take chunks of rows through
// several projections.
#include <unistd.h>

#include <cstring>

#include "errand.h"
#include "exports.h"
#include "projection.h"

namespace blockllm {
namespace {

// From so many rows on, products leave memory time for pages.
constexpr int64_t kFewestRows = 12;

// How many bytes of pages are fetched ahead: what the last cache keeps beside the weights that pass
// through it meanwhile. Where the system does not say how large it is, as much as most have.
int64_t most_ahead() {
  static const int64_t told = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return (told > 0 ? told : int64_t{16} << 20) / 2;
}

const ProjectCall* projection(const Replayed& replayed) {
  return replayed.operation == Operation::kProject ? static_cast<const ProjectCall*>(replayed.call)
                                                   : nullptr;
}

class Replay {
 public:
  Replay(Pool* pool, const ReplayCall& call) : pool_(pool), call_(call), errand_(pool->threads()) {}

  void run() {
    int64_t project = 0, attend = 0;  // the next ones
    for (int64_t i = 0; i < call_.count; ++i) {
      if (project <= i) {
        project = find(Operation::kProject, i + 1);
        if (project < call_.count) foresee(pool_, *projection(call_.calls[project]));
      }
      if (attend <= i) {
        attend = find(Operation::kAttend, i + 1);
        fetch_pages(i, attend);
      }
      if (const int64_t together = project_from(i)) {
        i += together - 1;
      } else {
        run(call_.calls[i]);
      }
    }
  }

 private:
  int64_t find(Operation operation, int64_t from) const {
    while (from < call_.count && call_.calls[from].operation != operation) ++from;
    return from;
  }

  // Runs the projections from the i-th call on that can be run together; how many.
  int64_t project_from(int64_t i) {
    const ProjectCall* calls[kMostTogether];
    int64_t count = 0;
    while (count < kMostTogether && i + count < call_.count &&
           (calls[count] = projection(call_.calls[i + count])) != nullptr)
      ++count;
    return count < 2 ? 0 : project_together(pool_, calls, count, &errand_);
  }

  // Fetches the pages of an attention, if there is one, during the projections before it.
  void fetch_pages(int64_t from, int64_t attend) {
    errand_.end();
    if (attend == call_.count) return;
    const auto& call = *static_cast<const AttendCall*>(call_.calls[attend].call);
    double products = 0;
    for (int64_t i = from; i < attend; ++i)
      if (const ProjectCall* p = projection(call_.calls[i])) products += products_of(*p);
    if (products > 0 && call.plan->rows >= kFewestRows) errand_.begin(call, products, most_ahead());
  }

  // Multiply-adds that leave time for an errand: of codes, nothing is fetched meanwhile.
  static double products_of(const ProjectCall& call) {
    double products = 0;
    for (int64_t i = 0; i < call.count; ++i) {
      const Matrix& m = *call.linears[i].matrix;
      if (!is_grouped(m.storage)) products += static_cast<double>(call.rows * m.in * m.out);
    }
    return products;
  }

  void run(const Replayed& replayed) {
    switch (replayed.operation) {
      case Operation::kProject:
        return project(pool_, *projection(replayed), &errand_);
      case Operation::kAttend:
        return blockllm_attend(pool_, static_cast<const AttendCall*>(replayed.call));
      case Operation::kActivate:
        return blockllm_activate(pool_, static_cast<const ActivateCall*>(replayed.call));
      case Operation::kAddNorm:
        return blockllm_add_norm(pool_, static_cast<const AddNormCall*>(replayed.call));
      case Operation::kSplit:
        return blockllm_split(pool_, static_cast<const SplitCall*>(replayed.call));
      case Operation::kEmbed:
        return blockllm_embed(pool_, static_cast<const EmbedCall*>(replayed.call));
      case Operation::kCopy:
        return copy(*static_cast<const CopyCall*>(replayed.call));
    }
  }

  // Of few rows: it would take longer to share that out.
  static void copy(const CopyCall& call) {
    std::memcpy(call.to, call.from, static_cast<size_t>(call.count) * sizeof(float));
  }

  Pool* const pool_;
  const ReplayCall& call_;
  Errand errand_;
};

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_replay(Pool* pool, const ReplayCall* call) { Replay(pool, *call).run(); }
