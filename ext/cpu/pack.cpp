// Packing a stored matrix into panels, and reading rows back out of them (token embeddings).
#include "exports.h"
#include "panel.h"

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

void embed_row(const EmbedCall& call, int64_t row) {
  float* out = call.out + row * call.table->in;
  const auto scale = static_cast<float>(call.scale);
  with_storage(call.table->storage, [&](auto type) {
    read_row<decltype(type)>(*call.table, call.tokens[row], scale, false, out);
  });
  if (call.positions == nullptr) return;
  const int64_t position = call.row_positions[row] + call.offset;
  with_storage(call.positions->storage, [&](auto type) {
    read_row<decltype(type)>(*call.positions, position, 1.0f, true, out);
  });
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

void blockllm_pack(Pool* pool, const Packing* packing) {
  pool->run(panels_of(packing->target.out), [&](int64_t panel) {
    with_storage(packing->target.storage,
                 [&](auto type) { pack_panel<decltype(type)>(*packing, panel); });
  });
}

void blockllm_embed(Pool* pool, const EmbedCall* call) {
  pool->run(call->rows, [&](int64_t row) { embed_row(*call, row); });
}
