// What happens between two steps of decoding: the likeliest token of each row of scores is appended to texts
// (qcompile/decode_state.py), as torch's ops would do it, and lengths grow.

namespace {

struct Banned {
    const int64_t *tokens, *least;  // in the order of the tokens; of each, the length before which it may not come
    int64_t count;
};

// The first `count` of sixteen, and the first one again in the other places.
f32x16 lacking(const char* base, int64_t index, int64_t count, int kind) {
    float each[LANES];
    store(each, load_some(base, index, count, kind));
    std::fill(each + count, each + LANES, each[0]);
    return load<f32x16>(each);
}

// Where the first of the largest of these numbers is; of what is no number, the first. What is banned counts as -inf.
int64_t likeliest(const void* row, int64_t count, int kind, const Banned& banned, int64_t length) {
    constexpr int64_t CHUNK = 512;  // is searched number by number, if it has the largest
    float top = -std::numeric_limits<float>::infinity();
    int64_t chunk = 0, behind = 0;
    bool is_none = false;
    const char* base = (const char*)row;
    auto look = [&](int64_t first, int64_t last) {
        f32x16 tops = splat(top);
        u32x16 none{};
        for (int64_t i = first; i < last; i += LANES) {
            const f32x16 v = last - i < LANES ? lacking(base, i, last - i, kind) : load16(base, i, kind);
            tops = max(tops, v);
            none = none | ((bits_of<u32x16>(v) & 0x7fffffff) > 0x7f800000);
        }
        float each[LANES];
        store(each, tops);
        const float largest = *std::max_element(each, each + LANES);
        is_none = !all_are(none, 0);
        if (largest > top || is_none) top = largest, chunk = first, behind = last;
    };
    int64_t first = 0;
    for (int64_t b = 0; b <= banned.count && !is_none; b++) {
        const int64_t end = b < banned.count ? banned.tokens[b] : count;
        if (end < first || (b < banned.count && length >= banned.least[b])) continue;
        for (; first < end && !is_none; first = std::min(first + CHUNK, end)) look(first, std::min(first + CHUNK, end));
        first = end + 1;
    }
    for (int64_t i = chunk; i < behind; i++) {
        const float v = load_some(base, i, 1, kind).piece[0][0];
        if (is_none ? v != v : v == top) return i;
    }
    return 0;
}

}  // namespace

extern "C" void put_likeliest(const void* scores, int64_t rows, int64_t stride, int64_t count, int kind,
                              const int64_t* banned, const int64_t* least, int64_t bans, int64_t* text, int64_t room,
                              int64_t* at, int64_t* token, bool* unfinished, const int64_t* pad, const int64_t* ends,
                              int64_t end_count) {
    for (int64_t m = 0; m < rows; m++) {
        const char* row = (const char*)scores + m * stride * size_of(kind);
        int64_t best = likeliest(row, count, kind, {banned, least, bans}, *at);
        if (pad && !unfinished[m]) best = *pad;
        token[m] = text[m * room + *at] = best;
        if (std::find(ends, ends + end_count, best) != ends + end_count) unfinished[m] = false;
    }
    ++*at;
}

extern "C" void add_to_each(int64_t* const* numbers, int64_t count, int64_t added) {
    for (int64_t i = 0; i < count; i++) *numbers[i] += added;
}
