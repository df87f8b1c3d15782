// Vectors of sixteen, on processors with vectors of 512, 256 or 128 bits, and the formats of numbers.
//
// These files are put together into one text, which is compiled once for each width of code: BITS is a macro (see
// _packed_cpu.py). They need no header of torch, and run wherever gcc or clang do.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <omp.h>
#include <type_traits>
#include <vector>
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_AVX512 1
#endif
#if defined(HAS_AVX512) && defined(__AVX512BF16__)
#define HAS_BF16_DOT 1
#endif
#if defined(HAS_AVX512) && defined(__AVX512VNNI__)
#define HAS_VNNI 1
#endif
#if defined(__AVX2__) && defined(__FMA__) && !defined(HAS_AVX512)
#define HAS_AVX2 1
#endif
#if defined(HAS_AVX512) || defined(HAS_AVX2)
#include <immintrin.h>
#endif

namespace {

#define INLINE inline __attribute__((always_inline))

constexpr int64_t LANES = 16;
#if defined(HAS_AVX512)
constexpr int NATIVE = 16;
#elif defined(HAS_AVX2)
constexpr int NATIVE = 8;
#else
constexpr int NATIVE = 4;
#endif

// Sixteen numbers of 32 bits. Compilers are bad at vectors that are wider than the processor's: hence pieces.
template <typename T> struct Vector {
    typedef T Piece __attribute__((vector_size(NATIVE * sizeof(T))));
    Piece piece[LANES / NATIVE];
};
template <typename V> constexpr bool IN_PIECES = false;
template <typename T> constexpr bool IN_PIECES<Vector<T>> = true;

template <typename V> INLINE V load(const void* from) {
    V v;
    // Piece by piece: gcc takes structs through memory, in the wrong sizes.
    if constexpr (IN_PIECES<V>) {
        for (int i = 0; i < LANES / NATIVE; i++) std::memcpy(&v.piece[i], (char*)from + 4 * NATIVE * i, 4 * NATIVE);
    } else {
        std::memcpy(&v, from, sizeof(V));
    }
    return v;
}
template <typename V> INLINE void store(void* to, V v) {
    if constexpr (IN_PIECES<V>) {
        for (int i = 0; i < LANES / NATIVE; i++) std::memcpy((char*)to + 4 * NATIVE * i, &v.piece[i], 4 * NATIVE);
    } else {
        std::memcpy(to, &v, sizeof(V));
    }
}
template <typename To, typename From> INLINE To bits_of(From v) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To to;
    std::memcpy(&to, &v, sizeof(To));
    return to;
}
template <int N> using Count = std::integral_constant<int, N>;
constexpr int64_t whole(int64_t count, int64_t of = LANES) { return (count + of - 1) / of * of; }

typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

typedef Vector<float> f32x16;
typedef Vector<int32_t> i32x16;
typedef Vector<uint32_t> u32x16;

#define EACH_PIECE(RESULT, EXPRESSION)                                                      \
    {                                                                                       \
        RESULT result;                                                                      \
        for (int i = 0; i < LANES / NATIVE; i++) result.piece[i] = EXPRESSION;              \
        return result;                                                                      \
    }
#define OPERATOR(SIGN)                                                                                             \
    template <typename T>                                                                                          \
    INLINE Vector<T> operator SIGN(Vector<T> a, Vector<T> b) EACH_PIECE(Vector<T>, a.piece[i] SIGN b.piece[i])     \
    template <typename T>                                                                                          \
    INLINE Vector<T> operator SIGN(Vector<T> a, std::common_type_t<T> b) EACH_PIECE(Vector<T>, a.piece[i] SIGN b)
#define COMPARISON(SIGN)                                                                                           \
    INLINE u32x16 operator SIGN(u32x16 a, uint32_t b) EACH_PIECE(u32x16, (u32x16::Piece)(a.piece[i] SIGN b))

OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
OPERATOR(&)
OPERATOR(|)
OPERATOR(<<)
OPERATOR(>>)
COMPARISON(<)
COMPARISON(>)
COMPARISON(>=)
INLINE u32x16 operator~(u32x16 a) EACH_PIECE(u32x16, ~a.piece[i])
INLINE f32x16 splat(float v) EACH_PIECE(f32x16, f32x16::Piece{} + v)

