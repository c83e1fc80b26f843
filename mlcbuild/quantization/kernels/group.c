// Symmetric group quantization: the bytes of quantization/group.py, which says what they are, in one pass.
//
// Compiled for one format: SOURCE and MODEL (F16, BF16 or F32), BITS, GROUP (values that share a scale), WORD_BITS,
// FLOOR (the least value that max|w| counts as). Without -ffast-math: every operation is rounded on its own.

#include <stdint.h>
#include <string.h>

#define F16 1
#define BF16 2
#define F32 3

#define PER_WORD (WORD_BITS / BITS)
#define WORDS (GROUP / PER_WORD)
#define M ((1 << (BITS - 1)) - 1)

#if WORD_BITS == 32
typedef uint32_t word_t;
#elif WORD_BITS == 16
typedef uint16_t word_t;
#else
typedef uint8_t word_t;
#endif

static inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

static inline float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Half to even to a mantissa that is `dropped` bits shorter, for finite x that stays finite.
static inline float shortened(float x, int dropped) {
  const uint32_t bits = bits_of(x), odd = (bits >> dropped) & 1;
  return float_of((bits + (1u << (dropped - 1)) - 1 + odd) & ~((1u << dropped) - 1));
}

#if SOURCE == F16
typedef _Float16 source_t;
static inline float widened(source_t x) { return (float)x; }
#elif SOURCE == BF16
typedef uint16_t source_t;
static inline float widened(source_t x) { return float_of((uint32_t)x << 16); }
#else
typedef float source_t;
static inline float widened(source_t x) { return x; }
#endif

// For each model dtype: the magnitudes, as the bits of a float, from which it is not finite; how a scale is stored, and
// read back; how a weight is rounded; and how a step of the arithmetic is, whose result is of no interest where it is
// very small: compilers do not vectorise conversions to _Float16.
#if MODEL == F16
typedef _Float16 scale_t;
#define FIRST_BAD 0x477FF000u
static inline scale_t stored(float x) { return (_Float16)x; }
static inline float loaded(scale_t x) { return (float)x; }
static inline float stepped(float x) { return shortened(x, 13); }
static inline float rounded(float x) {
#if SOURCE == F16
  return x;
#else
  // Denormals are multiples of 2^-24, and adding 0.75 leaves just those bits.
  return (bits_of(x) & 0x7FFFFFFF) < 0x38800000 ? (x + 0.75f) - 0.75f : shortened(x, 13);
#endif
}
#elif MODEL == BF16
typedef uint16_t scale_t;
#define FIRST_BAD 0x7F7F8000u
static inline scale_t stored(float x) { return (uint16_t)(bits_of(shortened(x, 16)) >> 16); }
static inline float loaded(scale_t x) { return float_of((uint32_t)x << 16); }
static inline float stepped(float x) { return shortened(x, 16); }
static inline float rounded(float x) { return shortened(x, 16); }
#else
typedef float scale_t;
#define FIRST_BAD 0x7F800000u
static inline scale_t stored(float x) { return x; }
static inline float loaded(scale_t x) { return x; }
static inline float stepped(float x) { return x; }
static inline float rounded(float x) { return x; }
#endif

static inline __attribute__((always_inline)) int encode(const source_t *restrict source, int64_t count, word_t *restrict words, scale_t *restrict scale) {
  float w[GROUP];
  for (int64_t i = 0; i < count; i++) w[i] = widened(source[i]);
  for (int64_t i = count; i < GROUP; i++) w[i] = 0;
  uint32_t largest = 0;
  for (int i = 0; i < GROUP; i++) {
    const uint32_t magnitude = bits_of(w[i]) & 0x7FFFFFFF;
    largest = magnitude > largest ? magnitude : largest;
  }
  if (largest >= FIRST_BAD) return 0;
  const float most = float_of(largest);
  *scale = stored(loaded(stored(most > (float)FLOOR ? most : (float)FLOOR)) / (float)M);
  const float step = loaded(*scale);
  uint8_t codes[GROUP];
  for (int i = 0; i < GROUP; i++) {
    // With a step of 0 the quotient may be infinite or NaN, which counts as -Inf: its code is 0.
    float quotient = rounded(w[i]) / step;
    quotient = quotient > -4.0f * M ? quotient : -4.0f * M;
    quotient = quotient < 4.0f * M ? quotient : 4.0f * M;
    const float code = __builtin_rintf(stepped(stepped(quotient) + (float)M));
    codes[i] = (uint8_t)(int32_t)(code < 0.0f ? 0.0f : code < 2.0f * M ? code : 2.0f * M);
  }
#if BITS == 4 && WORD_BITS == 32
  // Four times as fast as the loop below: the words of 8 bytes, halved in place.
  for (int i = 0; i < WORDS; i++) {
    uint64_t word;
    memcpy(&word, codes + 8 * i, 8);
    word = (word | word >> 4) & 0x00FF00FF00FF00FF;
    word = (word | word >> 8) & 0x0000FFFF0000FFFF;
    words[i] = (uint32_t)(word | word >> 16);
  }
#else
  for (int i = 0; i < WORDS; i++) {
    uint32_t word = 0;
    for (int j = 0; j < PER_WORD; j++) word |= (uint32_t)codes[i * PER_WORD + j] << (j * BITS);
    words[i] = (word_t)word;
  }
#endif
  return 1;
}

// Pack rows [count, k] into words [count, groups * WORDS] and scales [count, groups]. The codes of a partial last group
// end where the row does: the rest of its words is 0. Returns 0 where a value is not finite in the model dtype.
int mlcbuild_group_encode(const source_t *rows, int64_t count, int64_t k, word_t *words, scale_t *scales) {
  for (int64_t row = 0; row < count; row++) {
    int64_t start = 0;
    for (; start + GROUP <= k; start += GROUP) {
      if (!encode(rows + row * k + start, GROUP, words, scales)) return 0;
      words += WORDS;
      scales++;
    }
    if (start < k) {
      const int64_t used = k - start;
      if (!encode(rows + row * k + start, used, words, scales)) return 0;
      for (int64_t i = 0; i < WORDS; i++) {
        const int64_t codes = used - i * PER_WORD;
        if (codes < PER_WORD) words[i] &= codes > 0 ? (word_t)((1ull << (codes * BITS)) - 1) : 0;
      }
      words += WORDS;
      scales++;
    }
  }
  return 1;
}
