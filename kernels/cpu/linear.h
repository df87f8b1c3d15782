// A linear of a few rows with what stands around it, as a team of threads does it: few_rows of the library that was
// compiled for the weight's codes, between fused.h.

#include <algorithm>
#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

namespace {

// WEIGHT_ARGUMENTS in codes.h; x, its rows, stride and kind; y; bias and its kind; residual; what the team shares.
using ShareFewRows = void (*)(const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t,
                              int64_t, int64_t, int, int, float, const void*, int64_t, int64_t, int, void*,
                              const void*, int, const void*, Shares*);

// WEIGHT_ARGUMENTS; x, its rows, stride and kind; y; bias and its kind; threads.
using ManyRows = void (*)(const void*, const void*, const void*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                          int64_t, int, int, float, const void*, int64_t, int64_t, int, void*, const void*, int, int);

// What linear_cpu.py knows of a spec with so many columns; `most` rows of float32, bfloat16 and float16 for few_rows, and
// `many` for many_rows.
struct Reader {
    ShareFewRows few_rows;
    ManyRows many_rows;
    int64_t most[3], many[3], group, groups, height, bytes;
    int by_row, added;
    float offset;
};

std::map<std::pair<std::string, int64_t>, Reader> readers;
std::shared_mutex lock;
std::atomic<int64_t> readers_known{0};  // changes with what is known of them

std::optional<Reader> find_reader(const std::string& spec, int64_t columns) {
    std::shared_lock<std::shared_mutex> reading(lock);
    const auto found = readers.find({spec, columns});
    return found == readers.end() ? std::nullopt : std::optional<Reader>(found->second);
}

bool has_rows(const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && (columns == 1 || t.stride(1) == 1);
}

struct Linear {
    Reader reader;
    int64_t rows = 0, columns = 0, outputs = 0;
    int kind = 0;
    const void *x = nullptr, *norm_weight = nullptr, *residual = nullptr;
    int norm_kind = 0;
    std::optional<float> eps;
    float weight_offset = 0;
    const void *data = nullptr, *scale = nullptr, *zero = nullptr, *bias = nullptr;
    int64_t data_stride = 0, scale_stride = 0, zero_stride = 0;
    int scale_kind = 0, zero_kind = 0, bias_kind = 0;
    std::optional<Activation> activation;
    bool gated = false, rounds = false;
    void *y = nullptr, *wide = nullptr;  // before the gate, where there is one
    Shares shares;

    int64_t width() const { return gated ? outputs / 2 : outputs; }
    int64_t work() const { return rows * outputs * columns; }

    // Dense x of so many numbers. False, here and below: it is none of the ordinary ones.
    bool take_x(const void* x, int kind, int64_t count, int64_t columns) {
        if (!columns || kind < 0) return false;
        this->x = x, this->kind = kind, this->columns = columns, rows = count / columns;
        return true;
    }
    bool take_weight(const std::string& spec, const Tensor& data, const Tensor& scale,
                     const std::optional<Tensor>& zero, const std::optional<Tensor>& bias, bool or_many = false) {
        const std::optional<Reader> found = find_reader(spec, columns);
        if (!found || kind < 0 || kind > 2 || rows < 1 || data.dim() != 2) return false;
        if (rows > found->most[kind] && !(or_many && rows <= found->many[kind])) return false;
        reader = *found, outputs = data.size(0);
        const int64_t sides = reader.by_row ? (outputs + reader.height - 1) / reader.height : 1;
        if (!has_rows(data, outputs, reader.bytes) || !has_rows(scale, sides, reader.groups) || kind_of(scale) < 0 ||
            (zero && (!has_rows(*zero, sides, reader.groups) || kind_of(*zero) < 0)) ||
            (bias && (!bias->is_contiguous() || bias->numel() != outputs || kind_of(*bias) < 0)))
            return false;
        this->data = data.data_ptr(), data_stride = data.stride(0);
        this->scale = scale.data_ptr(), scale_kind = kind_of(scale);
        scale_stride = reader.by_row ? scale.stride(0) : 0;
        if (zero) {
            this->zero = zero->data_ptr(), zero_kind = kind_of(*zero) | reader.added;
            zero_stride = reader.by_row ? zero->stride(0) : 0;
        }
        if (bias) this->bias = bias->data_ptr(), bias_kind = kind_of(*bias);
        return true;
    }
    bool take_norm(const std::optional<Tensor>& weight, std::optional<double> eps, double weight_offset) {
        this->eps = eps, this->weight_offset = weight_offset;
        if (!weight) return true;
        norm_weight = weight->data_ptr(), norm_kind = kind_of(*weight);
        return weight->is_contiguous() && weight->numel() == columns && norm_kind >= 0;
    }
    bool take_activation(const std::optional<std::string>& name, bool gated) {
        if (name) activation = activation_of(*name);
        this->gated = gated;
        return activation.has_value() == name.has_value() && (!gated || (activation && outputs % 2 == 0));
    }