// a * b + c, fused where the processor can.
INLINE f32x16 multiply_add(f32x16 a, f32x16 b, f32x16 c) {
#if defined(HAS_AVX512)
    return bits_of<f32x16>(_mm512_fmadd_ps(bits_of<__m512>(a), bits_of<__m512>(b), bits_of<__m512>(c)));
#elif defined(HAS_AVX2)
    for (int i = 0; i < 2; i++) c.piece[i] = _mm256_fmadd_ps(a.piece[i], b.piece[i], c.piece[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE f32x16 max(f32x16 a, f32x16 b) EACH_PIECE(f32x16, a.piece[i] > b.piece[i] ? a.piece[i] : b.piece[i])

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

#ifdef HAS_AVX512
// Four vectors to their four sums.
INLINE __m128 sums4(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    __m512d low = _mm512_unpacklo_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512d high = _mm512_unpackhi_pd(bits_of<__m512d>(ab), bits_of<__m512d>(cd));
    __m512 all = _mm512_add_ps(bits_of<__m512>(low), bits_of<__m512>(high));
    __m256d upper = _mm512_extractf64x4_pd(bits_of<__m512d>(all), 1);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), bits_of<__m256>(upper));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

INLINE bool all_are(u32x16 v, uint32_t x) {
#ifdef HAS_AVX512
    return _mm512_cmpneq_epi32_mask(bits_of<__m512i>(v), _mm512_set1_epi32(x)) == 0;
#else
    uint32_t each[LANES], others = 0;
    store(each, v);
    for (uint32_t one : each) others |= one ^ x;
    return others == 0;
#endif
}

// e^x of numbers that are not positive; what float32 cannot hold is 0.
INLINE f32x16 exponential(f32x16 x) {
#ifdef HAS_AVX512
    const __m512 v = bits_of<__m512>(x);
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), v);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 power = _mm512_set1_ps(1 / 720.0f);
    for (float factor : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f})
        power = _mm512_fmadd_ps(power, r, _mm512_set1_ps(factor));
    const __mmask16 is_large = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-87.3365402f), _CMP_NLT_UQ);  // or no number
    return bits_of<f32x16>(_mm512_maskz_scalef_ps(is_large, power, n));
#else
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    // Below ln 2^-126, where the sign makes bits large; beyond those of -inf are what is no number.
    const u32x16 bits = bits_of<u32x16>(x), is_none = (bits > 0xff800000) & 0xffffffff;
    const u32x16 is_small = (bits > 0xc2aeac50) & ~is_none;
    const f32x16 shifted = multiply_add(x, splat(1.44269504f), splat(ROUND)), whole = shifted - ROUND;
    const f32x16 rest = multiply_add(whole, splat(-1.42860677e-6f), multiply_add(whole, splat(-0.693145752f), x));
    f32x16 y = splat(1 / 720.0f);
    for (float factor : {1 / 120.0f, 1 / 24.0f, 1 / 6.0f, 0.5f, 1.0f, 1.0f}) y = multiply_add(y, rest, splat(factor));
    const f32x16 power = bits_of<f32x16>((bits_of<u32x16>(shifted) - 0x4b400000 + 127) << 23);
    return bits_of<f32x16>(bits_of<u32x16>(y * power) & ~is_small);
#endif
}

// ---- number formats ----

enum Kind : int { F32 = 0, BF16 = 1, F16 = 2, U8 = 3, I8 = 4, E4M3 = 5 };

constexpr int64_t size_of(int kind) { return kind == F32 ? 4 : kind >= U8 ? 1 : 2; }

