// Attention of many query rows: blocks of keys and values are laid out for outer products in the cache, and a few rows at
// a time are multiplied by them, weighed, and multiplied by the values. Blocks that a mask hides from all of these rows
// cost nothing. (Dao et al. 2022, FlashAttention.)

#ifdef HAS_AVX512
namespace {

constexpr int M = 6;           // query rows at a time
constexpr int64_t KEYS = 64;   // of a block, four vectors
constexpr int64_t ROWS = 192;  // query rows of a key/value head for which a block is laid out once, about

// The rows of one key/value head that a thread takes: `positions` of each query head of its group, one after the other.
struct Piece {
    int64_t b, kv_head, first, positions, rows;

    int64_t head(const Attention& a, int64_t r) const { return kv_head * a.groups() + r / positions; }
    int64_t position(int64_t r) const { return first + r % positions; }
    const char* mask(const Attention& a, int64_t r) const {
        return a.mask_row(b, kv_head, r / positions * a.length + position(r));
    }
};

// Which of `count` keys from n on row r attends to, one bit each.
uint64_t seen(const Attention& a, const Piece& piece, int64_t r, int64_t n, int64_t count) {
    const uint64_t there = _bzhi_u64(~0ull, count);
    if (a.is_causal) return _bzhi_u64(there, std::clamp<int64_t>(piece.position(r) + 1 - n, 0, KEYS));
    if (!a.mask) return there;
    const char* mask = piece.mask(a, r);
    if (!a.mask_strides[3]) return attends(a, mask, 0) ? there : 0;
    if (a.mask_kind == U8)
        return _mm512_cmpneq_epi8_mask(_mm512_maskz_loadu_epi8(there, mask + n), _mm512_setzero_si512());
    uint64_t found = 0;
    for (int64_t i = 0; i < count; i += LANES) {
        const f32x16 v = load_some(mask, n + i, std::min(LANES, count - i), a.mask_kind);
        const __mmask16 some = _mm512_cmp_ps_mask(bits_of<__m512>(v), _mm512_set1_ps(NOTHING), _CMP_NEQ_UQ);
        found |= (uint64_t)some << i;
    }
    return found & there;
}

// Which keys any row of a piece attends to: from the first to the one behind the last.
std::pair<int64_t, int64_t> attended(const Attention& a, const Piece& piece) {
    if (a.is_causal) return {0, std::min(a.keys, piece.first + piece.positions)};
    int64_t first = a.keys, last = 0;
    for (int64_t group = 0; group < (a.mask && a.mask_strides[1] ? a.groups() : 1); group++) {
        const int64_t r = group * a.length + piece.first;
        const auto [low, high] = attended(a, piece.b, piece.kv_head, r, r + piece.positions);
        first = std::min(first, low), last = std::max(last, high);
    }
    return {first, last};
}

// What an additive mask adds to the scores of sixteen keys from n on, of which `count` exist.
INLINE f32x16 added(const Attention& a, const char* mask, int64_t n, int64_t count) {
    if (!a.mask_strides[3]) return splat(load_some(mask, 0, 1, a.mask_kind).piece[0][0]);
    return load_some(mask, n, std::min(LANES, count), a.mask_kind);
}

// total[m][v] += row m of x, `x_stride` words apart, times vector v of a panel of `stride` words a step.
template <bool PAIRS, int V>
INLINE void add_products(__m512 (&total)[M][V], const uint32_t* panel, int64_t stride, const uint32_t* x,
                         int64_t x_stride, int64_t steps) {
    for (int64_t s = 0; s < steps; s++, panel += stride) {
        __m512i w[V];
        for (int v = 0; v < V; v++) w[v] = _mm512_load_si512(panel + v * LANES);
        for (int m = 0; m < M; m++) {
            const __m512i one = _mm512_set1_epi32(x[m * x_stride + s]);
            for (int v = 0; v < V; v++) total[m][v] = multiply_step<PAIRS>(total[m][v], w[v], one);
        }
    }
}

// `count` keys, and zeros up to a whole block: a step is one column of all keys, or a pair of columns.
template <bool PAIRS>
void lay_out_keys(const Attention& a, const char* key, int64_t count, uint32_t* to) {
    const int64_t words = PAIRS ? a.width / 2 : a.width;
    for (int64_t n = 0; n < KEYS; n += LANES)
        for (int64_t c = 0; c < words; c += LANES) {
            const __mmask16 there = _bzhi_u32(0xffff, std::min(LANES, words - c));
            __m512i v[16] = {};
            for (int64_t i = 0; i < std::min(LANES, count - n); i++) {
                const char* row = key + (n + i) * a.key_strides[2] * size_of(a.kind);
                v[i] = PAIRS ? _mm512_maskz_loadu_epi32(there, row + c * 4) : bits_of<__m512i>(load16(row, c, a.kind));
            }
            transpose16(v);
            for (int64_t i = 0; i < std::min(LANES, words - c); i++) _mm512_store_si512(to + (c + i) * KEYS + n, v[i]);
        }
}

// The same of values: a step is all columns of one value, or of a pair of values.
template <bool PAIRS>
void lay_out_values(const Attention& a, const char* value, int64_t count, uint32_t* to) {
    const int64_t size = size_of(a.kind);
    for (int64_t n = 0; n < KEYS; n += PAIRS ? 2 : 1, to += a.value_width) {
        auto row = [&](int64_t n) { return value + n * a.value_strides[2] * size; };
        for (int64_t c = 0; c < a.value_width; c += LANES) {
            auto half = [&](int64_t n) { return n < count ? widen(load<u16x16>(row(n) + c * size)) : u32x16{}; };
            if (PAIRS) store(to + c, half(n) | half(n + 1) << 16);
            else store(to + c, n < count ? load16(row(n), c, a.kind) : f32x16{});
        }
    }
}

// Scores of rows r … r + M - 1 of a piece, scaled, capped and masked, and the largest of each row.
template <bool PAIRS>
INLINE void score_block(const Attention& a, const Piece& piece, int64_t r, int64_t n, int64_t count,
                        const uint64_t* bits, const uint32_t* query, const uint32_t* keys, float (*scores)[KEYS],
                        float* tops) {
    const int64_t words = PAIRS ? a.width / 2 : a.width;
    __m512 score[M][4];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < 4; v++) score[m][v] = _mm512_setzero_ps();
    add_products<PAIRS, 4>(score, keys, KEYS, query, words, words);
    for (int m = 0; m < M; m++) {
        __m512 most = _mm512_set1_ps(NOTHING);
        const char* mask = a.mask && a.mask_kind != U8 && r + m < piece.rows ? piece.mask(a, r + m) : nullptr;
        for (int v = 0; v < 4; v++) {
            f32x16 s = bits_of<f32x16>(score[m][v]) * splat(a.scale);
            if (a.softcap) s = capped(s, a.softcap);
            if (mask && count > v * LANES) s = s + added(a, mask, n + v * LANES, count - v * LANES);
            const __m512 kept = _mm512_mask_mov_ps(_mm512_set1_ps(NOTHING), bits[m] >> v * LANES, bits_of<__m512>(s));
            _mm512_store_ps(scores[m] + v * LANES, kept);
            most = _mm512_max_ps(most, kept);
        }
        tops[m] = std::max(tops[m], _mm512_reduce_max_ps(most));
    }
}

