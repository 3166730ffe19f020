// Attention of a block with queries and softmax weights rounded to bfloat16: a way of attend.cpp.
// Queries lie in stripes of 16, which are computed two by two, or are few.
#pragma once
#include "attention.h"
#include "few.h"
#include "stripe.h"

namespace blockllm {

#if defined(__AVX512BF16__)

struct Stripes {
  const Attention<BFloat16>& a;

  int64_t width() const { return padded(a.call.dim); }
  // Floats of the queries of a block and head, ready, and of a partial result.
  int64_t query_floats(int64_t queries) const {
    return ceil_div(queries, kSide) * kSide * width() / 2;
  }
  int64_t floats(int64_t queries) const {
    return ceil_div(queries, kSide) * Stripe::floats(width());
  }

  void prepare(const Reach& reach, int64_t head, float* to) const {
    const int64_t queries = a.queries_of(reach), dim = a.call.dim;
    auto* packed = reinterpret_cast<uint16_t*>(to);
    float* ready = scratch<kHead>(kSide * dim);
    for (int64_t i = 0; i < queries; i += kSide, packed += kSide * width()) {
      const int64_t count = std::min(kSide, queries - i);
      for (int64_t j = 0; j < count; ++j) a.prepare_query(reach, head, i + j, ready + j * dim);
      pack_stripe(ready, count, dim, packed);
    }
  }

  // The partial results of a piece's heads.
  void attend(const Piece& piece, const float* query, float* out) const {
    each_pair(piece, query, [&](const Span& span, auto stripes, int64_t stripe) {
      attend_stripes<decltype(stripes)::value>(span, out + stripe * Stripe::floats(width()));
    });
  }

  // The same, folded into the states of the spans before it.
  void go_on(const Piece& piece, const float* query, float* state) const {
    const int64_t floats = Stripe::floats(width());
    float* result = scratch<kSpanResult>(2 * floats);
    each_pair(piece, query, [&](const Span& span, auto stripes, int64_t stripe) {
      constexpr int64_t kStripes = decltype(stripes)::value;
      attend_stripes<kStripes>(span, result);
      fold(result, kStripes * kSide, state + stripe * floats);
    });
  }

  void fold(float* span, int64_t queries, float* state) const {
    const int64_t floats = Stripe::floats(width());
    for (int64_t i = 0; i < ceil_div(queries, kSide); ++i)
      fold_stripe(Stripe(span + i * floats), width(), Stripe(state + i * floats));
  }

  void write(const Reach& reach, int64_t head, float* state) const {
    const int64_t queries = a.queries_of(reach);
    for (int64_t i = 0; i < queries; i += kSide, state += Stripe::floats(width())) {
      float* to[kSide];
      const int64_t count = std::min(kSide, queries - i);
      for (int64_t j = 0; j < count; ++j) to[j] = a.call.out + a.place(reach, head, i + j);
      write_stripe(Stripe(state), count, a.call.dim, to);
    }
  }

 private:
  // What the stripes of a piece share, and two of them (or the last one) see.
  struct Span {
    KeyTiles keys;
    const uint16_t* values;  // turned
    const uint16_t* queries;
    Sight sights[2];
  };

  // Calls body for every two stripes of each head.
  template <class Body>
  void each_pair(const Piece& piece, const float* query, const Body& body) const {
    const int64_t queries = a.queries_of(piece.reach), stripes = ceil_div(queries, kSide);
    // All heads in one sweep. Many queries wait for no memory: they keep the core busy, and their
    // context in its cache.
    int64_t fetched = queries > kSide ? 0 : piece.heads.count * a.call.dim * 2;
    for (int64_t h = 0; h < piece.heads.count; ++h, fetched = 0)
      pairs_of_head(piece, h, fetched, query + h * query_floats(queries),
                    [&](const Span& span, auto some, int64_t stripe) {
                      body(span, some, h * stripes + stripe);
                    });
  }

  template <class Body>
  void pairs_of_head(const Piece& piece, int64_t head, int64_t fetched, const float* query,
                     const Body& body) const {
    const Keys<BFloat16> keys = a.keys(piece.reach, piece.heads.first + head, piece.span);
    const Seen seen = a.seen(piece.reach, piece.span);
    const int64_t queries = a.queries_of(piece.reach), low = seen.begin(0) / kDepth;
    auto* turned = scratch<kTurned, uint16_t>(width() * kSpan);
    turn_values(keys, low, fetched, turned);
    Span span{key_tiles(keys), turned, reinterpret_cast<const uint16_t*>(query), {}};
    const TileRegisters registers(kSide);
    for (int64_t i = 0; i < queries; i += 2 * kSide) {
      span.sights[0] = sight(seen, i, queries);
      if (i + kSide < queries) {
        span.sights[1] = sight(seen, i + kSide, queries);
        body(span, std::integral_constant<int, 2>(), i / kSide);
      } else {
        body(span, std::integral_constant<int, 1>(), i / kSide);
      }
      span.queries += 2 * kSide * width();
    }
  }

