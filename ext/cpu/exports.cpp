// Opening and closing the library's thread pool, and what its layouts are.
#include "exports.h"

#include "panel.h"
#include "tiles.h"

using namespace blockllm;

Pool* blockllm_open(int64_t threads) { return new Pool(static_cast<int>(threads)); }
void blockllm_close(Pool* pool) { delete pool; }
int64_t blockllm_panel() { return kPanel; }
int64_t blockllm_bf16_storage(int64_t rounding) {
  const bool in_tiles = kExactInTiles || (kHasTiles && rounding != 0);
  const Storage storage = kExactInTiles ? Storage::kTiles
                          : in_tiles    ? Storage::kFoldedTiles
                                        : Storage::kFolded;
  return static_cast<int64_t>(storage);
}
int64_t blockllm_rounds() { return kHasTiles ? 1 : 0; }
