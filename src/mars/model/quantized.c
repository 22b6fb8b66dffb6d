/* Products of a few activation rows with weights of 8 or 4 bits: what decode.c is built on.
 *
 * Memory is the limit: every weight is read once, by one thread, in the order in which it lies. Weights are kept in
 * tiles of 16 output rows, so that a register holds four inputs of each of them and no sum runs across a register:
 *
 *   codes  [tile][block][16 rows x 32 inputs]   8 bits: quarter q of a block holds inputs 4 q .. 4 q + 3 of each row
 *                                               4 bits: byte i of half h is quarters q = h and h + 4 (low, high bits)
 *   scales [tile][block][16 rows] fp16
 *
 * A block is 32 inputs. Codes are unsigned, with their zero at 128 or 8. Activations become 8 bits with one scale per
 * block and row, as in llama.cpp; sums inside a block are exact integers. Up to 8 rows share one reading of a weight.
 */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

enum { TILE = 16, BLOCK = 32, QUARTERS = BLOCK / 4, MOST = 8 };
enum { LINE = 64, AHEAD = 4096 }; /* bytes of a cache line, and how far in front of the codes memory is asked for more */
enum { CHUNK = 16 };              /* tiles that a thread takes at once: the next free one, as a core may be disturbed */

/* Rows of activations in 8 bits, in groups of MOST that lie behind each other; inside a group the block comes first. */
typedef struct {
  int8_t *codes;  /* (groups, blocks, rows of the group, 32) */
  float *scales;  /* (groups, blocks, rows of the group) */
  int32_t *sums;  /* of codes, likewise */
  long rows, inputs;
} Rounded;

static size_t rounded_bytes(long rows, long inputs) { return rows * inputs / BLOCK * (BLOCK + sizeof(float) + sizeof(int32_t)); }

static Rounded rounded_in(void *memory, long rows, long inputs) {
  float *scales = memory;
  int32_t *sums = (int32_t *)(scales + rows * inputs / BLOCK);
  return (Rounded){(int8_t *)(sums + rows * inputs / BLOCK), scales, sums, rows, inputs};
}

static inline long least(long a, long b) { return a < b ? a : b; }

/* Rounds 32 values of a row. */
static inline void round_block(const float *from, const Rounded *to, long row, long block) {
  const float round = 12582912; /* 1.5 * 2^23: added to a small number, it leaves the nearest integer in the low bits */
  float largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < BLOCK; i++) largest = fabsf(from[i]) > largest ? fabsf(from[i]) : largest;
  float inverse = largest > 0 ? 127 / largest : 0;
  long first = row / MOST * MOST, place = first * (to->inputs / BLOCK) + block * least(MOST, to->rows - first) + row - first;
  int8_t *codes = to->codes + place * BLOCK;
  int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < BLOCK; i++) {
    float shifted = from[i] * inverse + round;
    int32_t code;
    memcpy(&code, &shifted, sizeof code);
    code -= 0x4B400000;
    codes[i] = (int8_t)code;
    sum += code;
  }
  to->scales[place] = largest / 127;
  to->sums[place] = sum;
}

static void round_rows(const float *x, const Rounded *to) {
  for (long row = 0; row < to->rows; row++)
    for (long block = 0; block < to->inputs / BLOCK; block++) round_block(x + row * to->inputs + block * BLOCK, to, row, block);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

typedef __m512 Sums;
static inline Sums zero_sums(void) { return _mm512_setzero_ps(); }
static inline void store_sums(float *to, Sums sums) { _mm512_storeu_ps(to, sums); }

/* Adds a block of one tile for `rows` activation rows. */
static inline __attribute__((always_inline)) void add_block(Sums *sums, const uint8_t *codes, const uint16_t *scales,
                                                            const int8_t *x, const float *x_scales,
                                                            const int32_t *x_sums, int rows, int bits) {
  __m512i products[MOST];
  for (int row = 0; row < rows; row++) products[row] = _mm512_set1_epi32(bits == 4 ? -8 * x_sums[row] : -128 * x_sums[row]);
  if (bits == 4) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int half = 0; half < QUARTERS / 2; half++) {
      __m512i both = _mm512_loadu_si512(codes + 64 * half);
      __m512i first = _mm512_and_si512(both, low), second = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
      for (int row = 0; row < rows; row++) {
        const int32_t *four = (const int32_t *)(x + row * BLOCK);
        products[row] = _mm512_dpbusd_epi32(products[row], first, _mm512_set1_epi32(four[half]));
        products[row] = _mm512_dpbusd_epi32(products[row], second, _mm512_set1_epi32(four[half + QUARTERS / 2]));
      }
    }
  } else {
    for (int quarter = 0; quarter < QUARTERS; quarter++) {
      __m512i weights = _mm512_loadu_si512(codes + 64 * quarter);
      for (int row = 0; row < rows; row++) {
        const int32_t *four = (const int32_t *)(x + row * BLOCK);
        products[row] = _mm512_dpbusd_epi32(products[row], weights, _mm512_set1_epi32(four[quarter]));
      }
    }
  }
  __m512 scale = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)scales));
  for (int row = 0; row < rows; row++) {
    __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x_scales[row]));
    sums[row] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[row]), both, sums[row]);
  }
}

