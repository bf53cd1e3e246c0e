// The routed experts on a CPU, forward and backward; `cpu_experts.py` tells of arguments and shapes.
//
// An expert's weights are brought into the layout of the products once, and its rows go through all of them 32 at a
// time, so that nothing between two products leaves the cache. The products are oneDNN's micro kernels, as torch
// exports them. Sums are FP32. Threads take whole experts: how many there are changes no bit of the result.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

namespace c10 {
struct BFloat16;
enum class ScalarType : int8_t { BFloat16 = 15 };
}

namespace at::native::cpublas {
bool could_pack(c10::ScalarType);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const float *a,
            const float *b, float *c, bool packed);
void brgemm(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add, const c10::BFloat16 *a,
            const c10::BFloat16 *b, float *c, bool packed);
void brgemm_release(bool packed);
}

namespace {

namespace cpublas = at::native::cpublas;
using bfloat16 = uint16_t;

constexpr int64_t ROWS = 32; // of one product

// Rows that lie interleaved in the right operand of a product, so that it is 32-bit words: k / PAIR rows of n words.
template <class T> constexpr int64_t PAIR = sizeof(uint32_t) / sizeof(T);

// Rows of an expert that one product sums into its weight gradients, at most: more would leave the cache.
template <class T> constexpr int64_t CHUNK = 512 * PAIR<T>;

inline __attribute__((always_inline)) float exponential(float x) { // a call would keep loops from vectors
    // 2^n e^r with n = round(x / ln 2), ln 2 in two parts and a polynomial of degree 7 in r; 1e-7 relative
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
    float p = fmaf(r, 1.0f / 5040, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p * r, r, r) + 1.0f;
    return p * __builtin_bit_cast(float, ((int32_t)n + 127) << 23);
}

float load(float x) { return x; }
float load(bfloat16 x) { return __builtin_bit_cast(float, (uint32_t)x << 16); }

void store(float x, float *to) { *to = x; }
void store(float x, bfloat16 *to) { // to nearest, ties to even
    uint32_t bits = __builtin_bit_cast(uint32_t, x);
    *to = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T> void store(const float *from, int64_t count, T *to) {
    if ((const void *)from == to)
        return;
    #pragma omp simd
    for (int64_t i = 0; i < count; i++)
        store(from[i], to + i);
}

// c [m, n] = a [m, k] b [k, n], or that added to c; b interleaved
void product(int64_t m, int64_t n, int64_t k, const float *a, const uint32_t *b, float *c, bool add = false) {
    cpublas::brgemm(m, n, k, k, n, n, add, a, (const float *)b, c, false);
}

void product(int64_t m, int64_t n, int64_t k, const bfloat16 *a, const uint32_t *b, float *c, bool add = false) {
    cpublas::brgemm(m, n, k, k, n, n, add, (const c10::BFloat16 *)a, (const c10::BFloat16 *)b, c, true);
}

// Where a product goes: an FP32 one to its place, if all its rows belong there, others to `sums`, to be stored.
float *place(float *out, float *sums, int64_t count = ROWS) { return count == ROWS ? out : sums; }
float *place(bfloat16 *, float *sums, int64_t = ROWS) { return sums; }

// [rows, width] as [rows / PAIR, width] words, in `to` unless they are that already
const uint32_t *interleave(const float *from, int64_t, int64_t, uint32_t *) { return (const uint32_t *)from; }

const uint32_t *interleave(const bfloat16 *from, int64_t rows, int64_t width, uint32_t *to) {
    for (int64_t row = 0; row < rows; row += 2)
        for (int64_t i = 0; i < width; i++)
            to[row / 2 * width + i] = from[row * width + i] | (uint32_t)from[(row + 1) * width + i] << 16;
    return to;
}

// Where rows are written that `interleave` brings to `to`
float *before(float *, uint32_t *to) { return (float *)to; }
bfloat16 *before(bfloat16 *space, uint32_t *) { return space; }

typedef uint32_t Words __attribute__((vector_size(64)));

template <uint32_t STEP> void exchange(Words *rows) { // blocks of STEP x STEP words across the diagonal
    const Words place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const Words second = (Words)((place & STEP) != 0); // all bits where a lane belongs to the second block
    const Words lower = place + (second & (16 - STEP)), upper = place + STEP + (second & (16 - STEP));
    #pragma GCC unroll 16
    for (uint32_t i = 0; i < 16; i++)
        if (!(i & STEP)) {
            Words a = rows[i], b = rows[i + STEP];
            rows[i] = __builtin_shuffle(a, b, lower);
            rows[i + STEP] = __builtin_shuffle(a, b, upper);
        }
}

// [rows, width] words to [width, rows], whose rows are `stride` words apart; rows and width are multiples of 16
void transpose(const uint32_t *from, int64_t rows, int64_t width, uint32_t *to, int64_t stride) {
    for (int64_t row = 0; row < rows; row += 16)
        for (int64_t column = 0; column < width; column += 16) {
            Words block[16];
            for (int64_t i = 0; i < 16; i++)
                memcpy(block + i, from + (row + i) * width + column, sizeof(Words));
            exchange<8>(block);
            exchange<4>(block);
            exchange<2>(block);
            exchange<1>(block);
            for (int64_t i = 0; i < 16; i++)
                memcpy(to + (column + i) * stride + row, block + i, sizeof(Words));
        }
}

// The rows of `from` [tokens, width] that belong to `choices`, then zeros up to ROWS.
template <class T>
void gather(const T *from, const int32_t *choices, int64_t rows, int64_t top_k, int64_t width, T *to) {
    for (int64_t row = 0; row < rows; row++)
        memcpy(to + row * width, from + choices[row] / top_k * width, width * sizeof(T));
    memset(to + rows * width, 0, (ROWS - rows) * width * sizeof(T));
}

// Choices (token * top_k + k) sorted by expert are the rows; the rows of an expert are [starts[e], starts[e + 1]).
struct Order {
    int64_t top_k;
    int32_t *choices, *rows, *starts; // the choice of a row, the row of a choice

    Order(int32_t *memory, int64_t tokens, int64_t top_k)
        : top_k(top_k), choices(memory), rows(memory + tokens * top_k), starts(memory + 2 * tokens * top_k) {}

    // Returns false when an expert is none of `experts`.
    bool sort(const int64_t *expert_of, int64_t count, int64_t experts) {
        memset(starts, 0, (experts + 2) * sizeof(int32_t));
        int32_t *next = starts + 1; // while rows are given out, the next one of each expert
        for (int64_t choice = 0; choice < count; choice++) {
            if (expert_of[choice] < 0 || expert_of[choice] >= experts)
                return false;
            next[expert_of[choice] + 1]++;
        }
        for (int64_t expert = 0; expert < experts; expert++)
            next[expert + 1] += next[expert];
        for (int64_t choice = 0; choice < count; choice++) {
            int32_t row = next[expert_of[choice]]++;
            rows[choice] = row, choices[row] = choice;
        }
        return true;
    }
};

// A thread's memory: tensors one after the other, each at a cache line.
class Scratch {
  public:
    template <class T> T *take(int64_t count) {
        auto place = (T *)((char *)start + used);
        used += (count * sizeof(T) + 63) / 64 * 64;
        return place;
    }
    void allocate() { start = aligned_alloc(64, used); used = 0; }
    ~Scratch() { free(start); }

  private:
    void *start = nullptr;
    int64_t used = 0;
};

template <class T>
void swiglu(const T *both, float scale, int64_t width, T *out) {
    #pragma omp simd
    for (int64_t i = 0; i < width; i++) {
        float gate = load(both[i]);
        store(gate / (1.0f + exponential(-gate)) * load(both[width + i]) * scale, out + i);
    }
}

// Returns the gradient of the scale; `out` is swiglu's, computed again.
template <class T>
float swiglu_backward(const T *both, float scale, const float *grad, int64_t width, T *grad_both, T *out) {
    float sum = 0.0f;
    #pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; i++) {
        float gate = load(both[i]), up = load(both[width + i]), scaled = grad[i] * scale;
        float sigmoid = 1.0f / (1.0f + exponential(-gate)), silu = gate * sigmoid;
        sum += grad[i] * silu * up;
        store(silu * up * scale, out + i);
        store(scaled * up * sigmoid * (1.0f + gate - silu), grad_both + i);
        store(scaled * silu, grad_both + width + i);
    }
    return sum;
}

// To each of `tokens` the sum of its rows, in FP32 and rounded once: more rounding would send tokens of the next layer to
// other experts.
template <class T>
void combine(const T *rows, const Order &order, int64_t tokens, int64_t size, float *sum, T *out) {
    #pragma omp for
    for (int64_t token = 0; token < tokens; token++) {
        float *to = place(out + token * size, sum);
        for (int64_t k = 0; k < order.top_k; k++) {
            const T *row = rows + order.rows[token * order.top_k + k] * size;
            #pragma omp simd
            for (int64_t i = 0; i < size; i++)
                to[i] = (k ? to[i] : 0.0f) + load(row[i]);
        }
        store(to, size, out + token * size);
    }
}

template <class T>
void forward(const T *hidden, const T *gate_up, const T *down, const float *weights, const Order &order, T *projected,
             T *returned, T *out, int64_t tokens, int64_t experts, int64_t size, int64_t width) {
    #pragma omp parallel
    {
        Scratch scratch;
        uint32_t *gate_up_words, *down_words;
        T *rows, *gated;
        float *sums;
        for (int pass = 0; pass < 2; pass++) {
            gate_up_words = scratch.take<uint32_t>(size / PAIR<T> * 2 * width);
            down_words = scratch.take<uint32_t>(width / PAIR<T> * size);
            rows = scratch.take<T>(ROWS * size), gated = scratch.take<T>(ROWS * width);
            sums = scratch.take<float>(ROWS * (size > 2 * width ? size : 2 * width));
            if (!pass)
                scratch.allocate();
        }
        #pragma omp for schedule(dynamic)
        for (int64_t expert = 0; expert < experts; expert++) {
            int64_t first = order.starts[expert], end = order.starts[expert + 1];
            if (first == end)
                continue;
            auto my_gate_up = (const uint32_t *)(gate_up + expert * 2 * width * size);
            auto my_down = (const uint32_t *)(down + expert * size * width);
            transpose(my_gate_up, 2 * width, size / PAIR<T>, gate_up_words, 2 * width);
            transpose(my_down, size, width / PAIR<T>, down_words, size);
            for (int64_t start = first; start < end; start += ROWS) {
                int64_t count = end - start < ROWS ? end - start : ROWS;
                gather(hidden, order.choices + start, count, order.top_k, size, rows);
                float *both = place(projected + start * 2 * width, sums, count);
                product(ROWS, 2 * width, size, rows, gate_up_words, both);
                store(both, count * 2 * width, projected + start * 2 * width);
                for (int64_t row = 0; row < count; row++)
                    swiglu(projected + (start + row) * 2 * width, weights[order.choices[start + row]], width,
                           gated + row * width);
                float *result = place(returned + start * size, sums, count);
                product(ROWS, size, width, gated, down_words, result);
                store(result, count * size, returned + start * size);
            }
        }
        combine(returned, order, tokens, size, sums, out);
        cpublas::brgemm_release(PAIR<T> == 2);
    }
}

template <class T>
void backward(const T *hidden, const T *gate_up, const T *down, const float *weights, const Order &order,
              const T *projected, const T *grad_out, T *returned, T *grad_hidden, T *grad_gate_up, T *grad_down,
              float *grad_weights, int64_t tokens, int64_t experts, int64_t size, int64_t width) {
    int64_t longest = 0; // rows of an expert, or of a chunk
    for (int64_t expert = 0; expert < experts; expert++) {
        int64_t count = order.starts[expert + 1] - order.starts[expert];
        longest = count > longest ? count : longest;
    }
    longest = longest < CHUNK<T> ? (longest + ROWS - 1) / ROWS * ROWS : CHUNK<T>;
    int64_t larger = size > 2 * width ? size : 2 * width;
    #pragma omp parallel
    {
        Scratch scratch;
        uint32_t *gate_up_words, *down_words, *row_words, *inputs, *gated, *grad_turned, *grad_both_turned;
        T *input_rows, *gated_rows, *grad, *grad_both;
        float *sums, *sums_gate_up, *sums_down;
        for (int pass = 0; pass < 2; pass++) {
            gate_up_words = scratch.take<uint32_t>(2 * width / PAIR<T> * size);
            down_words = scratch.take<uint32_t>(size / PAIR<T> * width);
            row_words = scratch.take<uint32_t>(ROWS / PAIR<T> * larger);
            inputs = scratch.take<uint32_t>(longest / PAIR<T> * size);
            gated = scratch.take<uint32_t>(longest / PAIR<T> * width);
            grad_turned = scratch.take<uint32_t>(longest / PAIR<T> * size);
            grad_both_turned = scratch.take<uint32_t>(longest / PAIR<T> * 2 * width);
            input_rows = scratch.take<T>(ROWS * size), gated_rows = scratch.take<T>(ROWS * width);
            grad = scratch.take<T>(ROWS * size), grad_both = scratch.take<T>(ROWS * 2 * width);
            sums = scratch.take<float>(ROWS * larger);
            sums_gate_up = scratch.take<float>(2 * width * size), sums_down = scratch.take<float>(size * width);
            if (!pass)
                scratch.allocate();
        }
        #pragma omp for schedule(dynamic)
        for (int64_t expert = 0; expert < experts; expert++) {
            int64_t first = order.starts[expert], end = order.starts[expert + 1];
            T *my_grad_gate_up = grad_gate_up + expert * 2 * width * size;
            T *my_grad_down = grad_down + expert * size * width;
            if (first == end) {
                memset(my_grad_gate_up, 0, 2 * width * size * sizeof(T));
                memset(my_grad_down, 0, size * width * sizeof(T));
                continue;
            }
            auto my_gate_up = interleave(gate_up + expert * 2 * width * size, 2 * width, size, gate_up_words);
            auto my_down = interleave(down + expert * size * width, size, width, down_words);
            float *to_gate_up = place(my_grad_gate_up, sums_gate_up), *to_down = place(my_grad_down, sums_down);
            for (int64_t chunk = first; chunk < end; chunk += CHUNK<T>) {
                int64_t last = end - chunk < CHUNK<T> ? end : chunk + CHUNK<T>;
                int64_t together = (last - chunk + ROWS - 1) / ROWS * ROWS, stride = together / PAIR<T>;
                for (int64_t start = chunk; start < last; start += ROWS) {
                    int64_t count = last - start < ROWS ? last - start : ROWS, word = (start - chunk) / PAIR<T>;
                    T *my_inputs = before(input_rows, inputs + word * size);
                    T *my_gated = before(gated_rows, gated + word * width);
                    gather(grad_out, order.choices + start, count, order.top_k, size, grad);
                    gather(hidden, order.choices + start, count, order.top_k, size, my_inputs);
                    product(ROWS, width, size, grad, my_down, sums);
                    for (int64_t row = 0; row < count; row++) {
                        int64_t choice = order.choices[start + row];
                        grad_weights[choice] = swiglu_backward(
                            projected + (start + row) * 2 * width, weights[choice], sums + row * width, width,
                            grad_both + row * 2 * width, my_gated + row * width);
                    }
                    memset(my_gated + count * width, 0, (ROWS - count) * width * sizeof(T));
                    memset(grad_both + count * 2 * width, 0, (ROWS - count) * 2 * width * sizeof(T));
                    float *result = place(returned + start * size, sums, count);
                    product(ROWS, size, 2 * width, grad_both, my_gate_up, result);
                    store(result, count * size, returned + start * size);
                    interleave(my_inputs, ROWS, size, inputs + word * size);
                    interleave(my_gated, ROWS, width, gated + word * width);
                    transpose(interleave(grad, ROWS, size, row_words), ROWS / PAIR<T>, size,
                              grad_turned + word, stride);
                    transpose(interleave(grad_both, ROWS, 2 * width, row_words), ROWS / PAIR<T>, 2 * width,
                              grad_both_turned + word, stride);
                }
                product(size, width, together, (const T *)grad_turned, gated, to_down, chunk > first);
                product(2 * width, size, together, (const T *)grad_both_turned, inputs, to_gate_up, chunk > first);
            }
            store(to_gate_up, 2 * width * size, my_grad_gate_up);
            store(to_down, size * width, my_grad_down);
        }
        combine(returned, order, tokens, size, sums, grad_hidden);
        cpublas::brgemm_release(PAIR<T> == 2);
    }
}

} // namespace