    bool take_rounding(const std::optional<std::string>& name) {
        rounds = name.has_value();
        return !rounds || *name == "i8/token/dynamic";
    }

    void run_many(int64_t threads) {
        reader.many_rows(data, scale, zero, outputs, columns, reader.group, reader.height, data_stride, scale_stride,
                         zero_stride, scale_kind, zero_kind, reader.offset, x, rows, columns, kind, y, bias, bias_kind,
                         threads);
    }

    // What a team needs.
    int64_t bytes(int64_t threads) const {
        return Shares::bytes(threads) + (gated ? rows * outputs * size_of(kind) : 0);
    }
    void begin(void* memory, int64_t threads) {
        shares.begin(memory, threads, outputs, rows_of_piece(outputs, columns, threads));
        wide = (char*)memory + Shares::bytes(threads);
    }
    // What a thread will read first.
    void prefetch(int64_t thread) const {
        constexpr int64_t BYTES = 8192;
        const char* at = (const char*)data + shares.first_of(thread) * shares.piece * data_stride;
        const int64_t bytes = std::min(BYTES, (const char*)data + outputs * data_stride - at);
        for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i, 0, 2);
    }
    // What one thread of a team does of it.
    void run(int64_t thread, Meeting& meeting) {
        static thread_local Scratch scratch;
        const int64_t size = size_of(kind);
        auto row = [&](const void* at, int64_t m, int64_t columns) { return (char*)at + m * columns * size; };
        const void* from = x;
        if (eps || rounds) {  // each thread for itself
            void* to = scratch.get<char>(rows * columns * size);
            for (int64_t m = 0; m < rows; m++) {
                char *its = row(x, m, columns), *made = row(to, m, columns);
                if (eps) norm_row(its, made, columns, kind, norm_weight, norm_kind, *eps, weight_offset);
                if (rounds) round_row(eps ? made : its, made, columns, kind);
            }
            from = to;
        }
        reader.few_rows(data, scale, zero, outputs, columns, reader.group, reader.height, data_stride, scale_stride,
                        zero_stride, scale_kind, zero_kind, reader.offset, from, rows, columns, kind, gated ? wide : y,
                        bias, bias_kind, activation ? nullptr : residual, &shares);
        if (!activation) return;
        meeting.wait();
        const int64_t vectors = whole(width()) / LANES, first = vectors * thread / shares.threads * LANES;
        const int64_t count = std::min(vectors * (thread + 1) / shares.threads * LANES, width()) - first;
        for (int64_t m = 0; m < rows; m++) {
            const char* gate = row(gated ? wide : y, m, outputs) + first * size;
            char* to = row(y, m, width()) + first * size;
            activate_row(gate, gated ? gate + width() * size : nullptr, to, count, kind, *activation);
            if (residual) add_row(to, row(residual, m, width()) + first * size, count, kind);
        }
    }
};

int64_t threads_for(int64_t work) {
    return std::min<int64_t>(torch::stable::get_num_threads(), 1 + work / WORK_OF_A_THREAD);
}

}  // namespace
