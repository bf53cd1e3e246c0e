/* SwiGLU of rows times their routing weights, forward and backward; `cpu_swiglu.py` tells of arguments and shapes.

   Each function reads and writes its rows once. Rows are float or bfloat16 (as uint16_t); sums and everything between
   a load and a store are FP32. A row's result does not depend on how many threads there are. */

#include <math.h>
#include <stdint.h>

static inline float exponential(float x) {
    /* 2^n e^r with n = round(x / ln 2), ln 2 in two parts and a polynomial of degree 7 in r; 1e-7 relative */
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = fmaf(n, -1.42860677e-6f, fmaf(n, -0.693145752f, x));
    float p = fmaf(r, 1.0f / 5040, 1.0f / 720);
    p = fmaf(p, r, 1.0f / 120);
    p = fmaf(p, r, 1.0f / 24);
    p = fmaf(p, r, 1.0f / 6);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p * r, r, r) + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return p * power.value;
}

static inline float load_float(float x) { return x; }
static inline float store_float(float x) { return x; }

static inline float load_bfloat16(uint16_t x) {
    union { uint32_t bits; float value; } wide = {(uint32_t)x << 16};
    return wide.value;
}

static inline uint16_t store_bfloat16(float x) { /* to nearest, ties to even */
    union { float value; uint32_t bits; } wide = {x};
    return (uint16_t)((wide.bits + 0x7fff + ((wide.bits >> 16) & 1)) >> 16);
}

#define DEFINE(T, NAME)                                                                                              \
    void swiglu_##NAME(const T *restrict both, const float *restrict scale, T *restrict out, int64_t rows,           \
                       int64_t width) {                                                                              \
        _Pragma("omp parallel for schedule(static)")                                                                 \
        for (int64_t row = 0; row < rows; row++) {                                                                   \
            const T *gate = both + 2 * width * row, *up = gate + width;                                              \
            T *to = out + width * row;                                                                               \
            float weight = scale[row];                                                                               \
            for (int64_t i = 0; i < width; i++) {                                                                    \
                float x = load_##NAME(gate[i]);                                                                      \
                to[i] = store_##NAME(x / (1.0f + exponential(-x)) * load_##NAME(up[i]) * weight);                    \
            }                                                                                                        \
        }                                                                                                            \
    }                                                                                                                \
                                                                                                                     \
    void swiglu_backward_##NAME(const T *restrict both, const float *restrict scale, T *restrict grad_out,           \
                                T *restrict grad_both, float *restrict grad_scale, int64_t rows, int64_t width) {    \
        _Pragma("omp parallel for schedule(static)")                                                                 \
        for (int64_t row = 0; row < rows; row++) {                                                                   \
            const T *gate = both + 2 * width * row, *up = gate + width;                                              \
            T *grad = grad_out + width * row, *grad_gate = grad_both + 2 * width * row, *grad_up = grad_gate + width;\
            float weight = scale[row], sum = 0.0f;                                                                   \
            _Pragma("omp simd reduction(+ : sum)")                                                                   \
            for (int64_t i = 0; i < width; i++) {                                                                    \
                float x = load_##NAME(gate[i]), y = load_##NAME(up[i]), g = load_##NAME(grad[i]);                    \
                float sigmoid = 1.0f / (1.0f + exponential(-x)), silu = x * sigmoid;                                 \
                sum += g * silu * y;                                                                                 \
                grad[i] = store_##NAME(silu * y * weight);                                                           \
                grad_gate[i] = store_##NAME(g * weight * y * sigmoid * (1.0f + x - silu));                           \
                grad_up[i] = store_##NAME(g * weight * silu);                                                        \
            }                                                                                                        \
            grad_scale[row] = sum;                                                                                   \
        }                                                                                                            \
    }

DEFINE(float, float)
DEFINE(uint16_t, bfloat16)
