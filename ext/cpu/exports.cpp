// Opening and closing the library's thread pool, and what its layouts are.
#include "exports.h"

#include "amx.h"
#include "panel.h"

using namespace blockllm;

Pool* blockllm_open(int64_t threads) { return new Pool(static_cast<int>(threads)); }
void blockllm_close(Pool* pool) { delete pool; }
int64_t blockllm_panel() { return kPanel; }
int64_t blockllm_bf16_storage() {
  return static_cast<int64_t>(kHasTiles ? Storage::kTiles : Storage::kBF16);
}
