// Rotary embedding of queries and keys, and the writing of keys and values to a cache, as a team of threads does it. A
// cache of codes gets what quantize_rows makes of them or, where its scales are fixed, quantize_rows_by.

#include <stdexcept>

namespace {

struct Rope {
    const void *query, *key, *value, *cos, *sin;
    const int64_t* positions;
    void *keys, *values, *out;
    float *key_scales, *value_scales;  // null, or of each token and head
    int64_t batch, heads, kv_heads, length, width, value_width, room;
    // Of batch, head and row; angles have no heads.
    int64_t query_strides[3], key_strides[3], value_strides[3], keys_strides[3], values_strides[3], angle_strides[2][2];
    int64_t scale_strides[2][3];
    int kind, cache_kind, angle_kind;
    bool fixed;

    int64_t work() const { return batch * (heads + 2 * kv_heads) * length * width; }
    void check_positions() const {
        for (int64_t i = 0; i < length; i++)
            if (positions[i] < 0 || positions[i] >= room)
                throw std::runtime_error("index out of bounds: a position is not in the cache");
    }
    int64_t bytes(int64_t) const { return 0; }
    void begin(void*, int64_t threads) { this->threads = threads; }
    void prefetch(int64_t) const {}
    void run(int64_t thread, Meeting&) {
        const int64_t each = heads + 2 * kv_heads, all = batch * each * length;
        for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
            const int64_t b = i / length / each, head = i / length % each, row = i % length;
            const int64_t kv_head = (head - heads) % kv_heads;
            auto in = [&](const void* base, const int64_t* strides, int64_t head) {
                return (char*)base + (b * strides[0] + head * strides[1] + row * strides[2]) * size_of(kind);
            };
            auto cached = [&](auto* base, const int64_t* strides, int64_t size) {
                return base + (b * strides[0] + kv_head * strides[1] + positions[row] * strides[2]) * size;
            };
            auto turn = [&](const char* from, char* to) { this->turn(from, to, b, row); };
            if (head < heads) {
                turn(in(query, query_strides, head), (char*)out + ((b * heads + head) * length + row) * width * size_of(kind));
            } else if (head < heads + kv_heads) {
                static thread_local Scratch turned;
                char* row = cached((char*)keys, keys_strides, size_of(cache_kind));
                char* to = key_scales ? turned.get<char>(width * size_of(kind)) : row;
                turn(in(key, key_strides, kv_head), to);
                if (key_scales) encode(to, row, width, cached(key_scales, scale_strides[0], 1));
            } else {
                const char* from = in(value, value_strides, kv_head);
                char* row = cached((char*)values, values_strides, size_of(cache_kind));
                if (value_scales) encode(from, row, value_width, cached(value_scales, scale_strides[1], 1));
                else std::memcpy(row, from, value_width * size_of(kind));
            }
        }
    }

  private:
    int64_t threads;

    // Numbers to codes, by their scale or one that is made.
    void encode(const char* from, char* to, int64_t count, float* scale) const {
        if (!fixed) {
            f32x16 top{}, nothing{};  // what is no number shows in the sum, not in the maximum
            each_columns(count, [&](int64_t i, int64_t some) {
                const f32x16 v = read(from, i, some, kind);
                top = max(top, max(v, splat(0) - v)), nothing = nothing + v * 0;
            });
            float each[LANES];
            store(each, top);
            const float largest = *std::max_element(each, each + LANES) + sum(nothing);
            const float made = largest / (cache_kind == I8 ? 127.0f : 448.0f);
            *scale = made < std::numeric_limits<float>::min() ? std::numeric_limits<float>::min() : made;
        }
        each_columns(count, [&](int64_t i, int64_t some) {
            const f32x16 v = read(from, i, some, kind) / splat(*scale);
            store_bytes(to + i, some, cache_kind == I8 ? to_i8(v) : to_e4m3(v));
        });
    }

    void turn(const char* from, char* to, int64_t b, int64_t row) const {
        const int64_t half = width / 2;
        auto angles = [&](const void* base, int which) {
            return (const char*)base + (b * angle_strides[which][0] + row * angle_strides[which][1]) * size_of(angle_kind);
        };
        const char *c = angles(cos, 0), *s = angles(sin, 1);
        each_columns(half, [&](int64_t i, int64_t count) {
            const f32x16 low = read(from, i, count, kind), high = read(from, half + i, count, kind);
            auto angle = [&](const char* of, int64_t i) { return read(of, i, count, angle_kind); };
            write(to, i, count, kind, low * angle(c, i) - high * angle(s, i));
            write(to, half + i, count, kind, high * angle(c, half + i) + low * angle(s, half + i));
        });
    }
};

}  // namespace
