// chain_packed of chain_cpu.py, and chains whose tensors were given once. What is not for them goes to chain_anyhow, the
// same in Python.

namespace {

Tensor run_chain(Chain chain, const std::vector<Tensor>& tensors, const std::vector<Tensor>& caches,
                 const std::string& steps) {
    const std::optional<Tensor> out = chain.run();
    return out ? *out : in_python("qcompile_kernels::chain_anyhow", tensors, caches, steps);
}

Tensor chain_packed(std::vector<Tensor> tensors, std::vector<Tensor> caches, std::string steps) {
    static thread_local std::unordered_map<const Text*, Kept> kept;
    const std::shared_ptr<const Text> text = text_of(steps);
    return run_chain({*text, tensors, caches, kept[text.get()], text->given}, tensors, caches, steps);
}

// A chain with all of its tensors but those at `moving`, which each call brings.
struct BoundChain {
    std::string steps;
    std::shared_ptr<const Text> text = text_of(steps);
    std::vector<Tensor> tensors, caches;
    std::vector<int64_t> moving;
    std::vector<Tensor> copies = std::vector<Tensor>(moving.size());
    Arguments looked = text->given;
    Kept kept = {};
    std::vector<Follower*> followers;  // of each call

    void finish(const Tensor& result) const {
        const int64_t count = result.size(result.dim() - 1);
        const Scores scores = {(char*)result.data_ptr(), result.numel() / std::max<int64_t>(1, count), count, count,
                               kind_of(result)};
        for (Follower* follower : followers) follower->follow(scores);
    }
};

// `given` are the tensors but the moving ones.
int64_t bind_chain(std::vector<Tensor> given, std::vector<int64_t> moving, std::vector<Tensor> caches,
                   std::string steps) {
    auto bound = new BoundChain{.steps = steps, .caches = caches, .moving = moving};
    const size_t count = given.size() + moving.size();
    auto moves = [&](int64_t i) { return std::find(moving.begin(), moving.end(), i) != moving.end(); };
    auto next = given.begin();
    for (size_t i = 0; i < count; i++) bound->tensors.push_back(moves(i) ? Tensor() : *next++);
    for (auto& arguments : bound->looked) {
        auto stays = [&](const Argument* a) { return a->type == Argument::CACHE || !moves(a->index); };
        arguments.erase(std::remove_if(arguments.begin(), arguments.end(), stays), arguments.end());
    }
    return (int64_t)bound;
}

// A dense tensor, in the memory of `copy` if that is of its shape.
void copy_to(Tensor& copy, const Tensor& from) {
    const auto sizes = from.sizes();
    if (!copy.defined() || copy.scalar_type() != from.scalar_type() || copy.dim() != from.dim() ||
        !std::equal(sizes.begin(), sizes.end(), copy.sizes().begin()))
        copy = empty(from, sizes.data(), from.dim());
    std::memcpy(copy.data_ptr(), from.data_ptr(), from.numel() * from.element_size());
}

// By one thread at a time. What a call brings is copied to where the last call's is: so the steps that read it are known.
Tensor bound_chain(int64_t bound, std::vector<Tensor> moving) {
    BoundChain& its = *(BoundChain*)bound;
    for (size_t i = 0; i < moving.size(); i++) {
        const Tensor& from = moving[i];
        const bool is_dense = from.is_contiguous();
        if (is_dense) copy_to(its.copies.at(i), from);
        its.tensors.at(its.moving.at(i)) = is_dense ? its.copies[i] : from;
    }
    const Tensor result =
        run_chain({*its.text, its.tensors, its.caches, its.kept, its.looked}, its.tensors, its.caches, its.steps);
    its.finish(result);
    return result;
}

}  // namespace

extern "C" void release_chain(int64_t bound) { delete (BoundChain*)bound; }

// From now on it follows each call of the chain.
extern "C" void let_follow(int64_t bound, Follower* follower) { ((BoundChain*)bound)->followers.push_back(follower); }

STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CPU, m) {
    m.impl("chain_packed", TORCH_BOX(&chain_packed));
    m.impl("bind_chain", TORCH_BOX(&bind_chain));
}
// Calls may bring no tensor, by which torch would know that it is the CPU's.
STABLE_TORCH_LIBRARY_IMPL(qcompile_kernels, CompositeExplicitAutograd, m) {
    m.impl("bound_chain", TORCH_BOX(&bound_chain));
}