extern "C" {

bool has_bfloat16() { return cpublas::could_pack(c10::ScalarType::BFloat16); }

#define EXPORT(NAME, T)                                                                                                \
    bool forward_##NAME(const T *hidden, const T *gate_up, const T *down, const int64_t *indices,                      \
                        const float *weights, int32_t *memory, T *projected, T *returned, T *out, int64_t tokens,      \
                        int64_t top_k, int64_t experts, int64_t size, int64_t width) {                                 \
        Order order(memory, tokens, top_k);                                                                            \
        if (!order.sort(indices, tokens * top_k, experts))                                                             \
            return false;                                                                                              \
        forward(hidden, gate_up, down, weights, order, projected, returned, out, tokens, experts, size, width);        \
        return true;                                                                                                   \
    }                                                                                                                  \
    void backward_##NAME(const T *hidden, const T *gate_up, const T *down, const float *weights, int32_t *memory,      \
                         const T *projected, const T *grad_out, T *returned, T *grad_hidden, T *grad_gate_up,          \
                         T *grad_down, float *grad_weights, int64_t tokens, int64_t top_k, int64_t experts,            \
                         int64_t size, int64_t width) {                                                                \
        backward(hidden, gate_up, down, weights, Order(memory, tokens, top_k), projected, grad_out, returned,          \
                 grad_hidden, grad_gate_up, grad_down, grad_weights, tokens, experts, size, width);                    \
    }

EXPORT(float, float)
EXPORT(bfloat16, bfloat16)
}
