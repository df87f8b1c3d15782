// The codes of a packed row, and a weight as the caller passes it.

namespace {

// The planes of packing.py: widths, and where in a code their bits go.
constexpr int PLANES = BITS == 7 ? 3 : BITS == 3 || BITS == 5 || BITS == 6 ? 2 : 1;
constexpr int width_of(int plane) {
    return BITS == 3 ? (plane == 0 ? 2 : 1) : BITS == 5 ? (plane == 0 ? 4 : 1) : BITS == 6 ? (plane == 0 ? 4 : 2)
         : BITS == 7 ? (plane == 0 ? 4 : plane == 1 ? 2 : 1) : BITS;
}
constexpr int low_of(int plane) { return plane == 0 ? 0 : low_of(plane - 1) + width_of(plane - 1); }
constexpr int64_t plane_bytes(int plane, int64_t columns) {
    int64_t codes = 128 / width_of(plane);
    return (columns + codes - 1) / codes * 16;
}
// Blocks of sixteen codes after which the shifts repeat.
constexpr int PERIOD = 8 / width_of(PLANES - 1);

struct Row {
    const uint8_t* plane[PLANES];

    Row() = default;
    INLINE Row(const uint8_t* at, int64_t columns) {
        for (int p = 0; p < PLANES; p++) {
            plane[p] = at;
            at += plane_bytes(p, columns);
        }
    }

    // The hardware reads ahead too timidly.
    INLINE void prefetch(int64_t block) const { __builtin_prefetch(plane[0] + block * 2 * BITS + 8192, 0, 2); }

    // Codes 16 * block … 16 * block + 15, where `phase` = block % PERIOD.
    INLINE u8x16 bytes(int64_t block, int phase) const {
        u16x8 codes{};  // shifted as words, since nothing shifts bytes; what crosses over is masked
        for (int p = 0; p < PLANES; p++) {
            const int width = width_of(p), fields = 8 / width;
            u16x8 v = load<u16x8>(plane[p] + block / fields * 16);
            if (width < 8) v = (v >> uint16_t(phase % fields * width)) & uint16_t(((1 << width) - 1) * 0x0101);
            codes |= v << uint16_t(low_of(p));
        }
        return bits_of<u8x16>(codes);
    }
    // The same as 32-bit integers: for constant phases, fewer shuffles.
    INLINE i32x16 words(int64_t block, int phase) const {
        i32x16 codes{};
        for (int p = 0; p < PLANES; p++) {
            const int width = width_of(p), fields = 8 / width;
            i32x16 v = widen(load<u8x16>(plane[p] + block / fields * 16));
            if (width < 8) v = (v >> (phase % fields * width)) & ((1 << width) - 1);
            codes = p ? codes | (v << low_of(p)) : v;
        }
        return codes;
    }
};

// What a code stands for: itself, or one of the table's sixteen numbers, or a float of EXPONENT and MANTISSA bits.
#ifdef TABLE
alignas(64) constexpr float NUMBERS[16] = TABLE;
#endif
#if defined(TABLE) || defined(MANTISSA)
constexpr bool IS_FLOAT = true;
#else
constexpr bool IS_FLOAT = false;
#endif

INLINE f32x16 numbers(i32x16 codes) {
#if defined(TABLE) && defined(HAS_AVX512)
    return bits_of<f32x16>(_mm512_permutexvar_ps(bits_of<__m512i>(codes), _mm512_load_ps(NUMBERS)));
#elif defined(TABLE)
    int32_t code[16];
    float number[16];
    std::memcpy(code, &codes, sizeof code);
    for (int i = 0; i < 16; i++) number[i] = NUMBERS[code[i] & 15];
    return load<f32x16>(number);
#elif defined(MANTISSA)
    // Both forms are computed: as bits of a float32 subnormal, a flushing processor would make zeros of small ones.
    const i32x16 size = codes & ((1 << (EXPONENT + MANTISSA)) - 1);
    const i32x16 sign = (codes & (1 << (EXPONENT + MANTISSA))) << (31 - EXPONENT - MANTISSA);
    const f32x16 small = to_floats(size) * splat(2.0f / (1 << MANTISSA) / (1 << BIAS));
    const i32x16 large = (size << (23 - MANTISSA)) + ((127 - BIAS) << 23);
    const u32x16 is_small = bits_of<u32x16>(size) < (1 << MANTISSA);
    return bits_of<f32x16>((is_small & bits_of<u32x16>(small)) | (~is_small & bits_of<u32x16>(large)) |
                           bits_of<u32x16>(sign));
#else
    return to_floats(codes);
#endif
}

#ifdef HAS_AVX512
constexpr int64_t UNIT = 64;  // codes in a vector of bytes

// Codes 64 * unit … 64 * unit + 63, one a byte; of the LAST unit of a row only what is there is read.
template <bool LAST> INLINE __m512i codes64(const Row& row, int64_t unit, int64_t columns) {
    __m512i codes = _mm512_setzero_si512();
    for (int p = 0; p < PLANES; p++) {
        const int width = width_of(p), low = low_of(p);
        const uint8_t* at = row.plane[p] + unit * 8 * width / 16 * 16;
        const int64_t left = row.plane[p] + plane_bytes(p, columns) - at;
        __m512i v;
        if (width == 8) return LAST ? _mm512_maskz_loadu_epi8(_bzhi_u64(~0ull, left), at) : _mm512_loadu_si512(at);
        if (width == 4) {
            v = _mm512_castsi256_si512(LAST ? _mm256_maskz_loadu_epi8(_bzhi_u32(~0u, left), at) : load<__m256i>(at));
            v = _mm512_shuffle_i64x2(v, v, 0x50);
        } else {
            v = _mm512_broadcast_i32x4(load<__m128i>(at));
        }
        // 128-bit lane i holds block i of the unit: its bits are turned to where they belong in the code.
        auto turn = [&](int lane) { return (lane % (8 / width) * width - low) & 31; };
        __m512i turns = _mm512_set_epi32(turn(3), turn(3), turn(3), turn(3), turn(2), turn(2), turn(2), turn(2),
                                         turn(1), turn(1), turn(1), turn(1), turn(0), turn(0), turn(0), turn(0));
        if (width == 1) turns = _mm512_add_epi32(turns, _mm512_set1_epi32(unit % 2 * 4));
        v = _mm512_and_si512(_mm512_rorv_epi32(v, turns), _mm512_set1_epi8(((1 << width) - 1) << low));
        codes = p ? _mm512_or_si512(codes, v) : v;
    }
    return codes;
}
#endif

// The weight as the caller passes it. `group` inputs of `height` rows share a scale; a stride of 0 repeats one row of
// scales. Zeros of a kind with the bit ADDED are added after scaling.
constexpr int ADDED = 8;

struct Weight {
    const uint8_t* data;
    const void *scale, *zero;
    int64_t rows, columns, group, height, data_stride, scale_stride, zero_stride;
    int scale_kind, zero_kind;
    float offset;
    int64_t group_count = columns / group;  // once: dividing takes longer than reading a row's scales