// Rows r … r + M - 1 of a piece over one block of keys. Lines of `query`, `top`, `total` and `y` belong to them; what
// they have so far is scaled to the new top.
template <bool PAIRS>
void attend_block(const Attention& a, const Piece& piece, int64_t r, int64_t n, int64_t count, const uint64_t* bits,
                  const uint32_t* query, const uint32_t* keys, const uint32_t* values, float* top, float* total,
                  float* y) {
    alignas(64) float scores[M][KEYS], tops[LANES], bases[LANES], factors[LANES];
    std::memcpy(tops, top, sizeof tops);
    score_block<PAIRS>(a, piece, r, n, count, bits, query, keys, scores, tops);
    // While nothing is attended the top is -inf, and -inf less -inf is no number.
    for (int m = 0; m < LANES; m++) bases[m] = tops[m] == NOTHING ? 0 : tops[m];
    store(factors, exponential(load<f32x16>(top) - load<f32x16>(bases)));
    std::memcpy(top, tops, sizeof tops);
    constexpr int64_t STEPS = PAIRS ? KEYS / 2 : KEYS;
    alignas(64) uint32_t shares[M][STEPS];
    for (int m = 0; m < M; m++) {
        f32x16 sum = load<f32x16>(total + m * LANES) * splat(factors[m]);
        for (int v = 0; v < 4; v++) {
            const f32x16 share = exponential(load<f32x16>(scores[m] + v * LANES) - splat(bases[m]));
            sum = sum + share;
            store16(shares[m], v * LANES, PAIRS ? BF16 : F32, share);
        }
        store(total + m * LANES, sum);
    }
    auto mix = [&](auto vectors, int64_t c) __attribute__((always_inline)) {
        constexpr int V = decltype(vectors)::value;
        __m512 mixed[M][V];
        auto at = [&](int m, int v) { return y + m * a.value_width + c + v * LANES; };
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++)
                mixed[m][v] = _mm512_mul_ps(_mm512_load_ps(at(m, v)), _mm512_set1_ps(factors[m]));
        add_products<PAIRS, V>(mixed, values + c, a.value_width, shares[0], STEPS, STEPS);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) _mm512_store_ps(at(m, v), mixed[m][v]);
    };
    int64_t c = 0;
    for (; c + 4 * LANES <= a.value_width; c += 4 * LANES) mix(Count<4>(), c);
    for (; c < a.value_width; c += LANES) mix(Count<1>(), c);
}

