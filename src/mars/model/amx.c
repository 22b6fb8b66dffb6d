/* Weights of 16 bits on a processor that multiplies tiles of bytes (AMX): part of quantized.c.
 *
 * A weight is an integer of 16 bits with one scale for each output, kept as two bytes, 256 high + low; activations are
 * integers of 24 bits with one scale for each row, 65536 high + 256 middle + low, all bytes signed. Products of bytes are
 * summed exactly, those of one power of 256 together, low by low left out: nothing depends on the order, nor on how many
 * rows there are. Up to 16 rows cost what one costs, so that only memory is waited for.
 *
 *   codes  [tile][block][high, low][16 quarters x 16 rows x 4 inputs]   a block is 64 inputs; the last is filled with zeros
 *   scales [tile][16 rows] fp32
 */
#include <sys/syscall.h>
#include <unistd.h>

enum { DEPTH = 64, PART = TILE * DEPTH, X_PARTS = 3, FAR_AHEAD = 4 * AHEAD };
enum { LARGEST_WEIGHT = 127 * 256, LARGEST_X = 127 * 65536 }; /* whose bytes do not overflow when they are rounded */

#ifndef TILE_DATA
#define TILE_DATA 18 /* of the state of a processor */
#endif

/* Asks the system for the registers, once for a process: 1 if it has given them. */
int mars_may_run(void) { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, TILE_DATA) == 0; }

static inline long depths(long inputs) { return (inputs + DEPTH - 1) / DEPTH; }

static size_t whole_bytes(long rows, long inputs) {
  return LINE + rows * (X_PARTS * depths(inputs) * DEPTH + sizeof(float));
}

static Rows whole_rows_in(void *memory, long rows, long inputs) {
  int8_t *codes = (int8_t *)(((uintptr_t)memory + LINE - 1) / LINE * LINE);
  float *scales = (float *)(codes + rows * X_PARTS * depths(inputs) * DEPTH);
  return (Rows){.codes = codes, .scales = scales, .rows = rows, .inputs = inputs};
}

long mars_packed_bytes(long outputs, long inputs) { return (outputs + TILE - 1) / TILE * depths(inputs) * 2 * PART; }

/* Takes a row, as codes (groups of 16 rows, blocks, parts, rows of the group, 64). */
static void take_row(const float *from, const Rows *to, long row) {
  long inputs = to->inputs, group = row / TILE * TILE, rows = least(TILE, to->rows - group);
  float largest = 0, odd = 0;
#pragma omp simd reduction(max : largest) reduction(+ : odd)
  for (long i = 0; i < inputs; i++) {
    largest = fabsf(from[i]) > largest ? fabsf(from[i]) : largest;
    odd += from[i] * 0; /* not a number if one is not, or is infinite */
  }
  to->scales[row] = largest / LARGEST_X + odd;
  __m512 inverse = _mm512_set1_ps(largest > 1e-30f ? LARGEST_X / largest : 0);
  int8_t *codes = to->codes + X_PARTS * DEPTH * (group * depths(inputs)) + (row - group) * DEPTH;
  for (long first = 0; first < inputs; first += DEPTH, codes += X_PARTS * DEPTH * rows) {
    for (long i = 0; i < DEPTH; i += TILE) {
      long left = inputs - first - i;
      __mmask16 there = left >= TILE ? 0xFFFF : left > 0 ? (1 << left) - 1 : 0;
      __m512i low = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, from + first + i), inverse));
      __m512i middle = _mm512_srai_epi32(_mm512_add_epi32(low, _mm512_set1_epi32(128)), 8);
      __m512i high = _mm512_srai_epi32(_mm512_add_epi32(middle, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128((__m128i *)(codes + i), _mm512_cvtepi32_epi8(high)); /* the lowest byte of each */
      _mm_storeu_si128((__m128i *)(codes + DEPTH * rows + i), _mm512_cvtepi32_epi8(middle));
      _mm_storeu_si128((__m128i *)(codes + 2 * DEPTH * rows + i), _mm512_cvtepi32_epi8(low));
    }
  }
}

/* Shapes of the registers: 0 to 2 sums, 3 to 5 parts of x, 6 and 7 of the weight. */
static void shape_tiles(int rows) {
  struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {.palette = 1};
  for (int i = 0; i < 8; i++) shape.bytes[i] = LINE, shape.rows[i] = i < 6 ? rows : TILE;
  _tile_loadconfig(&shape);
}

