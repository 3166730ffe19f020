// Opening and closing the library's thread pool.
#include "exports.h"

#include "panel.h"

blockllm::Pool* blockllm_open(int64_t threads) {
  return new blockllm::Pool(static_cast<int>(threads));
}
void blockllm_close(blockllm::Pool* pool) { delete pool; }
int64_t blockllm_panel() { return blockllm::kPanel; }