#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)

typedef struct { __m256 half[2]; } Sums;
static inline Sums zero_sums(void) { return (Sums){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline void store_sums(float *to, Sums sums) {
  _mm256_storeu_ps(to, sums.half[0]);
  _mm256_storeu_ps(to + 8, sums.half[1]);
}

/* Four products of each of eight rows: weights below 16 do not overflow 16 bits, those of 8 bits are widened. */
static inline __m256i dot(__m256i sum, __m256i weights, int32_t four, int bits) {
  __m256i x = _mm256_set1_epi32(four);
  if (bits == 4) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(weights, x), _mm256_set1_epi16(1)));
  }
  __m256i even = _mm256_and_si256(weights, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(weights, 8);
  __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
  return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
}

static inline __attribute__((always_inline)) void add_block(Sums *sums, const uint8_t *codes, const uint16_t *scales,
                                                            const int8_t *x, const float *x_scales,
                                                            const int32_t *x_sums, int rows, int bits) {
  for (int side = 0; side < 2; side++) {
    __m256i products[MOST];
    const __m256i low = _mm256_set1_epi8(15);
    for (int row = 0; row < rows; row++) products[row] = _mm256_set1_epi32((bits == 4 ? -8 : -128) * x_sums[row]);
    for (int part = 0; part < (bits == 4 ? QUARTERS / 2 : QUARTERS); part++) {
      __m256i weights = _mm256_loadu_si256((const __m256i *)(codes + 64 * part + 32 * side));
      __m256i second = _mm256_and_si256(_mm256_srli_epi16(weights, 4), low);
      if (bits == 4) weights = _mm256_and_si256(weights, low);
      for (int row = 0; row < rows; row++) {
        const int32_t *four = (const int32_t *)(x + row * BLOCK);
        products[row] = dot(products[row], weights, four[part], bits);
        if (bits == 4) products[row] = dot(products[row], second, four[part + QUARTERS / 2], bits);
      }
    }
    __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 8 * side)));
    for (int row = 0; row < rows; row++) {
      __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[row]));
      sums[row].half[side] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[row]), both, sums[row].half[side]);
    }
  }
}

#else
#error "this kernel needs AVX2 with FMA and F16C"
#endif

/* A weight; outputs is a multiple of 16. */
typedef struct {
  const uint8_t *codes;
  const uint16_t *scales;
  long outputs, inputs, bits;
} Weight;

static inline __attribute__((always_inline)) void run_tiles(const Rounded *x, long first, const Weight *weight, long tile,
                                                            long end, float *out, int rows, int bits) {
  long blocks = weight->inputs / BLOCK, bytes = TILE * BLOCK * bits / 8;
  const int8_t *x_codes = x->codes + first * weight->inputs;
  const float *x_scales = x->scales + first * blocks;
  const int32_t *x_sums = x->sums + first * blocks;
  for (; tile < end; tile++) {
    Sums sums[MOST];
    for (int row = 0; row < rows; row++) sums[row] = zero_sums();
    for (long block = 0; block < blocks; block++) {
      const uint8_t *codes = weight->codes + (tile * blocks + block) * bytes;
      const uint16_t *scales = weight->scales + (tile * blocks + block) * TILE;
      for (long line = 0; line < bytes; line += LINE) __builtin_prefetch(codes + AHEAD + line, 0, 2);
      __builtin_prefetch(scales + AHEAD / 16, 0, 2);
      add_block(sums, codes, scales, x_codes + block * rows * BLOCK, x_scales + block * rows, x_sums + block * rows, rows, bits);
    }
    for (int row = 0; row < rows; row++) store_sums(out + (first + row) * weight->outputs + tile * TILE, sums[row]);
  }
}

static inline long chunks_of(const Weight *weight) { return (weight->outputs / TILE + CHUNK - 1) / CHUNK; }

/* One chunk of out (rows, outputs) = x times a weight, for rows `first` .. `first` + 8. */
static void run_chunk(const Rounded *x, long first, const Weight *weight, long chunk, float *out) {
  long tile = chunk * CHUNK, end = least(tile + CHUNK, weight->outputs / TILE);
  switch (least(MOST, x->rows - first) + (weight->bits == 4 ? MOST : 0)) {
#define CASE(N) \
  case N: run_tiles(x, first, weight, tile, end, out, N, 8); break; \
  case MOST + N: run_tiles(x, first, weight, tile, end, out, N, 4); break;
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
  }
}

