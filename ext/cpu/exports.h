// The plain C interface that ext/cpu.py loads.
#pragma once
#include "pool.h"
#include "records.h"

#define BLOCKLLM_EXPORT extern "C" __attribute__((visibility("default")))

BLOCKLLM_EXPORT blockllm::Pool* blockllm_open(int64_t threads);
BLOCKLLM_EXPORT void blockllm_close(blockllm::Pool* pool);
BLOCKLLM_EXPORT int64_t blockllm_panel();         // outputs per panel
// How weights of bfloat16 are to be packed, where rounding is allowed or is not.
BLOCKLLM_EXPORT int64_t blockllm_bf16_storage(int64_t rounding);
BLOCKLLM_EXPORT int64_t blockllm_rounds();  // whether rounding makes anything faster
// Bytes that a packed matrix takes, at most; how many it took is what packing gives.
BLOCKLLM_EXPORT int64_t blockllm_packed_bytes(int64_t out, int64_t in, int64_t storage);
BLOCKLLM_EXPORT int64_t blockllm_pack(const blockllm::Packing* packing);

BLOCKLLM_EXPORT void blockllm_embed(blockllm::Pool* pool, const blockllm::EmbedCall* call);
BLOCKLLM_EXPORT void blockllm_project(blockllm::Pool* pool, const blockllm::ProjectCall* call);
BLOCKLLM_EXPORT void blockllm_attend(blockllm::Pool* pool, const blockllm::AttendCall* call);
BLOCKLLM_EXPORT void blockllm_activate(blockllm::Pool* pool, const blockllm::ActivateCall* call);
BLOCKLLM_EXPORT void blockllm_add_norm(blockllm::Pool* pool, const blockllm::AddNormCall* call);
BLOCKLLM_EXPORT void blockllm_scale(blockllm::Pool* pool, const blockllm::ScaleCall* call);
BLOCKLLM_EXPORT void blockllm_detour(blockllm::Pool* pool, const blockllm::DetourCall* call);
BLOCKLLM_EXPORT void blockllm_split(blockllm::Pool* pool, const blockllm::SplitCall* call);
BLOCKLLM_EXPORT void blockllm_replay(blockllm::Pool* pool, const blockllm::ReplayCall* call);
BLOCKLLM_EXPORT void blockllm_argmax(blockllm::Pool* pool, const blockllm::ArgmaxCall* call);
