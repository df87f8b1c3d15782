// Steps of few rows in one team of threads, which waits between them and forks and joins once. The text of the steps is
// taken apart once, and what is made of a step's tensors is kept for the next call with the same ones.

#include <atomic>
#include <deque>
#include <exception>
#include <stdexcept>
#include <variant>
#include <vector>

namespace {

using Step = std::variant<Linear, Rope, Attention>;

// What is kept of a chain's last call.
struct Kept {
    std::vector<Seen> tensors, caches;
    std::vector<Step> steps;
    std::vector<View> results;
    std::deque<Scratch> memory;  // of each step its result, and what it needs
    int64_t calls = 0, work = 0;  // the most that a step has been
    int64_t readers_known = 0;
};

// The steps of one call. A step is made ready while the one before it runs: the tensors that it asks for are far away,
// and meanwhile the other threads do the first one's share.
class Chain {
  public:
    // Of the tensors of a step that is known, those `looked` at may be others than in the last call.
    Chain(const Text& text, const std::vector<Tensor>& tensors, const std::vector<Tensor>& caches, Kept& kept,
          const Arguments& looked)
        : text(text), tensors(tensors), caches(caches), looked(looked), kept(kept), memory(kept.memory),
          steps(kept.steps), results(kept.results) {
        const size_t count = text.calls.size();
        if (kept.readers_known != readers_known.load()) {
            steps.clear(), results.clear();
            kept.readers_known = readers_known.load();
        }
        kept.tensors.resize(tensors.size()), kept.caches.resize(caches.size()), memory.resize(2 * count);
        steps.reserve(count), results.reserve(count);
        kept.calls++;
    }

    // None where a step is not for it; then nothing but what it would have written is written.
    std::optional<Tensor> run() {
        std::optional<Tensor> made;
        try {
            made = run_steps();
        } catch (...) {
            forget();
            throw;
        }
        if (!made) forget();
        return made;
    }

  private:
    const Text& text;
    const std::vector<Tensor>&tensors, &caches;
    const Arguments& looked;
    Kept& kept;
    std::deque<Scratch>& memory;
    std::vector<Step>& steps;
    std::vector<View>& results;
    int64_t threads = 1;
    size_t at = 0;  // the step that is being made ready
    bool moved = false;  // whether a result is elsewhere, or of another shape, than in the last call
    std::optional<Tensor> out;

    // What was made ready belongs together: some of it is of no use.
    void forget() { steps.clear(), results.clear(), kept.tensors.clear(), kept.caches.clear(); }

    std::optional<Tensor> run_steps() {
        threads = threads_for(kept.work);
        if (!ready()) return std::nullopt;
        const size_t count = text.calls.size();
        auto begin = [&](int64_t n) {
            threads = n;
            begin_step();
        };
        std::atomic<size_t> made{1};
        std::exception_ptr error;
        as_team(threads, begin, [&](int64_t thread, Meeting& meeting) {
            for (size_t i = 0; i < made; i++) {
                if (thread == 0 && i + 1 < count) {
                    try {
                        at = i + 1;
                        made += ready();
                    } catch (...) {
                        error = std::current_exception();
                    }
                }
                std::visit([&](auto& s) { s.run(thread, meeting); }, steps[i]);
                if (i + 1 < made) std::visit([&](auto& s) { s.prefetch(thread); }, steps[i + 1]);
                meeting.wait();
            }
        });
        if (error) std::rethrow_exception(error);
        return made == count ? out : std::nullopt;
    }

    const Tensor& tensor(const Argument& a) const { return (a.type == Argument::GIVEN ? tensors : caches).at(a.index); }
    std::optional<Tensor> tensor_or_none(const Argument& a) const {
        const bool there = a.type == Argument::GIVEN || a.type == Argument::CACHE;
        return there ? std::optional<Tensor>(tensor(a)) : std::nullopt;
    }
    // Whether the step is what it was. The last one never is: its result is the op's.
    bool is_known() {
        if (at >= steps.size() || at + 1 == text.calls.size() || moved) return false;
        bool same = true;
        for (const Argument* a : looked[at]) {
            Seen& seen = (a->type == Argument::GIVEN ? kept.tensors : kept.caches).at(a->index);
            seen.look(tensor(*a), kept.calls);
            same &= seen.same;
        }
        if (same)
            if (const Rope* rope = std::get_if<Rope>(&steps[at])) rope->check_positions();
        return same;
    }
    bool ready() {
        const bool fits = is_known() || add();
        if (fits) begin_step();
        return fits;
    }
    bool add() {
        const Call& call = text.calls[at];
        for (const Argument* a : text.given[at])
            (a->type == Argument::GIVEN ? kept.tensors : kept.caches).at(a->index).look(tensor(*a), kept.calls);
        return call.op == "fused_linear"      ? add_linear(call.arguments)
               : call.op == "rope_into_cache" ? add_rope(call.arguments)
               : call.op == "attention"       ? add_attention(call.arguments)
                                              : false;
    }
    template <typename T> bool keep(const T& step) {
        if (at < steps.size()) steps[at] = step;
        else steps.push_back(step);
        kept.work = std::max(kept.work, step.work());
        return true;
    }
    void begin_step() {
        Scratch& its = memory[2 * at + 1];
        std::visit([&](auto& s) { s.begin(its.get<char>(s.bytes(threads)), threads); }, steps[at]);
    }

