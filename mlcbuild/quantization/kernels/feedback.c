// Rounding with error feedback: the arithmetic of quantization/feedback.py, which says what it is.
//
// Compiled for one format: BITS, GROUP (values that share a scale), MODEL (1 float16, 2 bfloat16, 3 float32: what a
// scale is rounded to), SYMMETRIC (1, or 0 for a scale and a minimum, both bfloat16). Every sum has an order of its own
// and every operation is rounded on its own, so that neither threads nor the processor change a bit.

#include <stdint.h>

#define ROWS 16   // of a matrix at once: one in each lane
#define CHUNK 128 // terms of a sum that stay in the cache
#define WIDE 64   // columns that are packed together

typedef float f32v __attribute__((vector_size(4 * ROWS), aligned(4)));
typedef int32_t i32v __attribute__((vector_size(4 * ROWS), aligned(4)));
typedef uint32_t u32v __attribute__((vector_size(4 * ROWS), aligned(4)));
typedef _Float16 f16v __attribute__((vector_size(2 * ROWS), aligned(2)));
#define INLINE static inline __attribute__((always_inline))

INLINE f32v select(i32v where, f32v yes, f32v no) { return (f32v)(((i32v)yes & where) | ((i32v)no & ~where)); }
INLINE f32v least(f32v a, f32v b) { return select(a < b, a, b); }
INLINE f32v most(f32v a, f32v b) { return select(a > b, a, b); }
INLINE f32v fma(f32v a, f32v b, f32v c) { return __builtin_elementwise_fma(a, b, c); }
INLINE f32v all(float x) { return (f32v){} + x; }

// out [i, j] += sign * sum_t a[t, i] b[t, j], for i in [i0, i1) and j in [j0, j1), j1 - j0 a multiple of 16. Rows are
// `lda`, `ldb` and `ldo` long.
void mlcbuild_products(const float *a, int64_t lda, const float *b, int64_t ldb, int64_t terms, float sign, float *out,
                       int64_t ldo, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
  float left[CHUNK * WIDE] __attribute__((aligned(64))), right[CHUNK * ROWS] __attribute__((aligned(64)));
  for (int64_t i = i0; i < i1; i += WIDE) {
    const int64_t rows = i1 - i < WIDE ? i1 - i : WIDE;
    for (int64_t t0 = 0; t0 < terms; t0 += CHUNK) {
      const int64_t count = terms - t0 < CHUNK ? terms - t0 : CHUNK;
      for (int64_t t = 0; t < count; t++)
        for (int64_t r = 0; r < WIDE; r++) left[t * WIDE + r] = r < rows ? a[(t0 + t) * lda + i + r] : 0;
      for (int64_t j = j0; j < j1; j += ROWS) {
        for (int64_t t = 0; t < count; t++) *(f32v *)(right + t * ROWS) = *(const f32v *)(b + (t0 + t) * ldb + j);
        for (int64_t r = 0; r < rows; r += 4) {
          f32v s0 = {}, s1 = {}, s2 = {}, s3 = {};
          for (int64_t t = 0; t < count; t++) {
            const f32v x = *(f32v *)(right + t * ROWS);
            const float *y = left + t * WIDE + r;
            s0 = fma(all(y[0]), x, s0);
            s1 = fma(all(y[1]), x, s1);
            s2 = fma(all(y[2]), x, s2);
            s3 = fma(all(y[3]), x, s3);
          }
          const f32v sums[4] = {s0, s1, s2, s3};
          for (int64_t n = 0; n < 4 && r + n < rows; n++) {
            f32v *to = (f32v *)(out + (i + r + n) * ldo + j);
            *to = fma(all(sign), sums[n], *to);
          }
        }
      }
    }
  }
}

// Rows [a, b) of the upper triangular R with R^T R = the matrix that R held, its earlier rows done and taken away:
// columns [j0, j1), which are [a, b) first. No pivot is below `floor`.
void mlcbuild_factor(float *r, int64_t k, int64_t a, int64_t b, int64_t j0, int64_t j1, float floor) {
  for (int64_t i = a; i < b; i++) {
    float *row = r + i * k;
    for (int64_t n = a; n < i; n++) {
      const float *above = r + n * k, factor = -above[i];
      for (int64_t j = j0; j < j1; j++) row[j] = __builtin_fmaf(factor, above[j], row[j]);
    }
    if (j0 == a) {
      row[i] = __builtin_sqrtf(row[i] > floor ? row[i] : floor);
      for (int64_t j = a; j < i; j++) row[j] = 0;
    }
    const float inverse = 1.0f / row[i];
    for (int64_t j = j0 == a ? i + 1 : j0; j < j1; j++) row[j] *= inverse;
  }
}

