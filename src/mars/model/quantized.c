/* Products of a few activation rows with weights of 16, 8 or 4 bits: what decode.c is built on.
 *
 * Memory is the limit: every weight is read once, by one thread, in the order in which it lies. Weights are kept in
 * tiles of 16 output rows, so that a register holds inputs of each of them and no sum runs across a register:
 *
 *   codes  [tile][block][16 rows x 32 inputs]   8 bits: quarter q of a block holds inputs 4 q .. 4 q + 3 of each row
 *                                               4 bits: byte i of half h is quarters q = h and h + 4 (low, high bits)
 *   scales [tile][block][16 rows] fp16
 *
 * A block is 32 inputs. Codes of 8 and 4 bits are unsigned, with their zero at 128 or 8; activations become 8 bits with
 * one scale per block and row, as in llama.cpp, and sums inside a block are exact integers. Up to 8 rows share one reading
 * of a weight; a row's sums do not depend on the rows beside it. For weights of 16 bits see amx.c and halves.c.
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
enum { CHUNK = 1 << 17 };         /* bytes that a thread takes at once: the next free ones, as a core may be disturbed */

/* Rows of activations in groups that lie behind each other: in 8 bits, or as weights of 16 bits want them. Inside a group
 * the input or block comes first, so that what is read together lies together. */
typedef struct {
  float *whole;       /* (groups, inputs, rows of the group) */
  int8_t *codes;      /* (groups, blocks, rows of the group, 32) */
  float *scales;      /* (groups, blocks, rows of the group) */
  int32_t *sums;      /* of codes, likewise */
  long rows, inputs;
} Rows;

/* A weight; outputs is a multiple of 16, inputs one of 32, or with 16 bits any number. */
typedef struct {
  const uint8_t *codes;
  const void *scales;
  long outputs, inputs, bits;
} Weight;

static inline long least(long a, long b) { return a < b ? a : b; }

#if defined(__AMX_INT8__) && defined(__AVX512BW__) && defined(__linux__)
#include "amx.c"
#elif defined(__AVX2__) && defined(__F16C__) && defined(__FMA__)
#include "halves.c"
#else
#error "this kernel needs AVX2 with FMA and F16C"
#endif

static size_t taken_bytes(long rows, long inputs, long bits) {
  return bits == 16 ? whole_bytes(rows, inputs) : rows * inputs / BLOCK * (BLOCK + sizeof(float) + sizeof(int32_t));
}

/* Room for rows that are yet to be taken; `memory` has `taken_bytes`. */
static Rows rows_in(void *memory, long rows, long inputs, long bits) {
  if (bits == 16) return whole_rows_in(memory, rows, inputs);
  float *scales = memory;
  int32_t *sums = (int32_t *)(scales + rows * inputs / BLOCK);
  return (Rows){.codes = (int8_t *)(sums + rows * inputs / BLOCK), .scales = scales, .sums = sums, .rows = rows, .inputs = inputs};
}

/* Rounds 32 values of a row. */
static inline void round_block(const float *from, const Rows *to, long row, long block) {
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

/* x (rows, inputs) as weights of some bits take it; `memory` has `taken_bytes`. */
static Rows take_rows(const float *x, long rows, long inputs, long bits, void *memory) {
  Rows to = rows_in(memory, rows, inputs, bits);
  for (long row = 0; row < rows; row++) {
    if (bits == 16) take_row(x + row * inputs, &to, row);
    else
      for (long block = 0; block < inputs / BLOCK; block++) round_block(x + row * inputs + block * BLOCK, &to, row, block);
  }
  return to;
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

#else

typedef struct { __m256 half[2]; } Sums;
static inline Sums zero_sums(void) { return (Sums){{_mm256_setzero_ps(), _mm256_setzero_ps()}}; }
static inline void store_sums(float *to, Sums sums) {
  _mm256_storeu_ps(to, sums.half[0]);
  _mm256_storeu_ps(to + 8, sums.half[1]);
}

/* Four products of each of eight rows: weights below 16 do not overflow 16 bits, those of 8 bits are widened. */
static inline __m256i add_four(__m256i sum, __m256i weights, int32_t four, int bits) {
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
        products[row] = add_four(products[row], weights, four[part], bits);
        if (bits == 4) products[row] = add_four(products[row], second, four[part + QUARTERS / 2], bits);
      }
    }
    __m256 scale = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(scales + 8 * side)));
    for (int row = 0; row < rows; row++) {
      __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x_scales[row]));
      sums[row].half[side] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products[row]), both, sums[row].half[side]);
    }
  }
}

