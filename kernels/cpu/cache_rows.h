// Rows of a key/value cache: numbers, or codes of 8 bits (qcompile/ops/row_codes.py) without their scale.

#include <cmath>
#include <limits>
#if defined(HAS_AVX512) && defined(__AVX512VBMI__)
#define HAS_BYTE_TABLES 1
#endif

namespace {

typedef int8_t i8x16 __attribute__((vector_size(16)));
typedef int16_t i16x16 __attribute__((vector_size(32)));

INLINE i32x16 widen(i8x16 v) {
#if defined(HAS_AVX512)
    return bits_of<i32x16>(_mm512_cvtepi8_epi32(bits_of<__m128i>(v)));
#elif defined(HAS_AVX2)
    const __m128i low = bits_of<__m128i>(v), high = _mm_srli_si128(low, 8);
    return {{(i32x16::Piece)_mm256_cvtepi8_epi32(low), (i32x16::Piece)_mm256_cvtepi8_epi32(high)}};
#else
    typedef int32_t Wide __attribute__((vector_size(64)));
    return bits_of<i32x16>(__builtin_convertvector(__builtin_convertvector(v, i16x16), Wide));
#endif
}
INLINE f32x16 from_e4m3(u8x16 v) {
    // As in from_half: off by 2^120, and the one magnitude that is no number is put back.
    const u32x16 code = bits_of<u32x16>(widen(v)), sign = (code & 0x80) << 24, magnitude = (code & 0x7f) << 20;
    const u32x16 value = bits_of<u32x16>(bits_of<f32x16>(magnitude) * 0x1p120f);
    return bits_of<f32x16>(value | ((magnitude >= 0x07f00000) & 0x7fc00000) | sign);
}

// Sixteen of them.
template <int KIND> INLINE f32x16 load_row(const void* base, int64_t index) {
    if constexpr (KIND == I8) return to_floats(widen(load<i8x16>((const char*)base + index)));
    else if constexpr (KIND == E4M3) return from_e4m3(load<u8x16>((const char*)base + index));
    else return load16(base, index, KIND);
}

#ifdef HAS_BYTE_TABLES
// The upper halves of all floats of 8 bits but for their sign, as the upper and the lower byte of each.
struct TablesOfE4M3 {
    uint8_t bytes[2][128];
    uint8_t places[4][64];  // of both bytes of each of 16 numbers, where they are its upper two
    TablesOfE4M3() {
        for (int i = 0; i < 64; i++) places[i / 16][i % 16 * 4 + 2] = i, places[i / 16][i % 16 * 4 + 3] = 64 + i;
        for (int code = 0; code < 128; code++) {
            const float value = code == 127 ? std::numeric_limits<float>::quiet_NaN()
                                            : std::ldexp(code < 8 ? code : 8 + code % 8, code < 8 ? -9 : code / 8 - 10);
            bytes[0][code] = bits_of<uint32_t>(value) >> 24, bytes[1][code] = bits_of<uint32_t>(value) >> 16;
        }
    }
};
const TablesOfE4M3 OF_E4M3;
#endif

// Four vectors, one after the other.
template <int KIND> INLINE void load64(const void* base, int64_t index, f32x16* to) {
#ifdef HAS_BYTE_TABLES
    if constexpr (KIND == E4M3) {
        const __m512i codes = load<__m512i>((const char*)base + index);
        auto look_up = [&](const uint8_t* table) {
            return _mm512_permutex2var_epi8(load<__m512i>(table), codes, load<__m512i>(table + 64));
        };
        const __m512i low = look_up(OF_E4M3.bytes[1]), sign = _mm512_set1_epi8(-128);
        const __m512i high = _mm512_ternarylogic_epi32(look_up(OF_E4M3.bytes[0]), codes, sign, 0xf8);  // a | b & c
        for (int i = 0; i < 4; i++) {
            const __m512i places = load<__m512i>(OF_E4M3.places[i]);
            to[i] = bits_of<f32x16>(_mm512_maskz_permutex2var_epi8(0xcccccccccccccccc, low, places, high));
        }
        return;
    }
#endif
    for (int i = 0; i < 4; i++) to[i] = load_row<KIND>(base, index + i * LANES);
}

// Bytes of numbers that were divided by their scale; what lies beyond the last code is that one.
INLINE i32x16 to_i8(f32x16 v) {
    constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer
    const f32x16 inside = splat(0) - max(splat(0) - max(v, splat(-128)), splat(-127));
    return bits_of<i32x16>(bits_of<u32x16>(inside + ROUND) - 0x4b400000);
}
INLINE i32x16 to_e4m3(f32x16 v) {
    const u32x16 b = bits_of<u32x16>(v), sign = (b >> 24) & 0x80, a = b & 0x7fffffff;
    const u32x16 normal = (a - 0x3c000000 + 0x7ffff + ((a >> 20) & 1)) >> 20;
    const u32x16 tiny = bits_of<u32x16>(bits_of<f32x16>(a) + 16384.0f) - 0x46800000;
    const u32x16 is_tiny = a < 0x3c800000, is_nan = a > 0x7f800000, is_big = (a >= 0x43e00000) & ~is_nan;
    const u32x16 value = (tiny & is_tiny) | (normal & ~(is_tiny | is_big | is_nan));
    return bits_of<i32x16>(sign | value | (is_big & 0x7e) | (is_nan & 0x7f));
}

// The lowest byte of each of the first `count`.
INLINE void store_bytes(void* to, int64_t count, i32x16 v) {
    int32_t each[LANES];
    store(each, v);
    for (int64_t i = 0; i < count; i++) ((uint8_t*)to)[i] = each[i];
}

}  // namespace
