// A step's operations once more, by the records of the first time.
#include "exports.h"

using namespace blockllm;

void blockllm_replay(Pool* pool, const ReplayCall* call) {
  for (int64_t i = 0; i < call->count; ++i) {
    const void* record = call->calls[i].call;
    switch (call->calls[i].operation) {
      case Operation::kProject:
        blockllm_project(pool, static_cast<const ProjectCall*>(record));
        break;
      case Operation::kAttend:
        blockllm_attend(pool, static_cast<const AttendCall*>(record));
        break;
      case Operation::kActivate:
        blockllm_activate(pool, static_cast<const ActivateCall*>(record));
        break;
      case Operation::kAddNorm:
        blockllm_add_norm(pool, static_cast<const AddNormCall*>(record));
        break;
      case Operation::kSplit:
        blockllm_split(pool, static_cast<const SplitCall*>(record));
        break;
    }
  }
}