/* Chunk number `chunk` of the products of one x with several weights; 0 if there are no more. */
static int run_any_chunk(const Rounded *x, const Weight *weights, float *const *outs, long count, long chunk) {
  for (long first = 0; first < x->rows; first += MOST) {
    for (long i = 0; i < count; i++) {
      if (chunk < chunks_of(weights + i)) {
        run_chunk(x, first, weights + i, chunk, outs[i]);
        return 1;
      }
      chunk -= chunks_of(weights + i);
    }
  }
  return 0;
}

/* Each of outs (rows, outputs) = x (rows, inputs) times a weight. Returns 0, or 1 when memory ran out. */
int mars_multiply(const float *x, long rows, long inputs, const Weight *weights, float *const *outs, long count) {
  void *memory = malloc(rounded_bytes(rows, inputs));
  if (!memory) return 1;
  Rounded rounded = rounded_in(memory, rows, inputs);
  round_rows(x, &rounded);
  long chunks = 0;
  for (long i = 0; i < count; i++) chunks += chunks_of(weights + i) * ((rows + MOST - 1) / MOST);
#pragma omp parallel for schedule(dynamic)
  for (long chunk = 0; chunk < chunks; chunk++) run_any_chunk(&rounded, weights, outs, count, chunk);
  free(memory);
  return 0;
}

enum { FP32, FP16, BF16 };

/* 32 weights of a row in fp32. */
static inline void load_block(const void *from, long place, int kind, float *to) {
  if (kind == FP32) memcpy(to, (const float *)from + place, BLOCK * sizeof(float));
  for (int i = 0; kind == FP16 && i < BLOCK; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)((const uint16_t *)from + place + i))));
  for (int i = 0; kind == BF16 && i < BLOCK; i++) {
    uint32_t bits = (uint32_t)((const uint16_t *)from)[place + i] << 16;
    memcpy(to + i, &bits, sizeof bits);
  }
}

/* Rounds 32 weights to codes 0 .. 255 or 0 .. 15; returns their scale. */
static inline uint16_t quantize_block(const float *from, int bits, uint8_t *codes) {
  const float round = 12582912;
  float zero = bits == 4 ? 8 : 128, largest = 0;
  for (int i = 0; i < BLOCK; i++) largest = fabsf(from[i]) > fabsf(largest) ? from[i] : largest;
  uint16_t scale = _cvtss_sh(bits == 4 ? largest / -8 : fabsf(largest) / 127, 0);
  float step = _cvtsh_ss(scale), inverse = step == 0 ? 0 : 1 / step;
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) {
    float value = from[i] * inverse;
    value = value < -zero ? -zero : value > zero - 1 ? zero - 1 : value;
    codes[i] = (uint8_t)(int)(value + round - round + zero);
  }
  return scale;
}

/* Rounds a weight (outputs, inputs) of fp32, fp16 or bf16 into tiles; the last one is filled up with zeros. */
void mars_quantize(const void *weight, int kind, long outputs, long inputs, int bits, uint8_t *codes, uint16_t *scales) {
  long blocks = inputs / BLOCK, bytes = TILE * BLOCK * bits / 8;
#pragma omp parallel for schedule(dynamic)
  for (long tile = 0; tile < (outputs + TILE - 1) / TILE; tile++) {
    for (long block = 0; block < blocks; block++) {
      uint8_t *to = codes + (tile * blocks + block) * bytes;
      for (long row = 0; row < TILE; row++) {
        float values[BLOCK] = {0};
        uint8_t own[BLOCK];
        if (tile * TILE + row < outputs) load_block(weight, (tile * TILE + row) * inputs + block * BLOCK, kind, values);
        scales[(tile * blocks + block) * TILE + row] = quantize_block(values, bits, own);
        for (int i = 0; bits == 4 && i < BLOCK / 2; i++) own[i] |= own[i + BLOCK / 2] << 4;
        for (int part = 0; part < (bits == 4 ? QUARTERS / 2 : QUARTERS); part++)
          memcpy(to + part * 4 * TILE + row * 4, own + part * 4, 4);
      }
    }
  }
}

/* Reads memory with all threads and returns a sum that depends on every byte: what bandwidth there is. */
uint64_t mars_read(const uint64_t *from, long words) {
  uint64_t sum = 0;
#pragma omp parallel for simd schedule(static) reduction(^ : sum)
  for (long i = 0; i < words; i++) sum ^= from[i];
  return sum;
}