template <bool PAIRS> void attend_piece(const Attention& a, const Piece& piece) {
    static thread_local Scratch scratch;
    const int64_t words = PAIRS ? a.width / 2 : a.width, size = size_of(a.kind), room = whole(piece.rows, M);
    const int64_t of_row = a.value_width + LANES + words + LANES / M + 1;
    float* y = scratch.get<float>(room * of_row + KEYS * (words + a.value_width));
    float *total = y + room * a.value_width, *top = total + room * LANES;
    uint32_t *keys = (uint32_t*)(top + room / M * LANES), *values = keys + KEYS * words;
    uint32_t* query = values + KEYS * a.value_width;
    std::fill(y, top, 0.0f);
    std::fill(top, (float*)keys, NOTHING);
    std::memset(query, 0, room * words * sizeof(uint32_t));
    auto at = [&](const void* of, const int64_t* strides, int64_t head, int64_t row) {
        return (const char*)of + (piece.b * strides[0] + head * strides[1] + row * strides[2]) * size;
    };
    for (int64_t r = 0; r < piece.rows; r++) {
        const char* from = at(a.query, a.query_strides, piece.head(a, r), piece.position(r));
        if (PAIRS) std::memcpy(query + r * words, from, words * sizeof(uint32_t));
        else to_floats((float*)query + r * words, from, a.width, a.kind);
    }
    const auto [low, high] = attended(a, piece);
    for (int64_t n = low / KEYS * KEYS; n < high; n += KEYS) {
        const int64_t count = std::min(KEYS, a.keys - n);
        bool ready = false;
        for (int64_t r = 0; r < piece.rows; r += M) {
            uint64_t bits[M] = {}, any = 0;
            for (int m = 0; m < M && r + m < piece.rows; m++) any |= bits[m] = seen(a, piece, r + m, n, count);
            if (!any) continue;
            if (!std::exchange(ready, true)) {
                lay_out_keys<PAIRS>(a, at(a.key, a.key_strides, piece.kv_head, n), count, keys);
                lay_out_values<PAIRS>(a, at(a.value, a.value_strides, piece.kv_head, n), count, values);
            }
            attend_block<PAIRS>(a, piece, r, n, count, bits, query + r * words, keys, values, top + r / M * LANES,
                                total + r * LANES, y + r * a.value_width);
        }
    }
    for (int64_t r = 0; r < piece.rows; r++) {
        const float all = sum(load<f32x16>(total + r * LANES));
        const f32x16 scale = splat(all == 0 ? 0 : 1 / all);  // rows that attend to nothing are zeros
        const int64_t to = ((piece.b * a.length + piece.position(r)) * a.heads + piece.head(a, r)) * a.value_width;
        for (int64_t c = 0; c < a.value_width; c += LANES)
            store16(a.out, to + c, a.kind, load<f32x16>(y + r * a.value_width + c) * scale);
    }
}

// As many as keep ROWS rows, or fewer, so that no thread is left without work.
int64_t positions_of_piece(const Attention& a, int64_t threads) {
    int64_t positions = std::max<int64_t>(1, ROWS / a.groups());
    const int64_t all = a.batch * a.kv_heads;
    while (positions > 16 && all * ((a.length + positions - 1) / positions) < 4 * threads) positions /= 2;
    return positions;
}

// What one thread of a team does; the output is (batch, length, heads, value width).
void attend_pieces(const Attention& a, Shares& shares, int64_t positions, int64_t thread) {
    const int64_t pieces = (a.length + positions - 1) / positions;
    for (int64_t i, behind; shares.take(thread, i, behind);) {
        const int64_t head = i / pieces, first = i % pieces * positions;
        const int64_t count = std::min(positions, a.length - first);
        const Piece piece = {head / a.kv_heads, head % a.kv_heads, first, count, count * a.groups()};
#ifdef HAS_BF16_DOT
        if (a.kind == BF16) {
            attend_piece<true>(a, piece);
            continue;
        }
#endif
        attend_piece<false>(a, piece);
    }
}

}  // namespace
#endif
