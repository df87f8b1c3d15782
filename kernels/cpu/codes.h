// What every CPU kernel here shares: vectors of sixteen, number formats, and the codes of a packed row.
//
// A source is compiled once for each width: BITS is a macro. The files are put together into one text (see
// linear_cpu.py), need no header of torch, and use compiler vectors, so that they run wherever gcc or clang do.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_AVX512 1
#endif
#if defined(HAS_AVX512) && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));

constexpr int64_t LANES = 16;

template <typename V> INLINE V load(const void* from) {
    V v;
    std::memcpy(&v, from, sizeof(V));
    return v;
}
template <typename V> INLINE void store(void* to, V v) { std::memcpy(to, &v, sizeof(V)); }
template <typename To, typename From> INLINE To bits_of(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &v, sizeof(To));
    return to;
}
template <int N> using Count = std::integral_constant<int, N>;
INLINE f32x16 splat(float v) { return f32x16{} + v; }

INLINE float sum(f32x16 v) {
#ifdef HAS_AVX512
    return _mm512_reduce_add_ps(bits_of<__m512>(v));
#else
    float total[16];
    store(total, v);
    for (int width = 8; width; width /= 2)
        for (int i = 0; i < width; i++) total[i] += total[i + width];
    return total[0];
#endif
}

// ---- number formats ----

// Sixteen bytes to vectors that are wider, in steps: gcc converts straight from bytes one number at a time.
template <typename V> INLINE V widen(u8x16 v);
template <> INLINE u8x16 widen(u8x16 v) { return v; }
template <> INLINE i32x16 widen(u8x16 v) {
#ifdef HAS_AVX512
    return bits_of<i32x16>(_mm512_cvtepu8_epi32(bits_of<__m128i>(v)));
#else
    return __builtin_convertvector(__builtin_convertvector(v, u16x16), i32x16);
#endif
}
INLINE f32x16 to_floats(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE f32x16 to_floats(u8x16 v) { return to_floats(widen<i32x16>(v)); }

enum Kind : int { F32 = 0, BF16 = 1, F16 = 2, U8 = 3 };

constexpr int64_t size_of(int kind) { return kind == F32 ? 4 : kind == U8 ? 1 : 2; }

INLINE f32x16 from_half(u32x16 h) {
    // Exponent and fraction moved into place are off by 2^112, for subnormals too; infinity and nan are put back.
    u32x16 magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
    u32x16 value = bits_of<u32x16>(bits_of<f32x16>(magnitude) * 0x1p112f);
    u32x16 special = (u32x16)(magnitude >= 0x0f800000) & 0x7f800000;
    return bits_of<f32x16>(value | special | sign);
}

INLINE f32x16 load16(const void* base, int64_t index, int kind) {
    const char* at = (const char*)base + index * size_of(kind);
    if (kind == F32) return load<f32x16>(at);
    if (kind == U8) return to_floats(load<u8x16>(at));
    u32x16 wide = __builtin_convertvector(load<u16x16>(at), u32x16);
    return kind == BF16 ? bits_of<f32x16>(wide << 16) : from_half(wide);
}

INLINE u16x16 to_bf16(f32x16 v) {
#ifdef HAS_BF16_DOT
    return bits_of<u16x16>(_mm512_cvtneps_pbh(bits_of<__m512>(v)));
#else
    u32x16 b = bits_of<u32x16>(v);
    u32x16 rounded = (b + (0x7fff + ((b >> 16) & 1))) >> 16;
    u32x16 is_nan = (u32x16)((b & 0x7fffffff) > 0x7f800000);
    return __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), u16x16);
#endif
}

INLINE u16x16 to_half(f32x16 v) {
#ifdef HAS_AVX512
    return bits_of<u16x16>(_mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    // Normal numbers: round to nearest even on bit 13. Subnormal ones: adding 0.5 leaves the fraction in the low bits.
    u32x16 b = bits_of<u32x16>(v), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    u32x16 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    u32x16 tiny = bits_of<u32x16>(bits_of<f32x16>(a) + 0.5f) - 0x3f000000;
    u32x16 is_tiny = (u32x16)(a < 0x38800000), is_nan = (u32x16)(a > 0x7f800000), is_big = (u32x16)(a >= 0x477ff000);
    u32x16 value = (tiny & is_tiny) | (normal & ~is_tiny);
    value = (value & ~is_big) | (is_big & 0x7c00);
    return __builtin_convertvector(sign | value | (is_nan & 0x200), u16x16);
#endif
}

INLINE void store16(void* base, int64_t index, int kind, f32x16 v) {
    char* at = (char*)base + index * size_of(kind);
    if (kind == F32) store(at, v);
    else store(at, kind == BF16 ? to_bf16(v) : to_half(v));
}

// The first `count` of sixteen, zeros behind them. Never reads behind the last one.
INLINE f32x16 load_some(const void* base, int64_t index, int64_t count, int kind) {
    const char* at = (const char*)base + index * size_of(kind);
#ifdef HAS_AVX512
    const uint16_t mask = (1u << count) - 1;
    if (kind == F32) return bits_of<f32x16>(_mm512_maskz_loadu_ps(mask, at));
    if (kind == U8) return to_floats(bits_of<u8x16>(_mm_maskz_loadu_epi8(mask, at)));
    const u16x16 raw = bits_of<u16x16>(_mm256_maskz_loadu_epi16(mask, at));
#else
    char raw[64] = {};
    std::memcpy(raw, at, count * size_of(kind));
#endif
    return load16(&raw, 0, kind);
}
INLINE void store_some(void* base, int64_t index, int64_t count, int kind, f32x16 v) {
    char raw[64];
    store16(raw, 0, kind, v);
    std::memcpy((char*)base + index * size_of(kind), raw, count * size_of(kind));
}

// `count` numbers to float32, and zeros up to a whole vector.
INLINE void to_floats(float* to, const void* from, int64_t count, int kind) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(to + i, load16(from, i, kind));
    if (i < count) store(to + i, load_some(from, i, count - i, kind));
}
constexpr int64_t whole(int64_t count, int64_t of = LANES) { return (count + of - 1) / of * of; }

