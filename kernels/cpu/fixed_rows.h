// Rows of x of 16 bits as fixed point: sixteen to 128 neighbours share a scale, and are integers of 16 bits in units of
// it, which is finer than x itself: a signed byte times 256 and a signed byte.

#ifdef HAS_VNNI
namespace {

// x in the order of the codes, padded with zeros to whole steps, and its sums over each group. A step is a vector of
// high bytes for each field and one of low bytes; the codes of a lane of 128 bits share a scale.
struct Fixed {
    const int8_t* x;
    const float *scales, *sums;
    int64_t steps, groups;  // groups rounded up to sixteen
};

// One row of x to fixed point. Not a number makes its scale none, and what is infinite an infinite one.
void fix_row(const Weight& w, const void* x, int kind, int8_t* to, float* scales, float* sums) {
    constexpr float LARGEST = 127 * 256 + 127;
    int64_t group = 0, end = w.group;
    f32x16 total{};
    auto finish_group = [&] {
        if (group < w.groups()) sums[group++] = sum(total);
        total = {};
        end += w.group;
    };
    for (int64_t k = 0; k < whole(w.columns, STEP); to += 128 * FIELDS, scales += LANES)
        for (int lane = 0; lane < 4; lane++) {
            f32x16 v[FIELDS];
            __m512i most = _mm512_set1_epi32(0x0da24260);  // 1e-30, so that the reciprocal is finite
            for (int field = 0; field < FIELDS; field++) {
                const int64_t at = k + field * LANES, left = w.columns - at;
                v[field] = left >= LANES ? load16(x, at, kind) : left > 0 ? load_some(x, at, left, kind) : f32x16{};
                const __m512i size = _mm512_and_si512(bits_of<__m512i>(v[field]), _mm512_set1_epi32(0x7fffffff));
                most = _mm512_max_epi32(most, size);
            }
            const float largest = bits_of<float>(_mm512_reduce_max_epi32(most)), scale = largest / LARGEST;
            _mm_store_ps(scales + 4 * lane, _mm_set1_ps(scale));
            for (int field = 0; field < FIELDS; field++, k += LANES) {
                if (k == end) finish_group();
                const __m512i q = _mm512_cvtps_epi32(bits_of<__m512>(v[field] * (LARGEST / largest)));
                const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8);
                int8_t* at = to + field * 64 + lane * 16;
                _mm_store_si128((__m128i*)at, _mm512_cvtepi32_epi8(high));
                _mm_store_si128((__m128i*)(at + FIELDS * 64), _mm512_cvtepi32_epi8(q));
                total = multiply_add(bits_of<f32x16>(_mm512_cvtepi32_ps(q)), splat(scale), total);
            }
        }
    finish_group();
}

}  // namespace
#endif