    // None has no dimensions.
    View view(const Argument& a) const {
        if (a.type != Argument::RESULT) {
            const std::optional<Tensor> t = tensor_or_none(a);
            return t ? view_of(*t) : View{};
        }
        View v = results.at(a.index);
        v.at += a.offset * size_of(v.kind), v.dims = a.dims;
        std::copy_n(a.sizes, MOST_DIMS, v.sizes), std::copy_n(a.strides, MOST_DIMS, v.strides);
        return v;
    }
    static const Argument& or_none(const std::vector<Argument>& a, size_t index) {
        static const Argument none;
        return index < a.size() ? a[index] : none;
    }
    static std::optional<std::string> word(const Argument& a) {
        return a.type == Argument::WORD ? std::optional<std::string>(a.word) : std::nullopt;
    }

    // Where the result of a step goes: that of the last one is the op's. Null where there is nothing of its kind to make
    // it like.
    char* place(int64_t dims, const int64_t* sizes, int kind) {
        View v;
        v.kind = kind, v.dims = dims;
        std::copy_n(sizes, dims, v.sizes);
        if (at + 1 < text.calls.size()) {
            v.at = memory[2 * at].get<char>(v.numel() * size_of(kind));
        } else {
            auto like = std::find_if(tensors.begin(), tensors.end(), [&](auto& t) { return kind_of(t) == kind; });
            if (like == tensors.end()) return nullptr;
            out = empty(*like, sizes, dims), v.at = (char*)out->data_ptr();
        }
        if (at >= results.size()) results.resize(at + 1);
        const View& last = results[at];
        moved |= v.at != last.at || v.kind != last.kind || v.dims != last.dims || !std::equal(sizes, sizes + dims, last.sizes);
        results[at] = v;
        return v.at;
    }

    // x, norm's weight, eps, weight_offset, data, scale, zero, bias, residual, spec, activation, gated, rounding
    bool add_linear(const std::vector<Argument>& a) {
        for (int i : {1, 4, 5, 6, 7})
            if (a[i].type == Argument::RESULT) return false;
        const View x = view(a[0]), residual = view(a[8]);
        const std::optional<Tensor> data = tensor_or_none(a[4]), scale = tensor_or_none(a[5]);
        const std::optional<double> eps = word(a[2]) ? std::optional<double>(a[2].number) : std::nullopt;
        Linear linear;
        if (!x.dims || !x.is_dense() || !data || !scale || !linear.take_x(x.at, x.kind, x.numel(), x.sizes[x.dims - 1]))
            return false;
        if (!linear.take_weight(a[9].word, *data, *scale, tensor_or_none(a[6]), tensor_or_none(a[7])) || !linear.outputs ||
            !linear.take_norm(tensor_or_none(a[1]), eps, a[3].number) ||
            !linear.take_activation(word(a[10]), a[11].word == "True") || !linear.take_rounding(word(or_none(a, 12))))
            return false;
        if (residual.dims) {
            linear.residual = residual.at;
            if (!residual.is_dense() || residual.numel() != linear.rows * linear.width() || residual.kind != x.kind)
                return false;
        }
        int64_t sizes[MOST_DIMS];
        std::copy_n(x.sizes, x.dims, sizes);
        sizes[x.dims - 1] = linear.width();
        if (!(linear.y = place(x.dims, sizes, x.kind))) return false;
        return keep(linear);
    }

    // Whether keys and values are numbers of this kind, or codes with scales, which go to `floats` and `strides`.
    static bool take_cache(const View& keys, const View& values, const View (&scales)[2], int kind, int& cache_kind,
                           float** floats, int64_t (*strides)[3]) {
        const bool coded = scales[0].dims;
        cache_kind = keys.row_kind(coded);
        if (cache_kind < 0 || cache_kind != values.row_kind(coded) || (!coded && cache_kind != kind)) return false;
        for (int i = 0; i < 2 && coded; i++) {
            if (scales[i].dims != 3 || scales[i].kind != F32) return false;
            floats[i] = (float*)scales[i].at, scales[i].copy_strides(strides[i], 3);
        }
        return true;
    }