// ---- a packed weight ----

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

// Up to four bits have at most sixteen values a group: those are computed, and each code looks its own up.
#ifdef HAS_AVX512
constexpr bool TABLE = BITS <= 4;
#else
constexpr bool TABLE = false;
#endif
constexpr f32x16 FIRST_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Row {
    const uint8_t* plane[PLANES];

    Row() = default;
    INLINE Row(const uint8_t* at, int64_t columns) {
        for (int p = 0; p < PLANES; p++) {
            plane[p] = at;
            at += plane_bytes(p, columns);
        }
    }

    // The hardware reads ahead too timidly: 0.83 ms against 1.6 for one row of x, u4/g64 16384 × 2048, Zen 4.
    INLINE void prefetch(int64_t block) const { __builtin_prefetch(plane[0] + block * 2 * BITS + 8192, 0, 3); }

    // Codes 16 * block … 16 * block + 15, as bytes or as 32-bit integers, where `phase` = block % PERIOD.
    template <typename V> INLINE V block(int64_t block, int phase) const {
        using Item = std::remove_cvref_t<decltype(V{}[0])>;
        V codes{};
        for (int p = 0; p < PLANES; p++) {
            const int width = width_of(p), fields = 8 / width;
            V v = widen<V>(load<u8x16>(plane[p] + block / fields * 16));
            if (width < 8) v = (v >> Item(phase % fields * width)) & Item((1 << width) - 1);
            codes |= v << Item(low_of(p));
        }
        return codes;
    }
};

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

// The weight as the caller passes it. `group` inputs share a scale; a stride of 0 repeats one row of scales.
struct Weight {
    const uint8_t* data;
    const void *scale, *zero;
    int64_t rows, columns, group, data_stride, scale_stride, zero_stride;
    int scale_kind, zero_kind;
    float offset;

    INLINE int64_t groups() const { return columns / group; }
    INLINE int64_t blocks() const { return whole(columns) / LANES; }
    INLINE Row row(int64_t n) const { return Row(data + n * data_stride, columns); }
    INLINE void scales(float* to, int64_t n) const {
        to_floats(to, (const char*)scale + n * scale_stride * size_of(scale_kind), groups(), scale_kind);
    }
    INLINE void zeros(float* to, int64_t n) const {
        if (zero) to_floats(to, (const char*)zero + n * zero_stride * size_of(zero_kind), groups(), zero_kind);
        else std::fill(to, to + whole(groups()), offset);
    }
};

// y, with an optional bias.
struct Output {
    void* y;
    const void* bias;
    int64_t columns;
    int kind, bias_kind;

    // `count` neighbours of row m, at most sixteen.
    INLINE void write(int64_t m, int64_t n, int64_t count, f32x16 v) const {
        if (bias) v += load_some(bias, n, count, bias_kind);
        if (count == LANES) store16(y, m * columns + n, kind, v);
        else store_some(y, m * columns + n, count, kind, v);
    }
};

// Memory that a thread keeps between calls.
struct Scratch {
    void* at = nullptr;
    size_t size = 0;
    template <typename T> T* get(int64_t count) {
        size_t need = (count * sizeof(T) + 127) / 64 * 64;
        if (need > size) {
            std::free(at);
            at = std::aligned_alloc(64, size = need);
            if (!at) std::abort();
        }
        return (T*)at;
    }
    ~Scratch() { std::free(at); }
};

}  // namespace

#define WEIGHT_ARGUMENTS                                                                                            \
    const void *data, const void *scale, const void *zero, int64_t rows, int64_t columns, int64_t group,            \
        int64_t data_stride, int64_t scale_stride, int64_t zero_stride, int scale_kind, int zero_kind, float offset
#define WEIGHT                                                                                                      \
    {                                                                                                               \
        (const uint8_t*)data, scale, zero, rows, columns, group, data_stride, scale_stride, zero_stride,            \
            scale_kind, zero_kind, offset                                                                           \
    }