  // Where a page holds whole tiles, they are read in place.
  KeyTiles key_tiles(const Keys<BFloat16>& keys) const {
    const bool in_place = a.call.page % kSide == 0 && keys.dim == width();
    KeyTiles tiles;
    tiles.stride = 2 * (in_place ? a.call.kv_heads * keys.dim : width());
    auto* copies = in_place ? nullptr : scratch<kKeyTiles, uint16_t>(kSpan * width());
    for (int64_t j = 0; !in_place && j < keys.count; ++j) {
      for (int64_t d = 0; d < keys.dim; d += kDepth) {
        const __m512i x = _mm512_maskz_loadu_epi16(some_words(keys.dim - d), keys.at[j] + d);
        _mm512_store_si512(copies + j * width() + d, x);
      }
    }
    for (int64_t j = 0; j < kSpan; j += kSide) {
      const int64_t at = j < keys.count ? j : (keys.count - 1) / kSide * kSide;
      tiles.at[j / kSide] = in_place ? keys.at[at] : copies + at * width();
    }
    return tiles;
  }

  // What the stripe from `query` on sees; its places behind the last query see what that one does.
  static Sight sight(const Seen& seen, int64_t query, int64_t queries) {
    Sight sight;
    for (int64_t i = 0; i < kSide; ++i) {
      const int64_t rows = std::min(queries - 1, query + i) / seen.group;
      sight.low[i] = static_cast<int32_t>(seen.low + rows);
      sight.high[i] = static_cast<int32_t>(seen.high + rows);
    }
    sight.all_low = sight.low[kSide - 1];
    sight.all_high = sight.high[0];
    return sight;
  }

  template <int S>
  void attend_stripes(const Span& span, float* out) const {
    const Sight* sights = span.sights;
    const int64_t seen = std::clamp<int64_t>(sights[S - 1].high[kSide - 1], 0, kSpan);
    const int64_t first = std::max<int64_t>(0, sights[0].low[0]) / kDepth;
    const int64_t last = ceil_div(seen, kDepth), begins = first * kDepth, ends = last * kDepth;
    float* scores = scratch<kScores>(2 * kSpan * kSide);
    auto* weights = scratch<kWeights, uint16_t>(2 * kSpan * kSide);
    score_tiles<S>(span.keys, 2 * first, 2 * last, span.queries, steps_of(a.call.dim), scores);
    for (int s = 0; s < S; ++s) {
      float* own = scores + s * kSpan * kSide;
      hide(sights[s], begins, std::min(ends, sights[s].all_low), own);
      hide(sights[s], std::max(begins, sights[s].all_high), ends, own);
      soften_stripe(own, first, last, weights + s * kSpan * kSide,
                    Stripe(out + s * Stripe::floats(width())));
    }
    float* values = Stripe(out).values;
    weigh_tiles<S>(span.values, width(), weights, first, last, values,
                   values + Stripe::floats(width()));
  }
};

struct Rounded {
  const Attention<BFloat16> a;
  const Few few{a};
  const Stripes stripes{a};

  static bool is_few(int64_t queries) { return queries < kFewQueries; }
  bool is_few(const Reach& reach) const { return is_few(a.queries_of(reach)); }

  int64_t query_floats(int64_t queries) const {
    return is_few(queries) ? few.query_floats(queries) : stripes.query_floats(queries);
  }
  int64_t floats(int64_t queries) const {
    return is_few(queries) ? few.floats(queries) : stripes.floats(queries);
  }
  void prepare(const Reach& reach, int64_t head, float* to) const {
    is_few(reach) ? few.prepare(reach, head, to) : stripes.prepare(reach, head, to);
  }
  void attend(const Piece& piece, const float* query, float* out) const {
    is_few(piece.reach) ? few.attend(piece, query, out) : stripes.attend(piece, query, out);
  }
  void go_on(const Piece& piece, const float* query, float* state) const {
    is_few(piece.reach) ? few.go_on(piece, query, state) : stripes.go_on(piece, query, state);
  }
  void fold(float* span, int64_t queries, float* state) const {
    is_few(queries) ? few.fold(span, queries, state) : stripes.fold(span, queries, state);
  }
  void write(const Reach& reach, int64_t head, float* state) const {
    is_few(reach) ? few.write(reach, head, state) : stripes.write(reach, head, state);
  }
};

#endif

}  // namespace blockllm
