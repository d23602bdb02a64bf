// T steps of a layer of spiking neurons on the CPU, with batch normalisation, the shortcut's addition and the counts in
// the same pass. The equations and their derivation are in reference.py, compiled.py and norm.py.
//
// compiled.py compiles it once for each kind of neuron, and sets BF16, LEAKY, HARD, DETACH, SHAPE and PEAK. It does the
// reference's operations in the same order, and -ffp-contract=off does not fuse them: spikes and potentials are the same
// bits. A tensor is `steps` rows of M elements; element m belongs to channel m % C. Work is divided into blocks of BLOCK
// elements, whose potentials over all steps stay in the first-level cache. Floating-point sums have one lane for each
// element of a block, which the compiler vectorises; the lanes are folded into doubles in thread order.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if BF16
typedef uint16_t real;
static inline float load(real x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline real store(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (real)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);  // NaN stays NaN
}
#else
typedef float real;
static inline float load(real x) { return x; }
static inline real store(float value) { return value; }
#endif

enum { BLOCK = 128, FOLD = 64 };
enum { TRIANGLE, RECTANGLE, ATAN, SIGMOID };

struct Neuron { float v_th, v_reset, leak, width, amplitude; };

static inline float surrogate(float u, const Neuron& p, float inverse, float gain) {
    if (SHAPE == TRIANGLE) {
        float height = 1 - std::fabs(u) * inverse;
        return gain * (height < 0 ? 0 : height);
    }
    if (SHAPE == RECTANGLE) return gain * (std::fabs(u) < p.width ? 0.5f : 0.0f);
    float ratio = u * inverse;
    if (SHAPE == ATAN) return gain / 3.14159265358979323846f / (1 + ratio * ratio);
    float decay = std::exp(-std::fabs(ratio));
    return gain * decay / ((1 + decay) * (1 + decay));
}

static inline float step(float v, float x, const Neuron& p, float* s, float* after) {
    float h = LEAKY ? v + (x - (v - p.v_reset)) * p.leak : v + x;
    *s = h - p.v_th >= 0 ? 1.0f : 0.0f;
    *after = HARD ? h * (1 - *s) + p.v_reset * *s : h - p.v_th * *s;
    return h;
}

// One value a channel, repeated so that a block may start at any channel.
static std::vector<float> repeated(const float* channels, long C) {
    std::vector<float> table(channels ? C + BLOCK : 0);
    for (size_t i = 0; i < table.size(); i++) table[i] = channels[i % C];
    return table;
}

static inline void read(const real* x, const float* scale, const float* shift, long n, float* out) {
    if (scale)
        for (long i = 0; i < n; i++) out[i] = load(x[i]) * scale[i] + shift[i];
    else
        for (long i = 0; i < n; i++) out[i] = load(x[i]);
}

extern "C" void spike_forward(const real* x, const float* scale, const float* shift, const real* shortcut,
                              const float* v_in, real* out, float* v_out, long steps, long M, long C, long is_static,
                              const Neuron* neuron, long threads) {
    const Neuron p = *neuron;
    const std::vector<float> scales = repeated(scale, C), shifts = repeated(shift, C);
    long blocks = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long thread = 0; thread < threads; thread++) {
        for (long b = blocks * thread / threads; b < blocks * (thread + 1) / threads; b++) {
            long m = b * BLOCK, n = M - m < BLOCK ? M - m : BLOCK;
            float v[BLOCK], current[BLOCK];
            for (long i = 0; i < n; i++) v[i] = v_in ? v_in[m + i] : p.v_reset;
            for (long t = 0; t < steps; t++) {
                if (t == 0 || !is_static)
                    read(x + t * M + m, scale ? &scales[m % C] : 0, scale ? &shifts[m % C] : 0, n, current);
                real* to = out + t * M + m;
                const real* add = shortcut ? shortcut + t * M + m : 0;
                float s[BLOCK];
                for (long i = 0; i < n; i++) step(v[i], current[i], p, &s[i], &v[i]);
                if (add)
                    for (long i = 0; i < n; i++) to[i] = store(s[i] + load(add[i]));
                else
                    for (long i = 0; i < n; i++) to[i] = store(s[i]);
            }
            if (v_out)
                for (long i = 0; i < n; i++) v_out[m + i] = v[i];
        }
    }
}

