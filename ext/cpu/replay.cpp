// A step's operations once more, by the records of the first time. What comes next is known: the
// threads fetch the beginnings of the next weights while they wait for each other.
#include "exports.h"
#include "projection.h"

namespace blockllm {
namespace {

void run(Pool* pool, const Replayed& replayed) {
  switch (replayed.operation) {
    case Operation::kProject:
      return blockllm_project(pool, static_cast<const ProjectCall*>(replayed.call));
    case Operation::kAttend:
      return blockllm_attend(pool, static_cast<const AttendCall*>(replayed.call));
    case Operation::kActivate:
      return blockllm_activate(pool, static_cast<const ActivateCall*>(replayed.call));
    case Operation::kAddNorm:
      return blockllm_add_norm(pool, static_cast<const AddNormCall*>(replayed.call));
    case Operation::kSplit:
      return blockllm_split(pool, static_cast<const SplitCall*>(replayed.call));
  }
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_replay(Pool* pool, const ReplayCall* call) {
  int64_t next = 0;  // the projection that comes next
  for (int64_t i = 0; i < call->count; ++i) {
    if (next <= i && i + 1 < call->count) {
      for (next = i + 1; next < call->count; ++next)
        if (call->calls[next].operation == Operation::kProject) break;
      if (next < call->count) foresee(pool, *static_cast<const ProjectCall*>(call->calls[next].call));
    }
    run(pool, call->calls[i]);
  }
}