/* One tile for the group of up to 16 rows from row `first` on. */
static void run_parts(const int8_t *codes, const float *scales, const Rows *x, long first, int rows, float *out, long out_stride) {
  long blocks = depths(x->inputs);
  const int8_t *from = x->codes + X_PARTS * DEPTH * first * blocks;
  int32_t sums[X_PARTS][TILE][TILE] __attribute__((aligned(64)));
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  for (long block = 0; block < blocks; block++, codes += 2 * PART, from += X_PARTS * DEPTH * rows) {
    for (long line = 0; line < 2 * PART; line += LINE) __builtin_prefetch(codes + FAR_AHEAD + line, 0, 2);
    _tile_loadd(6, codes, DEPTH);
    _tile_loadd(3, from, DEPTH);
    _tile_dpbssd(0, 3, 6);
    _tile_loadd(4, from + DEPTH * rows, DEPTH);
    _tile_dpbssd(1, 4, 6);
    _tile_loadd(5, from + 2 * DEPTH * rows, DEPTH);
    _tile_dpbssd(2, 5, 6);
    _tile_loadd(7, codes + PART, DEPTH);
    _tile_dpbssd(1, 3, 7);
    _tile_dpbssd(2, 4, 7);
  }
  _tile_stored(0, sums[0], LINE);
  _tile_stored(1, sums[1], LINE);
  _tile_stored(2, sums[2], LINE);
  __m512 byte = _mm512_set1_ps(256), scale = _mm512_mul_ps(_mm512_loadu_ps(scales), byte);
  for (int row = 0; row < rows; row++) {
    __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[0][row]));
    sum = _mm512_fmadd_ps(sum, byte, _mm512_cvtepi32_ps(_mm512_load_si512(sums[1][row])));
    sum = _mm512_fmadd_ps(sum, byte, _mm512_cvtepi32_ps(_mm512_load_si512(sums[2][row])));
    sum = _mm512_mul_ps(_mm512_mul_ps(sum, scale), _mm512_set1_ps(x->scales[first + row]));
    _mm512_storeu_ps(out + row * out_stride, sum);
  }
}

/* Tiles `tile` .. `end` of out (rows, outputs) = x times a weight of 16 bits. */
static void run_whole_tiles(const Rows *x, const Weight *weight, long tile, long end, float *out) {
  long bytes = mars_packed_bytes(TILE, weight->inputs), shaped = 0;
  for (; tile < end; tile++) {
    for (long first = 0; first < x->rows; first += TILE) {
      int rows = least(TILE, x->rows - first);
      if (rows != shaped) shape_tiles(shaped = rows);
      run_parts((const int8_t *)weight->codes + tile * bytes, (const float *)weight->scales + tile * TILE, x, first, rows,
                out + first * weight->outputs + tile * TILE, weight->outputs);
    }
  }
  _tile_release();
}

/* Rounds a weight (outputs, inputs) of fp32 to 16 bits; the last tile and the last block are filled up with zeros. */
void mars_pack(const float *weight, long outputs, long inputs, uint8_t *codes, float *scales) {
  long blocks = depths(inputs);
#pragma omp parallel for schedule(dynamic)
  for (long tile = 0; tile < (outputs + TILE - 1) / TILE; tile++) {
    for (long output = tile * TILE; output < (tile + 1) * TILE; output++) {
      long there = output < outputs ? inputs : 0;
      const float *from = weight + output * inputs;
      int8_t *to = (int8_t *)codes + tile * blocks * 2 * PART + output % TILE * 4;
      float largest = 0;
      for (long i = 0; i < there; i++) largest = fabsf(from[i]) > largest ? fabsf(from[i]) : largest;
      float inverse = largest > 1e-30f ? LARGEST_WEIGHT / largest : 0;
      scales[output] = largest / LARGEST_WEIGHT;
      for (long i = 0; i < blocks * DEPTH; i++) {
        int code = i < there ? (int)lrintf(from[i] * inverse) : 0, high = (code + 128) >> 8;
        int8_t *place = to + i / DEPTH * 2 * PART + i % DEPTH / 4 * LINE + i % 4;
        place[0] = (int8_t)high, place[PART] = (int8_t)(code - 256 * high);
      }
    }
  }
}