// Sums of one thread: a lane for each element of a block, two for each channel (offset like the tables).
// A few terms in fp32, then doubles: g^2 of a rectangle is a constant, so its rounding errors would all add up.
struct Sums {
    float square[BLOCK] = {0}, leak[BLOCK] = {0};
    int32_t spikes[BLOCK] = {0}, covered[BLOCK] = {0};
    std::vector<float> gradient, product;
    double squares[BLOCK] = {0}, leaks[BLOCK] = {0};
    std::vector<double> gradients, products;

    explicit Sums(size_t n) : gradient(n), product(n), gradients(n), products(n) {}

    __attribute__((noinline)) void fold() {
        for (long i = 0; i < BLOCK; i++) squares[i] += square[i], square[i] = 0;
        for (long i = 0; i < BLOCK; i++) leaks[i] += leak[i], leak[i] = 0;
        for (size_t i = 0; i < gradient.size(); i++) gradients[i] += gradient[i], gradient[i] = 0;
        for (size_t i = 0; i < product.size(); i++) products[i] += product[i], product[i] = 0;
    }
};

extern "C" void spike_backward(const real* x, const float* scale, const float* shift, const float* mean,
                               const real* grad_s, const float* grad_last, const float* v_in, real* grad_x,
                               float* grad_first, double* counts, double* grad_leak, double* gradient,
                               double* product, long steps, long M, long C, long is_static,
                               const Neuron* neuron, long threads) {
    const Neuron p = *neuron;
    const std::vector<float> scales = repeated(scale, C), shifts = repeated(shift, C), means = repeated(mean, C);
    const float inverse = 1 / p.width;
    const float peak = SHAPE == TRIANGLE ? 1 : SHAPE == RECTANGLE ? 0.5f : SHAPE == ATAN ? 0.318309886183790672f : 0.25f;
    const float gain = PEAK ? p.amplitude / peak : p.amplitude * inverse;
    long blocks = (M + BLOCK - 1) / BLOCK;
    std::vector<Sums> sums(threads, Sums(scales.size()));
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long thread = 0; thread < threads; thread++) {
        Sums& sum = sums[thread];
        std::vector<float> h((steps + 1) * BLOCK), before(LEAKY ? steps * BLOCK : 0), currents(LEAKY ? steps * BLOCK : 0);
        for (long b = blocks * thread / threads; b < blocks * (thread + 1) / threads; b++) {
            long m = b * BLOCK, n = M - m < BLOCK ? M - m : BLOCK;
            float v[BLOCK], current[BLOCK], grad_v[BLOCK], total[BLOCK] = {0};
            for (long i = 0; i < n; i++) v[i] = v_in ? v_in[m + i] : p.v_reset;
            for (long t = 0; t < steps; t++) {
                if (t == 0 || !is_static)
                    read(x + t * M + m, scale ? &scales[m % C] : 0, scale ? &shifts[m % C] : 0, n, current);
                if (LEAKY) memcpy(&before[t * BLOCK], v, n * 4), memcpy(&currents[t * BLOCK], current, n * 4);
                float s, *potential = &h[t * BLOCK];
                for (long i = 0; i < n; i++) potential[i] = step(v[i], current[i], p, &s, &v[i]);
            }
            for (long i = 0; i < n; i++) grad_v[i] = grad_last ? grad_last[m + i] : 0;
            for (long t = steps - 1; t >= 0; t--) {
                const float* potential = &h[t * BLOCK];
                const real* from = grad_s + t * M + m;
                real* to = grad_x + t * M + m;
                float gx[BLOCK], squares[BLOCK];
                int32_t fired[BLOCK], inside[BLOCK];
                for (long i = 0; i < n; i++) {
                    float u = potential[i] - p.v_th, s = u >= 0 ? 1.0f : 0.0f;
                    float g = surrogate(u, p, inverse, gain);
                    float keep = HARD ? 1 - s : 1;
                    if (!DETACH) keep = keep + (HARD ? (p.v_reset - potential[i]) * g : -p.v_th * g);
                    float grad_h = load(from[i]) * g + grad_v[i] * keep;
                    squares[i] = g * g;
                    fired[i] = u >= 0;
                    inside[i] = std::fabs(u) < p.width;
                    if (LEAKY) sum.leak[i] += grad_h * (currents[t * BLOCK + i] - (before[t * BLOCK + i] - p.v_reset));
                    gx[i] = LEAKY ? grad_h * p.leak : grad_h;
                    grad_v[i] = LEAKY ? grad_h * (1 - p.leak) : grad_h;
                }
                if (counts) {
                    for (long i = 0; i < n; i++) sum.square[i] += squares[i];
                    for (long i = 0; i < n; i++) sum.spikes[i] += fired[i];
                    if (SHAPE <= RECTANGLE)
                        for (long i = 0; i < n; i++) sum.covered[i] += inside[i];
                }
                if (is_static)
                    for (long i = 0; i < n; i++) total[i] += gx[i];
                else
                    for (long i = 0; i < n; i++) to[i] = store(gx[i]);
                if (scale) {  // sums over time and position, for the gradient of batch normalisation
                    float *sum_g = &sum.gradient[m % C], *sum_p = &sum.product[m % C];
                    const float* centre = &means[m % C];
                    const real* y = x + (is_static ? 0 : t * M) + m;
                    for (long i = 0; i < n; i++) sum_g[i] += gx[i];
                    for (long i = 0; i < n; i++) sum_p[i] += gx[i] * (load(y[i]) - centre[i]);
                }
            }
            if (is_static)
                for (long i = 0; i < n; i++) grad_x[m + i] = store(total[i]);
            if (grad_first)
                for (long i = 0; i < n; i++) grad_first[m + i] = grad_v[i];
            if (b % FOLD == FOLD - 1) sum.fold();
        }
        sum.fold();
    }
    if (counts) counts[0] = (double)steps * M;  // in the order of tally.py
    for (long thread = 0; thread < threads; thread++) {
        Sums& sum = sums[thread];
        for (long i = 0; i < BLOCK && counts; i++) counts[1] += sum.spikes[i];
        for (long i = 0; i < BLOCK && counts; i++) counts[2] += sum.covered[i];
        for (long i = 0; i < BLOCK && counts; i++) counts[3] += sum.squares[i];
        for (long i = 0; i < BLOCK && grad_leak; i++) *grad_leak += sum.leaks[i];
        for (size_t i = 0; i < sum.gradients.size(); i++) {
            gradient[i % C] += sum.gradients[i];
            product[i % C] += sum.products[i];
        }
    }
}

