// A unit, 64 codes of an output, as numbers in bfloat16: two vectors, each a step of a product of pairs. Of x, a unit
// is brought into the same order.

#ifdef HAS_BF16_DOT
namespace {

// Where the inputs of a unit are in its two steps; BY_TABLE: by a table of what codes stand for.
template <bool BY_TABLE> struct Order {
    alignas(64) uint16_t at[2][2 * LANES] = {};
    constexpr Order() {
        for (int step = 0; step < 2; step++)
            for (int i = 0; i < 2 * LANES; i++)
                at[step][i] = BY_TABLE ? 2 * i + step : 4 * (i % 16) + i / 16 * 2 + step;
    }
};
template <bool BY_TABLE> constexpr Order<BY_TABLE> ORDER;

// Inputs from k on of a row of x, zeros behind the last of its `columns`.
template <bool BY_TABLE>
INLINE void order_unit(const uint16_t* x, int64_t k, int64_t columns, __m512i& even, __m512i& odd) {
    const uint64_t there = _bzhi_u64(~0ull, std::min(UNIT, columns - k));
    const __m512i low = _mm512_maskz_loadu_epi16(there, x + k);
    const __m512i high = _mm512_maskz_loadu_epi16(there >> 32, x + k + 32);
    even = _mm512_permutex2var_epi16(low, _mm512_load_si512(ORDER<BY_TABLE>.at[0]), high);
    odd = _mm512_permutex2var_epi16(low, _mm512_load_si512(ORDER<BY_TABLE>.at[1]), high);
}

// How codes become numbers. BY_TABLE: each is looked up among the sixteen that its group has. WHOLE: no group ends
// within a unit; else those of a table end at the halves of units.
template <bool BY_TABLE_, bool WHOLE_> struct Way {
    static constexpr bool BY_TABLE = BY_TABLE_, WHOLE = WHOLE_;
};
// use(way) with that of a weight.
template <typename Use> void with_way(const Weight& w, Use use) {
    if (w.group % UNIT == 0 || w.groups() == 1) use(Way<FEW_VALUES, true>());
    else if (FEW_VALUES && w.group % 32 == 0) use(Way<FEW_VALUES, false>());
    else use(Way<false, false>());
}

// Whose scales a unit has: the groups of its halves, and of each number in a vector, from the first half's on.
struct Place {
    __m512i lane;
    int64_t half[2];
};

std::vector<Place> places_of(const Weight& w) {
    std::vector<Place> places;
    for (int64_t k = 0; k < w.columns; k += UNIT) {
        int64_t group[4];
        for (int64_t i = 0; i < 4; i++) group[i] = std::min((k + i * LANES) / w.group, w.groups() - 1);
        alignas(64) int32_t lane[LANES];
        for (int64_t i = 0; i < LANES; i++) lane[i] = group[i / 4] - group[0];
        places.push_back({_mm512_load_si512(lane), {group[0], group[2]}});
    }
    return places;
}

// What the first sixteen codes stand for.
INLINE __m512 first_values(float scale, float zero) {
    const __m512 codes = bits_of<__m512>(numbers(FIRST_CODES));
    return _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
}

// Codes of a unit, of an output with these scales and zero points, as its two steps.
template <typename Way>
INLINE void dequantize_unit(__m512i codes, const float* scale, const float* zero, const Place& place, void* even,
                            void* odd) {
    const int64_t g = place.half[0];
    if constexpr (Way::BY_TABLE) {
        const __m512 first = first_values(scale[g], zero[g]);
        __m512i table, second = _mm512_srli_epi16(codes, 8);
        if (Way::WHOLE) {
            table = _mm512_castsi256_si512(bits_of<__m256i>(_mm512_cvtneps_pbh(first)));
        } else {
            const int64_t h = place.half[1];
            table = bits_of<__m512i>(_mm512_cvtne2ps_pbh(first_values(scale[h], zero[h]), first));
            const __m512i half = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
            codes = _mm512_or_si512(codes, half), second = _mm512_or_si512(second, half);
        }
        _mm512_store_si512(even, _mm512_permutexvar_epi16(codes, table));
        _mm512_store_si512(odd, _mm512_permutexvar_epi16(second, table));
    } else {
        auto side = [&](const float* from) __attribute__((always_inline)) {
            if (Way::WHOLE) return _mm512_set1_ps(from[g]);
            return _mm512_permutexvar_ps(place.lane, _mm512_loadu_ps(from + g));
        };
        const __m512 s = side(scale), shift = _mm512_mul_ps(s, side(zero));
        auto value = [&](__m512i codes) __attribute__((always_inline)) {
            return _mm512_fmsub_ps(bits_of<__m512>(numbers(bits_of<i32x16>(codes))), s, shift);
        };
        const __m512i byte = _mm512_set1_epi32(255);
        const __m512 code0 = value(_mm512_and_si512(codes, byte));
        const __m512 code1 = value(_mm512_and_si512(_mm512_srli_epi32(codes, 8), byte));
        const __m512 code2 = value(_mm512_and_si512(_mm512_srli_epi32(codes, 16), byte));
        const __m512 code3 = value(_mm512_srli_epi32(codes, 24));
        _mm512_store_si512(even, bits_of<__m512i>(_mm512_cvtne2ps_pbh(code2, code0)));
        _mm512_store_si512(odd, bits_of<__m512i>(_mm512_cvtne2ps_pbh(code3, code1)));
    }
}

}  // namespace
#endif