    INLINE int64_t groups() const { return group_count; }
    INLINE int64_t blocks() const { return whole(columns) / LANES; }
    INLINE Row row(int64_t n) const { return Row(data + n * data_stride, columns); }
    // The scales and zero points of rows that come later.
    INLINE void prefetch_sides(int64_t n, int64_t count) const {
        auto fetch = [&](const void* side, int64_t stride, int kind) __attribute__((always_inline)) {
            const char* at = (const char*)side + n / height * stride * size_of(kind);
            const int64_t bytes = ((count - 1) / height * stride + groups()) * size_of(kind);
            for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
        };
        fetch(scale, scale_stride, scale_kind);
        if (zero) fetch(zero, zero_stride, zero_kind & ~ADDED);
    }
    // The scales and zero points of `count` rows from n on, sixteen at a time, as use(index, scales, zeros): a number
    // is (code - zero) * scale. Behind those of a row there may be others, which the next row's replace.
    template <typename Use> INLINE void each_sides(int64_t n, int64_t count, Use use) const {
        const bool dense = height == 1 && scale_stride == groups() && (!zero || zero_stride == groups());
        const int64_t all = dense ? count * groups() : groups();
        for (int64_t row = 0; row < (dense ? 1 : count); row++) {
            const int64_t at = height == 1 ? n + row : (n + row) / height;
            const char* scales = (const char*)scale + at * scale_stride * size_of(scale_kind);
            const int kind = zero_kind & ~ADDED;
            const char* zeros = (const char*)zero + at * zero_stride * size_of(kind);
            int64_t g = 0;
            if (zero && scale_kind == BF16 && zero_kind == BF16)  // nothing to ask for each sixteen
                for (; g + LANES <= all; g += LANES)
                    use(row * groups() + g, load16(scales, g, BF16), load16(zeros, g, BF16));
            for (; g < all; g += LANES) {
                const int64_t left = std::min(LANES, all - g);
                auto read = [&](const char* from, int kind) __attribute__((always_inline)) {
                    return left == LANES ? load16(from, g, kind) : load_some(from, g, left, kind);
                };
                f32x16 s = read(scales, scale_kind), z = zero ? read(zeros, kind) : splat(offset);
                if (zero_kind & ADDED) {
                    // A group of one number has scale 0 and the number added: codes must not matter, the sum must.
                    const u32x16 is_zero = (bits_of<u32x16>(s) & 0x7fffffff) < 1;
                    s = bits_of<f32x16>(bits_of<u32x16>(s) | (is_zero & 0x0d800000));  // 2^-100
                    z = f32x16{} - z / s;
                }
                use(row * groups() + g, s, z);
            }
        }
    }
    INLINE void sides(float* s, float* z, int64_t n) const {
        each_sides(n, 1, [&](int64_t g, f32x16 scales, f32x16 zeros) __attribute__((always_inline)) {
            store(s + g, scales);
            store(z + g, zeros);
        });
    }
};

// y, with an optional bias, and a residual that is added after rounding.
struct Output {
    void* y;
    const void* bias;
    int64_t columns;
    int kind, bias_kind;
    const void* residual = nullptr;

    // `count` neighbours of row m, at most sixteen.
    INLINE void write(int64_t m, int64_t n, int64_t count, f32x16 v) const {
        const int64_t at = m * columns + n;
        if (bias) v = v + load_some(bias, n, count, bias_kind);
        if (residual) v = rounded(v, kind) + load_some(residual, at, count, kind);
        if (count == LANES) store16(y, at, kind, v);
        else store_some(y, at, count, kind, v);
    }
};

}  // namespace

#define WEIGHT_ARGUMENTS                                                                                            \
    const void *data, const void *scale, const void *zero, int64_t rows, int64_t columns, int64_t group,            \
        int64_t height, int64_t data_stride, int64_t scale_stride, int64_t zero_stride, int scale_kind, int zero_kind, float offset
#define WEIGHT                                                                                                      \
    {                                                                                                               \
        (const uint8_t*)data, scale, zero, rows, columns, group, height, data_stride, scale_stride, zero_stride,            \
            scale_kind, zero_kind, offset                                                                           \
    }