// Mean and biased variance of each channel over `rows` rows, relative to the first row, so that nothing cancels.
extern "C" void channel_statistics(const real* y, float* mean, float* variance, long rows, long C, long threads) {
    std::vector<std::vector<double>> firsts(threads, std::vector<double>(C)), seconds(threads, std::vector<double>(C));
    std::vector<float> pivot(C);
    for (long c = 0; c < C; c++) pivot[c] = load(y[c]);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (long thread = 0; thread < threads; thread++) {
        std::vector<float> first(C), second(C);
        long end = rows * (thread + 1) / threads;
        for (long r = rows * thread / threads; r < end;) {
            long stop = r + 256 < end ? r + 256 : end;  // a few terms in fp32, then doubles
            std::memset(first.data(), 0, C * 4), std::memset(second.data(), 0, C * 4);
            float *a = first.data(), *b = second.data(), *k = pivot.data();
            for (; r < stop; r++) {
                const real* row = y + r * C;
#pragma omp simd
                for (long c = 0; c < C; c++) {
                    float d = load(row[c]) - k[c];
                    a[c] += d;
                    b[c] += d * d;
                }
            }
            for (long c = 0; c < C; c++) firsts[thread][c] += first[c], seconds[thread][c] += second[c];
        }
    }
    for (long c = 0; c < C; c++) {
        double first = 0, second = 0;
        for (long thread = 0; thread < threads; thread++) first += firsts[thread][c], second += seconds[thread][c];
        first /= rows, second = second / rows - first * first;
        mean[c] = (float)(pivot[c] + first);
        variance[c] = (float)(second > 0 ? second : 0);
    }
}

