// Packing a stored matrix into panels or tiles, and reading rows back out of them (token embeddings).
#include <cstring>

#include "exports.h"
#include "panel.h"
#include "tiles.h"

namespace blockllm {
namespace {

template <class T>
void pack_panel(const Packing& p, int64_t panel) {
  using Element = typename T::Element;
  const auto* source = static_cast<const Element*>(p.source);
  auto* target =
      static_cast<Element*>(const_cast<void*>(p.target.data)) + panel * p.target.in * kPanel;
  for (int64_t c = 0; c < kPanel; ++c) {
    const int64_t output = panel * kPanel + c;
    Element* column = target + T::column(c);
    if (output >= p.target.out) {
      for (int64_t k = 0; k < p.target.in; ++k) column[k * kPanel] = 0;
      continue;
    }
    const Element* from = source + output * p.out_stride;
    for (int64_t k = 0; k < p.target.in; ++k) column[k * kPanel] = from[k * p.in_stride];
  }
}

// The same in tiles.
void pack_tiles(const Packing& p, int64_t panel) {
  const int64_t in = p.target.in, size = steps_of(in) * kStepWeights;
  const auto* source = static_cast<const uint16_t*>(p.source);
  auto* target = static_cast<uint16_t*>(const_cast<void*>(p.target.data)) + panel * size;
  std::memset(target, 0, static_cast<size_t>(size) * sizeof *target);
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < p.target.out; ++c) {
    const uint16_t* from = source + (panel * kPanel + c) * p.out_stride;
    for (int64_t k = 0; k < in; ++k) target[tile_place(c, k)] = from[k * p.in_stride];
  }
}

template <class T>
void read_row(const Matrix& m, int64_t row, float scale, bool add_to, float* out) {
  using Element = typename T::Element;
  const auto* column =
      static_cast<const Element*>(m.data) + row / kPanel * m.in * kPanel + T::column(row % kPanel);
  for (int64_t k = 0; k < m.in; ++k) {
    const float value = scale * T::value(column[k * kPanel]);
    out[k] = add_to ? out[k] + value : value;
  }
}

void read_tiles(const Matrix& m, int64_t row, float scale, bool add_to, float* out) {
  const auto* panel =
      static_cast<const uint16_t*>(m.data) + row / kPanel * steps_of(m.in) * kStepWeights;
  for (int64_t k = 0; k < m.in; ++k) {
    const float value = scale * BFloat16::value(panel[tile_place(row % kPanel, k)]);
    out[k] = add_to ? out[k] + value : value;
  }
}

// out (+)= scale * the row of a matrix.
void read(const Matrix& m, int64_t row, float scale, bool add_to, float* out) {
  if (m.storage == Storage::kTiles) return read_tiles(m, row, scale, add_to, out);
  with_storage(m.storage,
               [&](auto type) { read_row<decltype(type)>(m, row, scale, add_to, out); });
}

void embed_row(const EmbedCall& call, int64_t row) {
  float* out = call.out + row * call.table->in;
  const auto scale = static_cast<float>(call.scale);
  read(*call.table, call.tokens[row], scale, false, out);
  if (call.positions == nullptr) return;
  const int64_t position = call.row_positions[row] + call.offset;
  read(*call.positions, position, 1.0f, true, out);
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_pack(Pool* pool, const Packing* packing) {
  pool->run(panels_of(packing->target.out), [&](int64_t panel) {
    if (packing->target.storage == Storage::kTiles) return pack_tiles(*packing, panel);
    with_storage(packing->target.storage,
                 [&](auto type) { pack_panel<decltype(type)>(*packing, panel); });
  });
}

void blockllm_embed(Pool* pool, const EmbedCall* call) {
  pool->run(call->rows, [&](int64_t row) { embed_row(*call, row); });
}

int64_t blockllm_packed_bytes(int64_t out, int64_t in, int64_t storage) {
  const int64_t panels = panels_of(out);
  switch (static_cast<Storage>(storage)) {
    case Storage::kTiles:
      return panels * steps_of(in) * kStepWeights * static_cast<int64_t>(sizeof(uint16_t));
    case Storage::kF32:
      return panels * kPanel * in * static_cast<int64_t>(sizeof(float));
    default:
      return panels * kPanel * in * static_cast<int64_t>(sizeof(uint16_t));
  }
}
