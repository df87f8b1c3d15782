// What happens between two steps of decoding: the likeliest token of each row of scores is appended to texts
// (qcompile/decode_state.py), as torch's ops would do it, and lengths grow. Both are bound to their memory.

#include <vector>

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

// The scores of each text's next token.
struct Scores {
    const char* at;
    int64_t rows, stride, count;
    int kind;
};

// What was given its memory once. A bound chain does it behind itself, on its result, where it is told to.
struct Follower {
    virtual ~Follower() = default;
    virtual void follow(const Scores& scores) = 0;
};

// Texts, and what is asked of their next tokens: see State in qcompile/decode_state.py.
struct Likeliest : Follower {
    Banned banned;
    int64_t *text, room, *at, *token;
    bool* unfinished;
    const int64_t *pad, *ends;
    int64_t end_count;

    void follow(const Scores& scores) override {
        for (int64_t m = 0; m < scores.rows; m++) {
            const char* row = scores.at + m * scores.stride * size_of(scores.kind);
            int64_t best = likeliest(row, scores.count, scores.kind, banned, *at);
            if (pad && !unfinished[m]) best = *pad;
            token[m] = text[m * room + *at] = best;
            if (std::find(ends, ends + end_count, best) != ends + end_count) unfinished[m] = false;
        }
        ++*at;
    }
};

// Numbers that grow by as much each time.
struct Lengths : Follower {
    std::vector<int64_t*> numbers;
    int64_t added;

    void follow(const Scores&) override {
        for (int64_t* number : numbers) *number += added;
    }
};

}  // namespace

extern "C" Follower* bind_likeliest(const int64_t* banned, const int64_t* least, int64_t bans, int64_t* text,
                                    int64_t room, int64_t* at, int64_t* token, bool* unfinished, const int64_t* pad,
                                    const int64_t* ends, int64_t end_count) {
    auto bound = new Likeliest;
    bound->banned = {banned, least, bans}, bound->text = text, bound->room = room, bound->at = at, bound->token = token;
    bound->unfinished = unfinished, bound->pad = pad, bound->ends = ends, bound->end_count = end_count;
    return bound;
}
extern "C" Follower* bind_lengths(int64_t* const* numbers, int64_t count, int64_t added) {
    auto bound = new Lengths;
    bound->numbers.assign(numbers, numbers + count), bound->added = added;
    return bound;
}
extern "C" void run_follower(Follower* bound, const void* scores, int64_t rows, int64_t stride, int64_t count, int kind) {
    bound->follow({(const char*)scores, rows, stride, count, kind});
}
extern "C" void release_follower(Follower* bound) { delete bound; }
