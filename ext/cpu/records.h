// The records that ext/cpu.py packs and the kernels read. Every field is 8 bytes, so the struct
// formats on the Python side are plain sequences of q, Q and d. Pointers are borrowed for one call.
#pragma once
#include <cstdint>

namespace blockllm {

enum class Storage : int64_t { kF32 = 0, kBF16 = 1, kF16 = 2 };
enum class NormKind : int64_t { kNone = 0, kRms = 1, kLayer = 2 };
enum class Act : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };

// A packed weight [out, in]; its layout is described in panel.h.
struct Matrix {
  const void* data;
  int64_t out, in;
  Storage storage;
};

// A stored matrix to pack: element (o, i) lies at source[o * out_stride + i * in_stride].
struct Packing {
  Matrix target;
  const void* source;
  int64_t out_stride, in_stride;
};

struct Norm {
  NormKind kind;
  double eps;
  const float* weight;
  const float* bias;  // null: none
};

// Rows [first, last) get y += scale * (x A^T) B^T; `offset` is the segment's place in the buffer
// of shrunk rows (floats), where row r lies at offset + (r - first) * rank.
struct Segment {
  int64_t first, last;
  const float* a;  // [rank, in]
  const float* b;  // [out, rank]
  int64_t rank, offset;
  double scale;
};

struct Patch {
  int64_t count, shrunk_floats;
  Segment segments[1];  // `count` of them follow
};

struct LinearCall {
  const Matrix* matrix;
  const float* bias;   // null: none
  float* out;          // [rows, out]
  const Patch* patch;  // null: none
};

struct ProjectCall {
  const float* x;  // [rows, width]
  int64_t rows, width;
  Norm norm;
  int64_t accumulate;  // 1: out += ..., 0: out = ...
  int64_t count;
  LinearCall linears[1];  // `count` of them follow
};

struct EmbedCall {
  const Matrix* table;
  const Matrix* positions;       // null: none
  const int64_t* tokens;         // [rows]
  const int32_t* row_positions;  // [rows]
  int64_t rows, offset;
  double scale;
  float* out;  // [rows, in]
};

// A wave's geometry (ext.ops.Geometry) and what follows from it.
struct Plan {
  const int32_t* tables;        // [sequences, layers, pages_per_sequence]
  const int32_t* row_sequence;  // [rows]
  const int32_t* row_position;  // [rows]
  const int32_t*
      block_first;  // [blocks + 1]: rows [block_first[i], block_first[i + 1]) of one sequence
  int64_t rows, blocks, layers, pages_per_sequence;
};

// cos and sin of a position: table[position * 2 * half] and the `half` floats after them.
struct Rotary {
  const float* table;
  int64_t half, interleaved, positions;
};

struct AttendCall {
  const float *q, *k, *v;  // [rows, heads * dim], [rows, kv_heads * dim] twice
  float* out;              // [rows, heads * dim]
  float* cache;            // [pages, 2, page, kv_heads, dim]
  int64_t heads, kv_heads, dim, page, layer;
  const Plan* plan;
  const Rotary* rotary;  // null: none
  Norm q_norm, k_norm;
  double scale;
  int64_t window;  // 0: none
};

struct ActivateCall {
  const float* gate;  // null: none
  const float* up;
  float* out;
  int64_t count;
  Act kind;
};

struct SelectCall {
  const float* logits;  // [rows, width]
  int64_t rows, width, k;
  int64_t* ids;   // [rows, k] (argmax: k = 1)
  float* values;  // [rows, k]; log_sum_exp: [rows]
};

}  // namespace blockllm