// grad <- a grad + b y + d by channel: the last step of batch normalisation's backward pass, in place.
extern "C" void channel_affine(const real* y, real* grad, const float* a, const float* b, const float* d, long M, long C,
                               long threads) {
    const std::vector<float> as = repeated(a, C), bs = repeated(b, C), ds = repeated(d, C);
    long blocks = (M + BLOCK - 1) / BLOCK;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long block = 0; block < blocks; block++) {
        long m = block * BLOCK, n = M - m < BLOCK ? M - m : BLOCK;
        const float *pa = &as[m % C], *pb = &bs[m % C], *pd = &ds[m % C];
#pragma omp simd
        for (long i = 0; i < n; i++) grad[m + i] = store(load(grad[m + i]) * pa[i] + load(y[m + i]) * pb[i] + pd[i]);
    }
}

// Byte j holds elements j, j + n, j + 2n, ... (n bytes in all): planes, so that packing and unpacking vectorise.
extern "C" void pack(const real* x, uint8_t* out, long n, long bits, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j0 = 0; j0 < n; j0 += BLOCK) {
        long end = j0 + BLOCK < n ? BLOCK : n - j0;
        int32_t word[BLOCK] = {0};
        for (long k = 0; k < 8 / bits; k++)
            for (long j = 0; j < end; j++) word[j] |= (int32_t)load(x[k * n + j0 + j]) << (bits * k);
        for (long j = 0; j < end; j++) out[j0 + j] = (uint8_t)word[j];
    }
}

extern "C" void unpack(const uint8_t* packed, real* out, long n, long bits, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long j0 = 0; j0 < n; j0 += BLOCK) {
        long end = j0 + BLOCK < n ? BLOCK : n - j0;
        for (long k = 0; k < 8 / bits; k++)
            for (long j = 0; j < end; j++)
                out[k * n + j0 + j] = store((float)((packed[j0 + j] >> (bits * k)) & ((1 << bits) - 1)));
    }
}

// Non-zero elements, sum |g| and sum g^2, in doubles, of P gradients in one loop: three numbers each. Parts have a fixed
// size and are folded in order: the same bits for any number of threads, as every rank must see the same sums.
extern "C" void gradient_sums(const real* const* gradients, const long* numels, double* out, long P, long threads) {
    const long part = 1 << 15;
    struct Part { const real* at; long n, owner; };
    std::vector<Part> parts;
    for (long g = 0; g < P; g++)
        for (long at = 0; at < numels[g]; at += part)
            parts.push_back({gradients[g] + at, numels[g] - at < part ? numels[g] - at : part, g});
    std::vector<double> sums(3 * parts.size());
#pragma omp parallel for num_threads(threads) schedule(static)
    for (size_t p = 0; p < parts.size(); p++) {
        const real* g = parts[p].at;
        long n = parts[p].n;
        int32_t count = 0;
        double magnitude = 0, square = 0;
#pragma omp simd reduction(+ : count, magnitude, square)
        for (long i = 0; i < n; i++) {
            double value = load(g[i]);
            count += value != 0;
            magnitude += std::fabs(value);
            square += value * value;
        }
        sums[3 * p] = count, sums[3 * p + 1] = magnitude, sums[3 * p + 2] = square;
    }
    for (long i = 0; i < 3 * P; i++) out[i] = 0;
    for (size_t p = 0; p < 3 * parts.size(); p++) out[3 * parts[p / 3].owner + p % 3] += sums[p];
}
