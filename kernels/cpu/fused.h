// What stands around a linear of a few rows: the norm and the rounding before it, its gate and its residual.

#include <algorithm>
#include <cmath>
#include <optional>
#include <string>

namespace {

// Use(c, count) for sixteen columns at a time, and for the rest.
template <typename Use> INLINE void each_columns(int64_t columns, Use use) {
    for (int64_t c = 0; c < columns; c += LANES) use(c, std::min(LANES, columns - c));
}
INLINE f32x16 read(const void* from, int64_t c, int64_t count, int kind) {
    return count == LANES ? load16(from, c, kind) : load_some(from, c, count, kind);
}
INLINE void write(void* to, int64_t c, int64_t count, int kind, f32x16 v) {
    count == LANES ? store16(to, c, kind, v) : store_some(to, c, count, kind, v);
}

// One row of rms_norm, rounded to the kind of x.
void norm_row(const void* x, void* to, int64_t columns, int kind, const void* weight, int weight_kind, float eps,
              float weight_offset) {
    f32x16 squares{};
    each_columns(columns, [&](int64_t c, int64_t count) {
        const f32x16 v = read(x, c, count, kind);
        squares = multiply_add(v, v, squares);
    });
    const f32x16 factor = splat(1 / std::sqrt(sum(squares) / columns + eps));
    each_columns(columns, [&](int64_t c, int64_t count) {
        f32x16 v = read(x, c, count, kind) * factor;
        if (weight) v = v * (read(weight, c, count, weight_kind) + weight_offset);
        write(to, c, count, kind, v);
    });
}

// One row rounded to 255 multiples of a step, as i8/token/dynamic (qcompile/quant/activation.py), in the kind of x.
void round_row(const void* x, void* to, int64_t columns, int kind) {
    f32x16 most{};
    u32x16 none{};  // whether there is what is not finite, which max may lose
    each_columns(columns, [&](int64_t c, int64_t count) {
        const u32x16 size = bits_of<u32x16>(read(x, c, count, kind)) & 0x7fffffff;
        most = max(most, bits_of<f32x16>(size));
        none = none | (size >= 0x7f800000);
    });
    float each[LANES];
    store(each, most);
    const float largest = *std::max_element(each, each + LANES), step = largest == 0 ? 1 : largest / 127;
    // Beside an infinite number all others are zeros of an infinite step.
    const uint32_t nan = all_are(none, 0) ? 0 : 0x7fc00000;
    each_columns(columns, [&](int64_t c, int64_t count) {
        const f32x16 code = to_floats(to_i8(read(x, c, count, kind) / splat(step)));
        write(to, c, count, kind, bits_of<f32x16>(bits_of<u32x16>(code * splat(step)) | nan));
    });
}

// x / (1 + e^-z), which an activation is: z is made of x.
enum Activation : int { SILU, QUICK_GELU, GELU_TANH };
std::optional<Activation> activation_of(const std::string& name) {
    if (name == "silu") return SILU;
    if (name == "quick_gelu") return QUICK_GELU;
    if (name == "gelu_tanh") return GELU_TANH;
    return std::nullopt;
}
INLINE f32x16 activate(f32x16 x, Activation activation) {
    f32x16 z = x;
    if (activation == QUICK_GELU) z = x * splat(1.702f);
    if (activation == GELU_TANH) z = x * multiply_add(x * x, splat(0.0713548163f), splat(1.59576912f));
    const u32x16 is_negative = bits_of<u32x16>(z) >= 0x80000000u;
    const f32x16 e = exponential(bits_of<f32x16>(bits_of<u32x16>(z) | 0x80000000));
    const u32x16 share = (bits_of<u32x16>(e) & is_negative) | (bits_of<u32x16>(splat(1)) & ~is_negative);
    return x * bits_of<f32x16>(share) / (e + 1.0f);
}

// act(gate) * up, or act(gate) alone.
void activate_row(const void* gate, const void* up, void* to, int64_t columns, int kind, Activation activation) {
    each_columns(columns, [&](int64_t c, int64_t count) {
        f32x16 v = activate(read(gate, c, count, kind), activation);
        if (up) v = v * read(up, c, count, kind);
        write(to, c, count, kind, v);
    });
}

void add_row(void* y, const void* residual, int64_t columns, int kind) {
    each_columns(columns, [&](int64_t c, int64_t count) {
        write(y, c, count, kind, read(y, c, count, kind) + read(residual, c, count, kind));
    });
}

}  // namespace
