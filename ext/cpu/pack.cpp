// Packing a stored matrix into panels or tiles, which may be folded, and reading rows back out of
// them (token embeddings).
#include <cstring>
#include <vector>

#include "exports.h"
#include "folded.h"
#include "panel.h"
#include "tiles.h"

namespace blockllm {
namespace {

template <class T>
void pack_panel(const Packing& p, int64_t panel, void* to) {
  using Element = typename T::Element;
  const auto* source = static_cast<const Element*>(p.source);
  auto* target = static_cast<Element*>(to);
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

// The same in tiles, upon zeros.
void pack_tiles(const Packing& p, int64_t panel, void* to) {
  const auto* source = static_cast<const uint16_t*>(p.source);
  auto* target = static_cast<uint16_t*>(to);
  for (int64_t c = 0; c < kPanel && panel * kPanel + c < p.target.out; ++c) {
    const uint16_t* from = source + (panel * kPanel + c) * p.out_stride;
    for (int64_t k = 0; k < p.target.in; ++k) target[tile_place(c, k)] = from[k * p.in_stride];
  }
}

// Folds the blocks of a bundle's panels, which lie one behind the other; whether that is possible.
template <class Order>
bool fold_bundle(const uint16_t* unfolded, int64_t panels, int64_t blocks, char* to) {
  for (int64_t b = 0; b < blocks; ++b)
    for (int64_t p = 0; p < panels; ++p, to += kBlockBytes)
      if (!fold_block<Order>(unfolded + (p * blocks + b) * kBlock, to)) return false;
  return true;
}

// Bundles one behind the other, each folded where that saves anything; returns the bytes of it all.
template <class Order, class Pack>
int64_t pack_folded(const Packing& p, const Pack& pack) {
  const int64_t blocks = blocks_of(p.target.in), plain = unfolded_bytes<Order>(p.target.in);
  const Bundles bundles(p.target);
  auto* const data = static_cast<char*>(const_cast<void*>(p.target.data));
  auto* const starts = reinterpret_cast<int64_t*>(data);
  int64_t at = bundles.head_bytes();
  std::vector<uint16_t> unfolded;
  for (int64_t i = 0; i < bundles.count(); ++i) {
    const Rows panels = bundles.panels(i);
    unfolded.assign(static_cast<size_t>(panels.count * blocks * kBlock), 0);
    for (int64_t j = 0; j < panels.count; ++j)
      pack(panels.first + j, unfolded.data() + j * blocks * kBlock);
    const bool folds = blocks * kBlockBytes < plain &&
                       fold_bundle<Order>(unfolded.data(), panels.count, blocks, data + at);
    for (int64_t j = 0; j < panels.count && !folds; ++j)
      std::memcpy(data + at + j * plain, unfolded.data() + j * blocks * kBlock,
                  static_cast<size_t>(plain));
    starts[i] = at | (folds ? 1 : 0);
    at += panels.count * (folds ? blocks * kBlockBytes : plain);
  }
  starts[bundles.count()] = at;
  return at;
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

// A column of the panel's blocks, while those two further on are fetched; place(k) is where the
// k-th input of a block lies.
template <class Order, class Place>
void read_folded(const Matrix& m, int64_t row, float scale, bool add_to, float* out,
                 const Place& place) {
  const Unfolding<Order> panel(m, {row / kPanel, 1});
  for (int64_t b = 0; b < blocks_of(m.in); ++b) {
    const uint16_t* weights = panel.take({b, 1}, {0, 1}, 2 * panel.step()).at;
    for (int64_t k = b * kBlockInputs; k < std::min(m.in, (b + 1) * kBlockInputs); ++k) {
      const float value = scale * BFloat16::value(weights[place(k % kBlockInputs)]);
      out[k] = add_to ? out[k] + value : value;
    }
  }
}

// out (+)= scale * the row of a matrix.
void read(const Matrix& m, int64_t row, float scale, bool add_to, float* out) {
  switch (m.storage) {
    case Storage::kTiles:
      return read_tiles(m, row, scale, add_to, out);
    case Storage::kFolded:
      return read_folded<PanelOrder>(m, row, scale, add_to, out, [&](int64_t k) {
        return k * kPanel + BFloat16::column(row % kPanel);
      });
    case Storage::kFoldedTiles:
      return read_folded<TileOrder>(m, row, scale, add_to, out,
                                    [&](int64_t k) { return tile_place(row % kPanel, k); });
    default:
      with_storage(m.storage,
                   [&](auto type) { read_row<decltype(type)>(m, row, scale, add_to, out); });
  }
}

void embed_row(const EmbedCall& call, int64_t row) {
  float* out = call.out + row * call.table->in;
  const auto scale = static_cast<float>(call.scale);
  const int64_t token = call.tokens[row];
  const bool known = token >= 0 && token < call.table->out;
  read(*call.table, known ? token : 0, scale, false, out);
  if (call.positions == nullptr) return;
  const int64_t position = call.plan->row_position[row] + call.offset;
  read(*call.positions, position, 1.0f, true, out);
}

}  // namespace
}  // namespace blockllm

using namespace blockllm;

int64_t blockllm_pack(const Packing* packing) {
  const Packing& p = *packing;
  auto* const data = static_cast<char*>(const_cast<void*>(p.target.data));
  const int64_t panels = panels_of(p.target.out);
  const int64_t bytes = blockllm_packed_bytes(p.target.out, p.target.in,
                                              static_cast<int64_t>(p.target.storage));
  switch (p.target.storage) {
    case Storage::kFolded:
      return pack_folded<PanelOrder>(p, [&](int64_t panel, uint16_t* to) {
        pack_panel<BFloat16>(p, panel, to);
      });
    case Storage::kFoldedTiles:
      return pack_folded<TileOrder>(
          p, [&](int64_t panel, uint16_t* to) { pack_tiles(p, panel, to); });
    case Storage::kTiles:
      std::memset(data, 0, static_cast<size_t>(bytes));
      for (int64_t i = 0; i < panels; ++i) pack_tiles(p, i, data + i * (bytes / panels));
      return bytes;
    default:
      with_storage(p.target.storage, [&](auto type) {
        for (int64_t i = 0; i < panels; ++i)
          pack_panel<decltype(type)>(p, i, data + i * (bytes / panels));
      });
      return bytes;
  }
}

void blockllm_embed(Pool* pool, const EmbedCall* call) {
  pool->run(call->rows, [&](int64_t row) { embed_row(*call, row); });
}

int64_t blockllm_packed_bytes(int64_t out, int64_t in, int64_t storage) {
  const int64_t panels = panels_of(out);
  const Matrix matrix{nullptr, out, in, static_cast<Storage>(storage)};
  switch (matrix.storage) {
    case Storage::kTiles:
      return panels * unfolded_bytes<TileOrder>(in);
    case Storage::kFoldedTiles:
      return Bundles(matrix).head_bytes() + panels * unfolded_bytes<TileOrder>(in);
    case Storage::kFolded:
      return Bundles(matrix).head_bytes() + panels * unfolded_bytes<PanelOrder>(in);
    case Storage::kF32:
      return panels * kPanel * in * static_cast<int64_t>(sizeof(float));
    default:
      return panels * kPanel * in * static_cast<int64_t>(sizeof(uint16_t));
  }
}