INLINE i32x16 widen(u8x16 v) {
#if defined(HAS_AVX512)
    return bits_of<i32x16>(_mm512_cvtepu8_epi32(bits_of<__m128i>(v)));
#elif defined(HAS_AVX2)
    const __m128i low = bits_of<__m128i>(v), high = _mm_srli_si128(low, 8);
    return {{(i32x16::Piece)_mm256_cvtepu8_epi32(low), (i32x16::Piece)_mm256_cvtepu8_epi32(high)}};
#else
    // In steps: gcc converts straight from bytes one number at a time.
    typedef int32_t Wide __attribute__((vector_size(64)));
    return bits_of<i32x16>(__builtin_convertvector(__builtin_convertvector(v, u16x16), Wide));
#endif
}
INLINE u32x16 widen(u16x16 v) {
#if defined(HAS_AVX512)
    return bits_of<u32x16>(_mm512_cvtepu16_epi32(bits_of<__m256i>(v)));
#elif defined(HAS_AVX2)
    const __m128i low = load<__m128i>(&v), high = load<__m128i>((char*)&v + 16);
    return {{(u32x16::Piece)_mm256_cvtepu16_epi32(low), (u32x16::Piece)_mm256_cvtepu16_epi32(high)}};
#else
    typedef uint32_t Wide __attribute__((vector_size(64)));
    return bits_of<u32x16>(__builtin_convertvector(v, Wide));
#endif
}
// Numbers below 2^16.
INLINE u16x16 narrow(u32x16 v) {
#if defined(HAS_AVX2)
    const __m256i packed = _mm256_packus_epi32((__m256i)v.piece[0], (__m256i)v.piece[1]);
    return bits_of<u16x16>(_mm256_permute4x64_epi64(packed, 0xd8));
#else
    typedef uint32_t Wide __attribute__((vector_size(64)));
    return __builtin_convertvector(bits_of<Wide>(v), u16x16);
#endif
}
INLINE f32x16 to_floats(i32x16 v) EACH_PIECE(f32x16, __builtin_convertvector(v.piece[i], f32x16::Piece))
INLINE f32x16 to_floats(u8x16 v) { return to_floats(widen(v)); }

INLINE f32x16 from_half(u32x16 h) {
    // Exponent and fraction moved into place are off by 2^112, for subnormals too; infinity and nan are put back.
    const u32x16 magnitude = (h & 0x7fff) << 13, sign = (h & 0x8000) << 16;
    const u32x16 value = bits_of<u32x16>(bits_of<f32x16>(magnitude) * 0x1p112f);
    return bits_of<f32x16>(value | ((magnitude >= 0x0f800000) & 0x7f800000) | sign);
}

INLINE f32x16 load16(const void* base, int64_t index, int kind) {
    const char* at = (const char*)base + index * size_of(kind);
    if (kind == F32) return load<f32x16>(at);
    if (kind == U8) return to_floats(load<u8x16>(at));
    const u32x16 wide = widen(load<u16x16>(at));
    return kind == BF16 ? bits_of<f32x16>(wide << 16) : from_half(wide);
}

INLINE u16x16 to_bf16(f32x16 v) {
#ifdef HAS_BF16_DOT
    return bits_of<u16x16>(_mm512_cvtneps_pbh(bits_of<__m512>(v)));
#else
    const u32x16 b = bits_of<u32x16>(v), is_nan = (b & 0x7fffffff) > 0x7f800000;
    const u32x16 rounded = (b + ((b >> 16) & 1) + 0x7fff) >> 16;
    return narrow((rounded & ~is_nan) | (is_nan & 0x7fc0));
#endif
}

INLINE u16x16 to_half(f32x16 v) {
#ifdef HAS_AVX512
    return bits_of<u16x16>(_mm512_cvtps_ph(bits_of<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    // Normal numbers: round to nearest even on bit 13. Subnormal ones: adding 0.5 leaves the fraction in the low bits.
    const u32x16 b = bits_of<u32x16>(v), sign = (b >> 16) & 0x8000, a = b & 0x7fffffff;
    const u32x16 normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13;
    const u32x16 tiny = bits_of<u32x16>(bits_of<f32x16>(a) + 0.5f) - 0x3f000000;
    const u32x16 is_tiny = a < 0x38800000, is_nan = a > 0x7f800000, is_big = a >= 0x477ff000;
    const u32x16 value = (tiny & is_tiny) | (normal & ~is_tiny);
    return narrow(sign | (value & ~is_big) | (is_big & 0x7c00) | (is_nan & 0x200));
#endif
}

INLINE void store16(void* base, int64_t index, int kind, f32x16 v) {
    char* at = (char*)base + index * size_of(kind);
    if (kind == F32) store(at, v);
    else store(at, kind == BF16 ? to_bf16(v) : to_half(v));
}

INLINE f32x16 rounded(f32x16 v, int kind) {
    if (kind == F32) return v;
    return kind == BF16 ? bits_of<f32x16>(widen(to_bf16(v)) << 16) : from_half(widen(to_half(v)));
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
#ifdef HAS_AVX512
    const uint16_t mask = (1u << count) - 1;
    char* at = (char*)base + index * size_of(kind);
    if (kind == F32) return _mm512_mask_storeu_ps(at, mask, bits_of<__m512>(v));
    return _mm256_mask_storeu_epi16(at, mask, bits_of<__m256i>(kind == BF16 ? to_bf16(v) : to_half(v)));
#endif
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