    // query, key, value, cos, sin, keys, values, positions, key_scales, value_scales, fixed
    bool add_rope(const std::vector<Argument>& a) {
        const View query = view(a[0]), key = view(a[1]), value = view(a[2]), keys = view(a[5]), values = view(a[6]);
        const View angles[] = {view(a[3]), view(a[4])}, scales[] = {view(or_none(a, 8)), view(or_none(a, 9))};
        const std::optional<Tensor> positions = tensor_or_none(a[7]);
        Rope rope = {};
        for (const View* each : {&query, &key, &value, &keys, &values})
            if (each->dims != 4 || each->strides[3] != 1) return false;
        float* floats[2] = {};
        if (query.kind < 0 || query.kind == U8 || key.kind != query.kind || value.kind != query.kind ||
            !take_cache(keys, values, scales, query.kind, rope.cache_kind, floats, rope.scale_strides))
            return false;
        rope.key_scales = floats[0], rope.value_scales = floats[1], rope.fixed = or_none(a, 10).word == "True";
        rope.kind = query.kind, rope.angle_kind = angles[0].kind;
        rope.batch = query.sizes[0], rope.heads = query.sizes[1], rope.kv_heads = key.sizes[1];
        rope.length = query.sizes[2], rope.width = query.sizes[3], rope.value_width = value.sizes[3];
        for (int i = 0; i < 2; i++) {
            const View& angle = angles[i];
            const int64_t dims = angle.dims;
            if (dims < 2 || dims > 4 || angle.kind != rope.angle_kind || angle.kind < 0 || angle.strides[dims - 1] != 1 ||
                angle.sizes[dims - 1] != rope.width || (dims > 2 && angle.sizes[dims - 3] != 1))
                return false;
            rope.angle_strides[i][0] = dims == 4 && angle.sizes[0] != 1 ? angle.strides[0] : 0;
            rope.angle_strides[i][1] = angle.sizes[dims - 2] != 1 ? angle.strides[dims - 2] : 0;
        }
        if (!positions || positions->scalar_type() != ScalarType::Long || !positions->is_contiguous() ||
            positions->numel() != rope.length)
            return false;
        rope.positions = (const int64_t*)positions->data_ptr(), rope.room = std::min(keys.sizes[2], values.sizes[2]);
        rope.check_positions();
        query.copy_strides(rope.query_strides, 3), key.copy_strides(rope.key_strides, 3);
        value.copy_strides(rope.value_strides, 3);
        keys.copy_strides(rope.keys_strides, 3), values.copy_strides(rope.values_strides, 3);
        rope.query = query.at, rope.key = key.at, rope.value = value.at, rope.cos = angles[0].at;
        rope.sin = angles[1].at, rope.keys = keys.at, rope.values = values.at;
        if (!(rope.out = place(4, query.sizes, query.kind))) return false;
        return keep(rope);
    }

    // query, key, value, mask, is_causal, scale, softcap, key_scale, value_scale
    bool add_attention(const std::vector<Argument>& a) {
        const View query = view(a[0]), key = view(a[1]), value = view(a[2]), mask = view(a[3]);
        const View scales[] = {view(or_none(a, 7)), view(or_none(a, 8))};
        for (const View* each : {&query, &key, &value})
            if (each->dims != 4 || each->strides[3] != 1) return false;
        int cache_kind;
        float* floats[2] = {};
        int64_t strides[2][3];
        if (query.kind < 0 || query.kind == U8 ||
            !take_cache(key, value, scales, query.kind, cache_kind, floats, strides) ||
            (scales[0].dims && (scales[0].strides[2] != 1 || scales[1].strides[2] != 1)))
            return false;
        Attention attention = {query.at,       key.at,         value.at,       mask.at,       floats[0],      floats[1],
                               nullptr,        query.sizes[0], query.sizes[1], key.sizes[1],  query.sizes[2], key.sizes[2],
                               query.sizes[3], value.sizes[3]};
        attention.cache_kind = cache_kind, std::copy_n(&strides[0][0], 6, &attention.scale_strides[0][0]);
        attention.scale = a[5].number, attention.softcap = word(or_none(a, 6)) ? a[6].number : 0, attention.kind = query.kind;
        query.copy_strides(attention.query_strides, 3), key.copy_strides(attention.key_strides, 3);
        value.copy_strides(attention.value_strides, 3);
        if (mask.dims) {
            if (mask.dims != 4 || mask.kind < 0) return false;
            mask.copy_strides(attention.mask_strides, 4), attention.mask_kind = mask.kind;
        }
        const int64_t sizes[] = {query.sizes[0], query.sizes[1], query.sizes[2], value.sizes[3]};
        if (!(attention.out = place(4, sizes, query.kind))) return false;
        return keep(attention);
    }
};

}  // namespace