#ifdef BITS
#define M ((1 << (BITS - 1)) - 1)
#define LOWEST (SYMMETRIC ? -M : 0)
#define HIGHEST (SYMMETRIC ? M + 1 : (1 << BITS) - 1)

INLINE f32v bfloat16(f32v x) {
  const u32v bits = (u32v)x;
  return (f32v)((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000u);
}

// A scale or a minimum as it is stored.
INLINE f32v stored(f32v x) {
  if (!SYMMETRIC || MODEL == 2) return bfloat16(most(least(x, all(3e38f)), all(-3e38f)));
  if (MODEL == 1)
    return __builtin_convertvector(__builtin_convertvector(most(least(x, all(65504.0f)), all(-65504.0f)), f16v), f32v);
  return x;
}

typedef struct {
  f32v scale, least;
} grid;

// A group's triangle R with R^T R its part of the metric: as it is, and each row divided by its diagonal, transposed.
typedef struct {
  float rows[GROUP][GROUP], unit[GROUP][GROUP], diagonal[GROUP], sums[GROUP];
} triangle;

static void take(triangle *r, const float *from, int64_t ld) {
  for (int j = 0; j < GROUP; j++) {
    const float pivot = from[j * ld + j];
    r->diagonal[j] = pivot;
    r->sums[j] = 0;
    for (int i = 0; i < GROUP; i++) {
      r->rows[j][i] = i < j ? 0 : from[j * ld + i];
      r->unit[i][j] = i > j ? from[j * ld + i] / pivot : 0;
      if (i >= j) r->sums[j] += from[j * ld + i];
    }
  }
}

// x := R^-1 x
static void solve(const triangle *r, f32v *x) {
  for (int j = 0; j < GROUP; j++) x[j] /= all(r->diagonal[j]);
  for (int j = GROUP - 1; j >= 0; j--)
    for (int i = 0; i < j; i++) x[i] = fma(all(-r->unit[j][i]), x[j], x[i]);
}

// x := R^-T x
static void solve_transposed(const triangle *r, f32v *x) {
  for (int j = 0; j < GROUP; j++) {
    x[j] /= all(r->diagonal[j]);
    for (int i = j + 1; i < GROUP; i++) x[i] = fma(all(-r->rows[j][i]), x[j], x[i]);
  }
}

// y := R x
static void multiply(const triangle *r, const f32v *x, f32v *y) {
  for (int j = 0; j < GROUP; j++) y[j] = (f32v){};
  for (int i = 0; i < GROUP; i++)
    for (int j = 0; j <= i; j++) y[j] = fma(all(r->rows[j][i]), x[i], y[j]);
}

// Codes for the target on a grid, last column first, each for what the later ones left; the squared error |R (t - q)|^2.
static f32v attempt(const triangle *r, const f32v *target, grid g, f32v *codes) {
  f32v wanted[GROUP], error = {};
  for (int j = 0; j < GROUP; j++) wanted[j] = target[j];
  const f32v inverse = select(g.scale == 0, all(0), all(1) / g.scale);
  for (int j = GROUP - 1; j >= 0; j--) {
    f32v code = __builtin_elementwise_rint((wanted[j] - g.least) * inverse);
    code = most(least(code, all(HIGHEST)), all(LOWEST));
    codes[j] = code;
    const f32v value = fma(code, g.scale, g.least), off = target[j] - value, alone = wanted[j] - value;
    const f32v weighted = alone * all(r->diagonal[j]);
    error = fma(weighted, weighted, error);
    for (int i = 0; i < j; i++) wanted[i] = fma(all(r->unit[j][i]), off, wanted[i]);
  }
  return error;
}

static f32v error_of(const triangle *r, const f32v *target, grid g, const f32v *codes) {
  f32v off[GROUP], weighted[GROUP], error = {};
  for (int j = 0; j < GROUP; j++) off[j] = target[j] - fma(codes[j], g.scale, g.least);
  multiply(r, off, weighted);
  for (int j = 0; j < GROUP; j++) error = fma(weighted[j], weighted[j], error);
  return error;
}

// The grid that serves these codes best; `seen` is R times the target.
static grid fitted(const triangle *r, const f32v *seen, const f32v *codes, grid before) {
  f32v y[GROUP], cc = {}, ct = {}, c1 = {}, t1 = {};
  float ones = 0;
  multiply(r, codes, y);
  for (int j = 0; j < GROUP; j++) {
    cc = fma(y[j], y[j], cc);
    ct = fma(y[j], seen[j], ct);
    c1 = fma(y[j], all(r->sums[j]), c1);
    t1 = fma(seen[j], all(r->sums[j]), t1);
    ones += r->sums[j] * r->sums[j];
  }
  if (SYMMETRIC) return (grid){stored(select(cc > 0, ct / cc, before.scale)), before.least};
  const f32v determinant = cc * all(ones) - c1 * c1;
  const i32v sound = determinant > all(1e-5f * ones) * cc;
  const f32v scale = stored(select(sound, (ct * all(ones) - c1 * t1) / determinant, before.scale));
  return (grid){scale, stored((t1 - scale * c1) / all(ones))};
}

INLINE void keep(grid *best, f32v *error, grid other, f32v others) {
  const i32v better = others < *error;
  *error = select(better, others, *error);
  best->scale = select(better, other.scale, best->scale);
  best->least = select(better, other.least, best->least);
}

// The best grid found for a target, among many that reach from its smallest to its largest value, more and less.
static grid searched(const triangle *r, const f32v *target, const f32v *seen, f32v *codes) {
  f32v low = all(3e38f), high = all(-3e38f), error = all(3e38f);
  for (int j = 0; j < GROUP; j++) low = least(low, target[j]), high = most(high, target[j]);
  grid best = {};
  if (SYMMETRIC) {
    const f32v unit = select(high >= -low, high, low); // the largest with its sign
    for (int n = 0; n < 27; n++) {
      const float steps = n < 21 ? M - 1.5f + 0.25f * n : M - 1.0f + 0.5f * (n - 21);
      const f32v scale = stored((n < 21 ? unit : -unit) / all(steps > 0.75f ? steps : 0.75f));
      const grid g = {scale, {}};
      keep(&best, &error, g, attempt(r, target, g, codes));
    }
  } else {
    for (int n = 0; n < 25; n++) {
      const f32v from = low + (high - low) * all(0.05f * (n % 5)), to = high - (high - low) * all(0.05f * (n / 5));
      const grid g = {stored((to - from) / all(HIGHEST)), stored(from)};
      keep(&best, &error, g, attempt(r, target, g, codes));
    }
  }
  for (int n = 0; n < 3; n++) {
    attempt(r, target, best, codes);
    const grid g = fitted(r, seen, codes, best);
    keep(&best, &error, g, attempt(r, target, g, codes));
  }
  return best;
}

// sums [8] += rows [8, k] of a matrix times errors [k, 16], their columns [from, to)
INLINE void add(const float *m, int64_t k, const f32v *errors, int64_t from, int64_t to, f32v *sums) {
  f32v s[8];
#pragma clang loop unroll(full)
  for (int n = 0; n < 8; n++) s[n] = sums[n];
  for (int64_t i = from; i < to; i++) {
#pragma clang loop unroll(full)
    for (int n = 0; n < 8; n++) s[n] = fma(all(m[n * k + i]), errors[i], s[n]);
  }
#pragma clang loop unroll(full)
  for (int n = 0; n < 8; n++) sums[n] = s[n];
}

// One pass over 16 rows of a matrix [k, 16]: their values w, codes, grids [k / GROUP, 16] and errors w - q, which are
// kept up to date. With `again` 0, `metric` is R and nothing is rounded yet; with 1 it is R^T R, `own` the triangles of
// its groups [k / GROUP, GROUP, GROUP], and no group gets worse.
void mlcbuild_feedback(const float *metric, const float *own, int64_t k, int again, const f32v *w, f32v *codes,
                       f32v *scales, f32v *minima, f32v *errors) {
  triangle r;
  for (int64_t group = k / GROUP - 1; group >= 0; group--) {
    const int64_t a = group * GROUP, b = a + GROUP;
    f32v target[GROUP], seen[GROUP], found[GROUP];
    for (int j = 0; j < GROUP; j += 8) {
      for (int n = 0; n < 8; n++) target[j + n] = (f32v){};
      if (again) add(metric + (a + j) * k, k, errors, 0, a, target + j);
      add(metric + (a + j) * k, k, errors, b, k, target + j);
    }
    take(&r, again ? own + a * GROUP : metric + a * k + a, again ? GROUP : k);
    if (again) solve_transposed(&r, target);
    solve(&r, target);
    for (int j = 0; j < GROUP; j++) target[j] += w[a + j];
    multiply(&r, target, seen);
    grid best = searched(&r, target, seen, found);
    const f32v error = attempt(&r, target, best, found);
    if (again) {
      const grid before = {scales[group], minima[group]}, refit = fitted(&r, seen, codes + a, before);
      grid kept = before;
      f32v other = error_of(&r, target, before, codes + a);
      keep(&kept, &other, refit, error_of(&r, target, refit, codes + a));
      const i32v better = error < other;
      for (int j = 0; j < GROUP; j++) found[j] = select(better, found[j], codes[a + j]);
      best.scale = select(better, best.scale, kept.scale);
      best.least = select(better, best.least, kept.least);
    }
    scales[group] = best.scale, minima[group] = best.least;
    for (int j = 0; j < GROUP; j++) {
      codes[a + j] = found[j];
      errors[a + j] = w[a + j] - fma(found[j], best.scale, best.least);
    }
  }
}
#endif
