// Rotary embedding of queries and keys, and the writing of keys and values to a cache, as a team of threads does it.

namespace {

struct Rope {
    const void *query, *key, *value, *cos, *sin;
    const int64_t* positions;
    void *keys, *values, *out;
    int64_t batch, heads, kv_heads, length, width, value_width;
    // Of batch, head and row; angles have no heads.
    int64_t query_strides[3], key_strides[3], value_strides[3], keys_strides[3], values_strides[3], angle_strides[2][2];
    int kind, angle_kind;

    int64_t work() const { return batch * (heads + 2 * kv_heads) * length * width; }
    int64_t bytes(int64_t) const { return 0; }
    void begin(void*, int64_t threads) { this->threads = threads; }
    void prefetch(int64_t) const {}
    void run(int64_t thread) {
        const int64_t each = heads + 2 * kv_heads, all = batch * each * length;
        for (int64_t i = all * thread / threads; i < all * (thread + 1) / threads; i++) {
            const int64_t b = i / length / each, head = i / length % each, row = i % length;
            const int64_t kv_head = (head - heads) % kv_heads;
            auto at = [&](const void* base, const int64_t* strides, int64_t head, int64_t row) {
                return (char*)base + (b * strides[0] + head * strides[1] + row * strides[2]) * size_of(kind);
            };
            auto turn = [&](const char* from, char* to) { this->turn(from, to, b, row); };
            if (head < heads)
                turn(at(query, query_strides, head, row), (char*)out + ((b * heads + head) * length + row) * width * size_of(kind));
            else if (head < heads + kv_heads)
                turn(at(key, key_strides, kv_head, row), at(keys, keys_strides, kv_head, positions[row]));
            else
                std::memcpy(at(values, values_strides, kv_head, positions[row]), at(value, value_strides, kv_head, row),
                            value_width * size_of(kind));
        }
    }

  private:
    int64_t threads;

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