#endif

/* One tile for activation rows `first` .. `first` + `rows`. */
static inline __attribute__((always_inline)) void run_tile(const Rows *x, long first, const Weight *weight, long tile, float *out,
                                                           int rows, int bits) {
  out += first * weight->outputs + tile * TILE;
  long blocks = weight->inputs / BLOCK, bytes = TILE * BLOCK * bits / 8;
  const int8_t *x_codes = x->codes + first * weight->inputs;
  const float *x_scales = x->scales + first * blocks;
  const int32_t *x_sums = x->sums + first * blocks;
  Sums sums[MOST];
  for (int row = 0; row < rows; row++) sums[row] = zero_sums();
  for (long block = 0; block < blocks; block++) {
    const uint8_t *codes = weight->codes + (tile * blocks + block) * bytes;
    const uint16_t *scales = (const uint16_t *)weight->scales + (tile * blocks + block) * TILE;
    for (long line = 0; line < bytes; line += LINE) __builtin_prefetch(codes + AHEAD + line, 0, 2);
    __builtin_prefetch(scales + AHEAD / 16, 0, 2);
    add_block(sums, codes, scales, x_codes + block * rows * BLOCK, x_scales + block * rows, x_sums + block * rows, rows, bits);
  }
  for (int row = 0; row < rows; row++) store_sums(out + row * weight->outputs, sums[row]);
}

/* Tiles of a chunk. */
static inline long tiles_of(const Weight *weight) {
  long tiles = CHUNK / (weight->inputs * TILE * weight->bits / 8);
  return tiles ? tiles : 1;
}

static inline long chunks_of(const Weight *weight) { return (weight->outputs / TILE + tiles_of(weight) - 1) / tiles_of(weight); }

/* One chunk of out (rows, outputs) = x times a weight: a tile is read from memory once, for all rows. */
static void run_chunk(const Rows *x, const Weight *weight, long chunk, float *out) {
  long tile = chunk * tiles_of(weight), end = least(tile + tiles_of(weight), weight->outputs / TILE);
  if (weight->bits == 16) return run_whole_tiles(x, weight, tile, end, out);
  for (; tile < end; tile++) {
    for (long first = 0; first < x->rows; first += MOST) {
      switch (least(MOST, x->rows - first) + weight->bits * MOST) {
#define CASE(N) \
  case N + 8 * MOST: run_tile(x, first, weight, tile, out, N, 8); break; \
  case N + 4 * MOST: run_tile(x, first, weight, tile, out, N, 4); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
      }
    }
  }
}

/* Chunk number `chunk` of the products of one x with several weights; 0 if there are no more. */
static int run_any_chunk(const Rows *x, const Weight *weights, float *const *outs, long count, long chunk) {
  for (long i = 0; i < count; i++) {
    if (chunk < chunks_of(weights + i)) {
      run_chunk(x, weights + i, chunk, outs[i]);
      return 1;
    }
    chunk -= chunks_of(weights + i);
  }
  return 0;
}

/* Each of outs (rows, outputs) = x (rows, inputs) times a weight. Returns 0, or 1 when memory ran out. */
int mars_multiply(const float *x, long rows, long inputs, const Weight *weights, float *const *outs, long count) {
  void *memory = malloc(taken_bytes(rows, inputs, weights->bits));
  if (!memory) return 1;
  Rows taken = take_rows(x, rows, inputs, weights->bits, memory);
  long chunks = 0;
  for (long i = 0; i < count; i++) chunks += chunks_of(weights + i);
#pragma omp parallel for schedule(dynamic)
  for (long chunk = 0; chunk < chunks; chunk++) run_any_chunk(&taken, weights, outs, count, chunk);
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
