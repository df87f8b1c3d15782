// Attention of a few query rows over keys and values that are read once for all heads that share them.
//
// Of each sequence and key/value head the keys from the first to the last that anyone attends to are taken in parts,
// each in two passes: scores into a buffer, then their exponentials times the values. (Dao et al. 2023, flash-decoding.)

#include <tuple>
#include <utility>

namespace {

constexpr int64_t PART = 512, SMALLEST_PART = 64;  // keys of a part, of a cache that is full

struct Attention {
    const void *query, *key, *value, *mask;
    const float *key_scale, *value_scale;  // null, or of each token and head, where keys and values are codes
    void* out;
    int64_t batch, heads, kv_heads, length, keys, width, value_width;
    int64_t query_strides[3], key_strides[3], value_strides[3], mask_strides[4], scale_strides[2][3];
    int mask_kind;
    float scale;
    float softcap;  // 0: scores are as they are
    bool is_causal = false;  // of prompts, instead of a mask
    int kind, cache_kind;  // of query and out, of key and value
    int64_t parts, threads;
    float* memory;  // of each row y of every part, then tops and sums
    Shares shares;

    int64_t groups() const { return heads / kv_heads; }
    int64_t rows() const { return groups() * length; }  // of a key/value head
    int64_t work() const { return batch * heads * length * keys * (width + value_width); }
    // As many as leave no thread without work: one where query rows are shared instead, see attend_alone.
    int64_t parts_for(int64_t threads) const {
        const int64_t all = batch * kv_heads, few = std::max<int64_t>(1, keys / PART);
        if (all * few >= 4 * threads || all * few % threads == 0) return few;
        if (few == 1 && all * rows() >= 4 * threads) return 1;
        return std::min(few * threads, std::max<int64_t>(1, keys / SMALLEST_PART));
    }
    // What a team needs.
    int64_t bytes(int64_t threads) const {
        return Shares::bytes(threads) + batch * kv_heads * rows() * parts_for(threads) * (value_width + 2) * sizeof(float);
    }
    void begin(void* memory, int64_t threads) {
        parts = parts_for(threads), this->threads = threads;
        shares.begin(memory, threads, batch * kv_heads * parts, 1);
        this->memory = (float*)((char*)memory + Shares::bytes(threads));
    }
    void prefetch(int64_t) const {}
    // What one thread of a team does of it.
    void run(int64_t thread, Meeting& meeting);
    // The mask of row r of a key/value head: query position r % length of head r / length of its group.
    const char* mask_row(int64_t b, int64_t kv_head, int64_t r) const {
        const int64_t head = kv_head * groups() + r / length;
        return (const char*)mask + (b * mask_strides[0] + head * mask_strides[1] + r % length * mask_strides[2]) *
                                       size_of(mask_kind);
    }
};

const float NOTHING = -std::numeric_limits<float>::infinity();

INLINE bool attends(const Attention& a, const char* mask, int64_t n) {
    return load_some(mask, n * a.mask_strides[3], 1, a.mask_kind).piece[0][0] != (a.mask_kind == U8 ? 0 : NOTHING);
}

// Which keys any of the rows r … behind - 1 attends to: from the first to the one behind the last.
std::pair<int64_t, int64_t> attended(const Attention& a, int64_t b, int64_t kv_head, int64_t r, int64_t behind) {
    if (!a.mask) return {0, a.keys};
    int64_t first = a.keys, last = 0;
    const char* before = nullptr;
    for (; r < behind; r++) {
        const char* mask = a.mask_row(b, kv_head, r);
        if (mask == std::exchange(before, mask)) continue;
        const bool skips = a.mask_strides[3] == 1;
        const uint32_t nothing = a.mask_kind == U8 ? 0 : bits_of<uint32_t>(NOTHING);
        auto is_empty = [&](int64_t n) { return all_are(bits_of<u32x16>(load16(mask, n, a.mask_kind)), nothing); };
        int64_t low = 0, high = a.keys;
        while (skips && low + LANES <= first && is_empty(low)) low += LANES;
        while (low < first && !attends(a, mask, low)) low++;
        while (skips && high - LANES >= last && high >= LANES && is_empty(high - LANES)) high -= LANES;
        while (high > last && !attends(a, mask, high - 1)) high--;
        first = std::min(first, low), last = std::max(last, high);
    }
    return {first, last};
}

// The hardware, which reads ahead, is late for the few keys of a head.
constexpr int64_t AHEAD = 32;  // rows
INLINE void fetch_row(const char* at, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// So many keys are multiplied side by side: sums of four vectors at once take as long as those of one or two.
#ifdef HAS_AVX512
constexpr int64_t KEYS_AT_ONCE = 4;
INLINE void store_sums(float* to, const f32x16 (&v)[4], float scale) {
    auto vector = [&](int i) { return bits_of<__m512>(v[i]); };
    store(to, _mm_mul_ps(sums4(vector(0), vector(1), vector(2), vector(3)), _mm_set1_ps(scale)));
}
#else
constexpr int64_t KEYS_AT_ONCE = 1;
INLINE void store_sums(float* to, const f32x16 (&v)[1], float scale) { *to = sum(v[0]) * scale; }
#endif

// scores[m * room + n] = scale times the sum of query row m times key n. add(total, key) adds the products of a key.
template <int KIND, int M, typename Add>
INLINE void each_keys(const char* key, int64_t stride, int64_t width, int64_t count, float scale, float* scores,
                      int64_t room, Add add) {
    for (int64_t n = 0; n < count; n += KEYS_AT_ONCE) {
        f32x16 total[M][KEYS_AT_ONCE] = {};
#pragma GCC unroll 4
        for (int i = 0; i < KEYS_AT_ONCE; i++) {
            const char* at = key + std::min(n + i, count - 1) * stride * size_of(KIND);
            fetch_row(at + AHEAD * stride * size_of(KIND), width * size_of(KIND));
            add(total, i, at);
        }
        for (int m = 0; m < M; m++) store_sums(scores + m * room + n, total[m], scale);
    }
}

template <int KIND, int M>
void multiply_keys(const float* query, const char* key, int64_t stride, int64_t width, int64_t count, float scale,
                   float* scores, int64_t room) {
    auto add = [&](auto& total, int i, const char* at) __attribute__((always_inline)) {
        f32x16 k[4];
        int64_t c = 0;
        for (; c + 4 * LANES <= width; c += 4 * LANES) {
            load64<KIND>(at, c, k);
            for (int v = 0; v < 4; v++)
                for (int m = 0; m < M; m++)
                    total[m][i] = multiply_add(k[v], load<f32x16>(query + m * width + c + v * LANES), total[m][i]);
        }
        for (; c < width; c += LANES) {
            k[0] = load_row<KIND>(at, c);
            for (int m = 0; m < M; m++)
                total[m][i] = multiply_add(k[0], load<f32x16>(query + m * width + c), total[m][i]);
        }
    };
    each_keys<KIND, M>(key, stride, width, count, scale, scores, room, add);
}

#ifdef HAS_BF16_DOT
// The same of queries and keys in bfloat16, in pairs of columns.
template <int M>
void multiply_keys(const char* const* query, const char* key, int64_t stride, int64_t width, int64_t count, float scale,
                   float* scores, int64_t room) {
    constexpr int64_t PAIRS = 2 * LANES;
    auto load_pairs = [&](const char* from, int64_t c) __attribute__((always_inline)) {
        const char* at = from + c * 2;
        return bits_of<__m512bh>(width - c >= PAIRS ? load<__m512i>(at) : _mm512_zextsi256_si512(load<__m256i>(at)));
    };
    auto add = [&](auto& total, int i, const char* at) __attribute__((always_inline)) {
        for (int64_t c = 0; c < width; c += PAIRS) {
            const __m512bh k = load_pairs(at, c);
            for (int m = 0; m < M; m++)
                total[m][i] = bits_of<f32x16>(
                    _mm512_dpbf16_ps(bits_of<__m512>(total[m][i]), k, load_pairs(query[m], c)));
        }
    };
    each_keys<BF16, M>(key, stride, width, count, scale, scores, room, add);
}
#endif

// y[m * width + c] = sum over n of shares[m * room + n] times value n, for 1 or 4 vectors of columns
template <int KIND, int M, int C>
void mix_values(const float* shares, int64_t room, const char* value, int64_t stride, int64_t count, float* y,
                int64_t width) {
    f32x16 total[M][C] = {};
    for (int64_t n = 0; n < count; n++, value += stride * size_of(KIND)) {
        fetch_row(value + AHEAD * stride * size_of(KIND), C * LANES * size_of(KIND));
        f32x16 v[C];
        if constexpr (C == 4) load64<KIND>(value, 0, v);
        else v[0] = load_row<KIND>(value, 0);
        for (int c = 0; c < C; c++)
            for (int m = 0; m < M; m++) total[m][c] = multiply_add(v[c], splat(shares[m * room + n]), total[m][c]);
    }
    for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) store(y + m * width + c * LANES, total[m][c]);
}

// softcap * tanh(score / softcap)
INLINE f32x16 capped(f32x16 score, float softcap) {
    const f32x16 part = exponential(max(score, splat(0) - score) * splat(-2 / softcap));
    const f32x16 high = (splat(softcap) - part * softcap) / (part + 1);
    return bits_of<f32x16>(bits_of<u32x16>(high) | (bits_of<u32x16>(score) & 0x80000000u));
}

// Scores to exponentials of their distance to the largest, which is returned with the sum of them. Scales of keys and
// of values, where there are any, are multiplied to the scores and to what becomes of them.
std::pair<float, float> weigh(const Attention& a, float* scores, int64_t count, const char* mask, int64_t first,
                              const float* of_keys, const float* of_values) {
    for (int64_t n = 0; of_keys && n < count; n += LANES)
        store(scores + n, load<f32x16>(scores + n) * load_some(of_keys, n, std::min(LANES, count - n), F32));
    for (int64_t n = 0; a.softcap && n < count; n += LANES)
        store(scores + n, capped(load<f32x16>(scores + n), a.softcap));
    std::fill(scores + count, scores + whole(count), NOTHING);
    f32x16 tops = splat(NOTHING), sums{};
    for (int64_t n = 0; n < count; n += LANES) {
        f32x16 score = load<f32x16>(scores + n);
        if (mask) {
            const int64_t some = std::min(LANES, count - n);
            f32x16 added = a.mask_strides[3] ? load_some(mask, first + n, some, a.mask_kind)
                                             : splat(load_some(mask, 0, 1, a.mask_kind).piece[0][0]);
            if (a.mask_kind == U8) added = bits_of<f32x16>((bits_of<u32x16>(added) < 1) & bits_of<uint32_t>(NOTHING));
            score = score + added;
            store(scores + n, score);
        }
        tops = max(tops, score);
    }
    float each[LANES];
    store(each, tops);
    const float top = *std::max_element(each, each + LANES);
    // While nothing is attended the top is -inf, and -inf less -inf is no number.
    const f32x16 base = splat(top == NOTHING ? 0 : top);
    for (int64_t n = 0; n < count; n += LANES) {
        f32x16 share = exponential(load<f32x16>(scores + n) - base);
        sums = sums + share;
        if (of_values) share = share * load_some(of_values, n, std::min(LANES, count - n), F32);
        store(scores + n, share);
    }
    return {top, sum(sums)};
}

// Rows r … r + M - 1 of a key/value head over keys first … last - 1; tops, sums and y of each.
template <int KIND, int M>
void attend_rows(const Attention& a, int64_t b, int64_t kv_head, int64_t r, int64_t first, int64_t last, float* top,
                 float* total, float* y) {
    static thread_local Scratch scratch;
    const int64_t count = last - first, room = whole(count);
    float* scores = scratch.get<float>(M * (room + a.width));
    const int64_t size = size_of(KIND), *q = a.query_strides, *k = a.key_strides, *v = a.value_strides;
    const char *query[M], *key = (const char*)a.key + (b * k[0] + kv_head * k[1] + first * k[2]) * size;
    for (int m = 0; m < M; m++) {
        const int64_t head = kv_head * a.groups() + (r + m) / a.length, row = (r + m) % a.length;
        query[m] = (const char*)a.query + (b * q[0] + head * q[1] + row * q[2]) * size_of(a.kind);
    }
#ifdef HAS_BF16_DOT
    if constexpr (KIND == BF16)
        multiply_keys<M>(query, key, k[2], a.width, count, a.scale, scores, room);
    else
#endif
    {
        float* floats = scores + M * room;
        for (int m = 0; m < M; m++) to_floats(floats + m * a.width, query[m], a.width, a.kind);
        multiply_keys<KIND, M>(floats, key, k[2], a.width, count, a.scale, scores, room);
    }
    auto scales = [&](const float* all, const int64_t* s) {
        return all ? all + b * s[0] + kv_head * s[1] + first : all;
    };
    const float* of_keys = scales(a.key_scale, a.scale_strides[0]);
    const float* of_values = scales(a.value_scale, a.scale_strides[1]);
    for (int m = 0; m < M; m++) {
        const char* mask = a.mask ? a.mask_row(b, kv_head, r + m) : nullptr;
        std::tie(top[m], total[m]) = weigh(a, scores + m * room, count, mask, first, of_keys, of_values);
    }
    const char* value = (const char*)a.value + (b * v[0] + kv_head * v[1] + first * v[2]) * size;
    int64_t c = 0;
    for (; c + 4 * LANES <= a.value_width; c += 4 * LANES)
        mix_values<KIND, M, 4>(scores, room, value + c * size, v[2], count, y + c, a.value_width);
    for (; c < a.value_width; c += LANES)
        mix_values<KIND, M, 1>(scores, room, value + c * size, v[2], count, y + c, a.value_width);
}

// As many of rows r … behind - 1 of a key/value head as fit into registers; gives their number. `top`, `total` and `y` are
// those of row r.
template <int KIND>
int64_t attend_some(const Attention& a, int64_t b, int64_t kv_head, int64_t r, int64_t behind, int64_t first, int64_t last,
                    float* top, float* total, float* y) {
    auto run = [&](auto most) {
        constexpr int M = decltype(most)::value;
        attend_rows<KIND, M>(a, b, kv_head, r, first, last, top, total, y);
        return M;
    };
    const int64_t left = behind - r;
    return left >= 4 ? run(Count<4>()) : left == 3 ? run(Count<3>()) : left == 2 ? run(Count<2>()) : run(Count<1>());
}

// Rows over all keys, without a part in which to wait for others: the threads have as many rows each, of a few
// neighbouring key/value heads.
template <int KIND> void attend_alone(const Attention& a, int64_t thread) {
    static thread_local Scratch scratch;
    float *y = scratch.get<float>(4 * a.value_width), top[4], total[4];
    const int64_t rows = a.rows(), all = a.batch * a.kv_heads * rows, end = all * (thread + 1) / a.threads;
    for (int64_t row = all * thread / a.threads; row < end;) {
        const int64_t head = row / rows, b = head / a.kv_heads, kv_head = head % a.kv_heads, begin = head * rows;
        const int64_t behind = std::min(rows, end - begin);
        const auto [first, last] = attended(a, b, kv_head, row - begin, behind);
        for (int64_t r = row - begin; r < behind;) {
            const int64_t count = attend_some<KIND>(a, b, kv_head, r, behind, first, std::max(first, last), top, total, y);
            for (int64_t m = 0; m < count; m++)
                for (int64_t c = 0; c < a.value_width; c += LANES) {
                    // Rows that attend to nothing are zeros.
                    const f32x16 scale = splat(total[m] == 0 ? 0 : 1 / total[m]);
                    const f32x16 made = load<f32x16>(y + m * a.value_width + c) * scale;
                    store16(a.out, (begin + r + m) * a.value_width + c, a.kind, made);
                }
            r += count;
        }
        row = begin + behind;
    }
}

template <int KIND>
void attend(Attention& a, int64_t thread, Meeting& meeting) {
    if (a.parts == 1) return attend_alone<KIND>(a, thread);
    const int64_t parts = a.parts, rows = a.rows(), heads = a.batch * a.kv_heads;
    float *ys = a.memory, *tops = ys + heads * rows * parts * a.value_width, *sums = tops + heads * rows * parts;
    for (int64_t i, behind; a.shares.take(thread, i, behind);) {
        const int64_t head = i / parts, part = i % parts, b = head / a.kv_heads, kv_head = head % a.kv_heads;
        const auto [low, high] = attended(a, b, kv_head, 0, rows);
        const int64_t each = (std::max<int64_t>(0, high - low) + parts - 1) / parts;
        const int64_t first = std::min(low + part * each, high), last = std::min(first + each, high);
        for (int64_t r = 0; r < rows;) {
            const int64_t at = i * rows + r;
            r += attend_some<KIND>(a, b, kv_head, r, rows, first, last, tops + at, sums + at, ys + at * a.value_width);
        }
    }
    meeting.wait();
    for (int64_t row = heads * rows * thread / a.shares.threads; row < heads * rows * (thread + 1) / a.shares.threads;
         row++) {
        auto at = [&](int64_t part) { return (row / rows * parts + part) * rows + row % rows; };
        float top = NOTHING, total = 0;
        for (int64_t part = 0; part < parts; part++) top = std::max(top, tops[at(part)]);
        auto weight = [&](int64_t part) { return top == NOTHING ? 0 : std::exp(tops[at(part)] - top); };
        for (int64_t part = 0; part < parts; part++) total += sums[at(part)] * weight(part);
        // Rows that attend to nothing are zeros.
        const float scale = total == 0 ? 0 : 1 / total;
        for (int64_t c = 0; c < a.value_width; c += LANES) {
            f32x16 y{};
            for (int64_t part = 0; part < parts; part++)
                y = multiply_add(load<f32x16>(ys + at(part) * a.value_width + c), splat(weight(part) * scale), y);
            store16(a.out, row * a.value_width + c, a.kind, y);
        }
    }
}

void Attention::run(int64_t thread, Meeting& meeting) {
    if (cache_kind == F32) attend<F32>(*this, thread, meeting);
    else if (cache_kind == BF16) attend<BF16>(*this, thread, meeting);
    else if (cache_kind == F16) attend<F16>(*this, thread, meeting);
    else if (cache_kind == I8) attend<I8>(*this, thread, meeting);
    else attend<E4M3>(*this, thread, meeting);
}

}  // namespace
