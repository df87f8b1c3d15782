// What a chain's steps read and make: where it lies, and whether that is as it was at the last call.

#include <stdexcept>

namespace {

// A tensor, or part of what a step makes.
struct View {
    char* at = nullptr;
    int kind = -1, code_kind = -1;  // as numbers, and as codes of a cache
    int64_t dims = 0, sizes[MOST_DIMS], strides[MOST_DIMS];

    int row_kind(bool coded) const { return coded ? code_kind : kind == U8 ? -1 : kind; }

    int64_t numel() const {
        int64_t count = 1;
        for (int64_t i = 0; i < dims; i++) count *= sizes[i];
        return count;
    }
    bool is_dense() const {
        int64_t next = 1;
        for (int64_t i = dims; i--; next *= sizes[i])
            if (sizes[i] != 1 && strides[i] != next) return false;
        return true;
    }
    // Of the first `count` dimensions; 0 where it is repeated.
    void copy_strides(int64_t* to, int64_t count) const {
        for (int64_t i = 0; i < count; i++) to[i] = sizes[i] == 1 ? 0 : strides[i];
    }
};

View view_of(const Tensor& t) {
    View v;
    v.at = (char*)t.data_ptr(), v.kind = t.scalar_type() == ScalarType::Bool ? U8 : kind_of(t), v.dims = t.dim();
    v.code_kind = kind_of_rows(t, true);
    if (v.dims > MOST_DIMS) throw std::runtime_error("chain: a tensor of more than eight dimensions");
    for (int64_t i = 0; i < v.dims; i++) v.sizes[i] = t.size(i), v.strides[i] = t.stride(i);
    return v;
}

// What a tensor was like.
struct Seen {
    void* at = nullptr;
    int64_t dims = -1, sizes[MOST_DIMS], strides[MOST_DIMS];
    int32_t dtype = -1;
    int64_t call = -1;  // the last one that looked, and whether the tensor was then as before
    bool same = false;

    void look(const Tensor& t, int64_t call) {
        if (this->call == call) return;
        void* at;
        int64_t dims, *sizes, *strides;
        int32_t dtype;
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(t.get(), &at));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(t.get(), &dims));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(t.get(), &sizes));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(t.get(), &strides));
        STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
        same = at == this->at && dims == this->dims && dtype == this->dtype &&
               std::equal(sizes, sizes + dims, this->sizes) && std::equal(strides, strides + dims, this->strides);
        this->call = call;
        if (same || dims > MOST_DIMS) return;
        this->at = at, this->dims = dims, this->dtype = dtype;
        std::copy_n(sizes, dims, this->sizes), std::copy_n(strides, dims, this->strides);
    }
};

}  // namespace
