// The records that ext/cpu.py packs and the kernels read. Every field is 8 bytes, so the struct
// formats on the Python side are plain sequences of q, Q and d. Pointers are borrowed for one call.
#pragma once
#include <cstdint>

namespace blockllm {

// kTiles: bfloat16 in tiles (tiles.h); kInt8 and kInt4: codes (grouped.h); kFolded and kFoldedTiles:
// bfloat16 in panels and in tiles, folded (folded.h): of weights alone. The others lie in panels.
enum class Storage : int64_t {
  kF32 = 0,
  kBF16 = 1,
  kF16 = 2,
  kTiles = 3,
  kInt8 = 4,
  kInt4 = 5,
  kFolded = 6,
  kFoldedTiles = 7,
};
enum class NormKind : int64_t { kNone = 0, kRms = 1, kLayer = 2 };
enum class Act : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3, kTanh = 4, kNone = 5 };

// A packed weight [out, in]; its layout is described in panel.h, tiles.h,
// folded.h and grouped.h.
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

// Rows [first, last) take these weights.
struct NormRun {
  int64_t first, last;
  const float* weight;
  const float* bias;  // null: none
};

struct Norm {
  NormKind kind;
  double eps;
  const float* weight;
  const float* bias;    // null: none
  const NormRun* runs;  // `run_count` of them, sorted and disjoint: other weights for some rows
  int64_t run_count;
};

// Rows [first, last) get y += scale * (x A^T) B^T; `offset` is the segment's place in the buffer
// of shrunk rows (floats), see lora.h.
struct Segment {
  int64_t first, last;
  const void* a;  // [rank, in]
  Storage a_storage;
  const void* b;  // [out, rank] in panels
  Storage b_storage;
  int64_t rank, offset;
  double scale;
};

// Rows [first, last) end in y = gain * y + bias.
struct Finish {
  int64_t first, last;
  const float* gain;  // null: none
  const float* bias;  // null: the linear's own
};

// `count` segments follow, then `finish_count` finishes, which are sorted and disjoint.
struct Patch {
  int64_t count, finish_count, shrunk_floats;

  const Segment* segments() const { return reinterpret_cast<const Segment*>(this + 1); }
  const Finish* finishes() const { return reinterpret_cast<const Finish*>(segments() + count); }
};

struct LinearCall {
  const Matrix* matrix;
  const float* bias;   // null: none
  float* out;          // [rows, out]
  const Patch* patch;  // null: none
};

// What becomes of the results: out = y; out += y; of two linears, gate and up, of which only up has
// an `out`: out = act(gate) * up; or of one, where `out` is int64 [rows]: the place of each row's
// largest result, of equals the first.
enum class Mode : int64_t { kStore = 0, kAdd = 1, kGate = 2, kBest = 3 };

struct ProjectCall {
  const float* x;  // [rows, width]
  int64_t rows, width;
  Norm norm;
  Mode mode;
  Act gate;
  int64_t rounding;  // 1: `x`, normalized, may be rounded to bfloat16 before it is multiplied
  int64_t count;
  LinearCall linears[1];  // `count` of them follow
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

struct EmbedCall {
  const Matrix* table;
  const Matrix* positions;  // null: none
  const int64_t* tokens;    // [rows]; one that the table lacks gets its first row
  const Plan* plan;
  int64_t rows, offset;
  double scale;
  float* out;  // [rows, in]
};

// cos and sin of a position: table[position * 2 * half] and the `half` floats after them.
struct Rotary {
  const float* table;
  int64_t half, interleaved, positions;
};

struct AttendCall {
  const float* q;       // [rows, heads * dim]; null: keys and values are written, no more
  const float *k, *v;   // [rows, kv_heads * dim]; null: they are written already
  float* out;           // [rows, heads * dim]
  void* cache;             // [pages, 2, page, kv_heads, dim]
  Storage storage;         // of the cache: kF32 or kBF16
  int64_t heads, kv_heads, dim, page, layer;
  const Plan* plan;
  const Rotary* rotary;  // null: none
  Norm q_norm, k_norm;
  double scale;
  int64_t window;    // 0: none
  int64_t rounding;  // 1: queries and softmax weights may be rounded to bfloat16
};

struct ActivateCall {
  const float* gate;  // null: none
  const float* up;
  float* out;
  int64_t count;
  Act kind;
};

// x += norm(y)
struct AddNormCall {
  float* x;        // [rows, width]
  const float* y;  // [rows, width]
  int64_t rows, width;
  Norm norm;
};

// Rows [first, last) are multiplied by `vector`.
struct Gain {
  int64_t first, last;
  const float* vector;  // [width]
};

struct ScaleCall {
  float* x;  // [rows, width]
  int64_t width, count;
  Gain gains[1];  // `count` of them follow
};

// Rows [first, last) get x += scale * up(act(down(z))).
struct Detour {
  int64_t first, last;
  const Matrix* down;
  const float* down_bias;  // null: none
  const Matrix* up;
  const float* up_bias;  // null: none
  Act kind;
  double scale;
};

struct DetourCall {
  float* x;        // [rows, out of up]
  const float* z;  // [rows, in of down]; may be x
  int64_t count;
  Detour detours[1];  // `count` of them follow, with disjoint rows
};

// Of y [rows, groups * sum of the parts' widths] each group has one of every part, side by side.
struct SplitPart {
  float* out;  // [rows, groups * width]
  int64_t width;
};

struct SplitCall {
  const float* y;
  int64_t rows, groups, count;
  SplitPart parts[1];  // `count` of them follow
};

struct CopyCall {
  const float* from;
  float* to;
  int64_t count;
};

// Operations that a step was made of, to be run again in their order.
enum class Operation : int64_t {
  kProject = 0,
  kAttend = 1,
  kActivate = 2,
  kAddNorm = 3,
  kSplit = 4,
  kEmbed = 5,
  kCopy = 6,
};

struct Replayed {
  Operation operation;
  const void* call;  // its record
};

struct ReplayCall {
  int64_t count;
  Replayed calls[1];  // `count` of them follow
};

struct ArgmaxCall {
  const float* logits;  // [rows, width]
  int64_t rows, width;
  int64_t* ids;  // [rows]
};

}  // namespace blockllm
