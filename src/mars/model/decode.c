/* A few positions of each row through all layers of the visual expert, in one call: the kernel of mars.model.decoding.
 *
 * What PyTorch would do in some twenty operators a layer is done by one team of threads that meets six times a layer.
 * Cheap work on one position's width (norms, residuals, rounding) is done by every thread for itself, which costs less than
 * meeting. The mathematics are those of SemVIELayer.forward.
 */
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "quantized.c"

typedef struct {
  Weight q, k, v, o, gate, up, down;
  const float *q_bias, *k_bias, *v_bias;        /* null where there are none */
  const float *attention_norm, *ffn_norm;
  const float *q_norm, *k_norm, *v_norm;        /* (head width), null where there are none */
  float *keys, *values;                         /* (rows, key/value heads, size, head width) */
} Layer;

typedef struct {
  long rows, positions, block;                  /* new positions of a row; each sees its block whole, and what is before */
  long width, heads, kv_heads, head_width;
  long size, longest;                           /* columns of the cache, and at least those that any row uses */
  const int64_t *used;                          /* (rows) columns in use with the new ones, from the first */
  const float *rotary;                          /* (2, rows * positions, head width): cosines, sines */
  double eps;
} Step;

/* What the threads share. Products are (rows * positions, outputs). */
typedef struct {
  float *q, *k, *v, *mixed, *gate, *up, *out;
  Rows ffn;                                     /* of the second half: what `down` multiplies */
  int threads;
  atomic_int arrived, meeting;
  atomic_long *next;                            /* the next free piece of work, for each stretch between meetings */
} Team;

static void meet(Team *team) {
  int meeting = atomic_load(&team->meeting);
  if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
    atomic_store(&team->arrived, 0);
    atomic_fetch_add(&team->meeting, 1);
    return;
  }
  for (long spins = 0; atomic_load_explicit(&team->meeting, memory_order_acquire) == meeting; spins++) {
    if (spins < 20000) __builtin_ia32_pause();
    else sched_yield();                         /* somebody else needs this core */
  }
}

/* e^x to 2e-7 of its value: 2^n e^r, e^r by its series. */
static inline float exponential(float x) {
  const float round = 12582912;
  x = x < -87 ? -87 : x > 88 ? 88 : x;
  float shifted = x * 1.44269504f + round, n = shifted - round;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float series = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333338f + r * 0.0013888889f)))));
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return series * power;
}

/* out = weight * x / rms(x); x may be out. */
static inline void norm(const float *x, const float *weight, long width, double eps, float *out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (long i = 0; i < width; i++) squares += x[i] * x[i];
  float scale = 1 / sqrtf(squares / width + (float)eps);
#pragma omp simd
  for (long i = 0; i < width; i++) out[i] = weight[i] * (x[i] * scale);
}

/* A head's query, key or value of one position out of its projection: bias, norm, and its turn if it takes one. */
static inline void finish_head(const float *from, const float *bias, const float *weight, const Step *step, long position, long head,
                               int turn, float *out) {
  long width = step->head_width, half = width / 2;
  for (long i = 0; i < width; i++) out[i] = from[i] + (bias ? bias[head * width + i] : 0);
  if (weight) norm(out, weight, width, step->eps, out);
  if (!turn) return;
  const float *cosines = step->rotary + position * width, *sines = cosines + step->rows * step->positions * width;
  for (long i = 0; i < half; i++) {
    float left = out[i], right = out[i + half];
    out[i] = left * cosines[i] - right * sines[i];
    out[i + half] = right * cosines[i + half] + left * sines[i + half];
  }
}

static inline __attribute__((always_inline)) float dot(const float *x, const float *y, long width) {
  __m256 sums = _mm256_setzero_ps();
  long i = 0;
  for (; i + 8 <= width; i += 8) sums = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), sums);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  float sum = _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
  for (; i < width; i++) sum += x[i] * y[i];
  return sum;
}

/* Attention of one query over the first `end` columns; `shares` has room for as many. */
static inline __attribute__((always_inline)) void look(const float *query, const float *keys, const float *values, long end,
                                                       float *shares, float *out, long width) {
  float scale = 1 / sqrtf((float)width), largest = -INFINITY, sum = 0;
  for (long column = 0; column < end; column++) {
    shares[column] = dot(query, keys + column * width, width) * scale;
    largest = shares[column] > largest ? shares[column] : largest;
  }
#pragma omp simd reduction(+ : sum)
  for (long column = 0; column < end; column++) {
    shares[column] = exponential(shares[column] - largest);
    sum += shares[column];
  }
  long i = 0;
  for (; i + 64 <= width; i += 64) { /* eight registers */
    __m256 sums[8] = {0};
    for (long column = 0; column < end; column++) {
      __m256 share = _mm256_set1_ps(shares[column]);
      for (int j = 0; j < 8; j++) sums[j] = _mm256_fmadd_ps(share, _mm256_loadu_ps(values + column * width + i + 8 * j), sums[j]);
    }
    for (int j = 0; j < 8; j++) _mm256_storeu_ps(out + i + 8 * j, _mm256_div_ps(sums[j], _mm256_set1_ps(sum)));
  }
  for (; i < width; i++) {
    out[i] = 0;
    for (long column = 0; column < end; column++) out[i] += shares[column] * values[column * width + i];
    out[i] /= sum;
  }
}

/* Stores one row's keys and values of a key/value head, then attention of the heads that share it. */
static void attend(Team *team, const Layer *layer, const Step *step, long row, long kv, float *scratch) {
  long width = step->head_width, group = step->heads / step->kv_heads, start = step->used[row] - step->positions;
  float *keys = layer->keys + (row * step->kv_heads + kv) * step->size * width;
  float *values = layer->values + (row * step->kv_heads + kv) * step->size * width;
  float *query = scratch, *shares = query + width;
  for (long i = 0; i < step->positions; i++) {
    long position = row * step->positions + i, from = position * layer->k.outputs + kv * width;
    finish_head(team->k + from, layer->k_bias, layer->k_norm, step, position, kv, 1, keys + (start + i) * width);
    finish_head(team->v + from, layer->v_bias, layer->v_norm, step, position, kv, 0, values + (start + i) * width);
  }
  for (long i = 0; i < step->positions; i++) {
    long position = row * step->positions + i, end = start + (i / step->block + 1) * step->block;
    for (long head = kv * group; head < (kv + 1) * group; head++) {
      finish_head(team->q + position * layer->q.outputs + head * width, layer->q_bias, layer->q_norm, step, position, head, 1, query);
      float *out = team->mixed + (position * step->heads + head) * width;
      if (width == 64) look(query, keys, values, end, shares, out, 64);
      else if (width == 128) look(query, keys, values, end, shares, out, 128);
      else look(query, keys, values, end, shares, out, width);
    }
  }
}

static inline void gate_values(float *gate, const float *up, long count) {
#pragma omp simd
  for (long i = 0; i < count; i++) gate[i] = gate[i] / (1 + exponential(-gate[i])) * up[i];
}

/* SiLU(gate) * up, as `down` takes it: this thread's share of it, of rows or of blocks of 32. */
static void gate_up(Team *team, const Layer *layer, const Step *step, int thread) {
  long inputs = team->ffn.inputs, outputs = layer->gate.outputs, rows = step->rows * step->positions, bits = layer->down.bits;
  long blocks = bits == 16 ? 1 : inputs / BLOCK, count = bits == 16 ? inputs : BLOCK, all = rows * blocks;
  for (long i = all * thread / team->threads; i < all * (thread + 1) / team->threads; i++) {
    long row = i / blocks, block = i % blocks;
    float *gate = team->gate + row * outputs + block * count;
    gate_values(gate, team->up + row * outputs + block * count, count);
    if (bits == 16) take_row(gate, &team->ffn, row);
    else round_block(gate, &team->ffn, row, block);
  }
}

static void multiply(Team *team, const Rows *x, const Weight *weights, float *const *outs, long count, atomic_long *next) {
  while (run_any_chunk(x, weights, outs, count, atomic_fetch_add(next, 1))) continue;
  meet(team);
}

static void run_layer(Team *team, const Layer *layer, const Step *step, int thread, float *x, float *scratch, void *rounding,
                      atomic_long *next) {
  long rows = step->rows * step->positions, width = step->width, bits = layer->q.bits;
  for (long row = 0; row < rows; row++) norm(x + row * width, layer->attention_norm, width, step->eps, scratch + row * width);
  Rows taken = take_rows(scratch, rows, width, bits, rounding);
  multiply(team, &taken, &layer->q, (float *const[]){team->q, team->k, team->v}, 3, next);
  for (long i; (i = atomic_fetch_add(next + 1, 1)) < step->rows * step->kv_heads;)
    attend(team, layer, step, i / step->kv_heads, i % step->kv_heads, scratch);
  meet(team);
  taken = take_rows(team->mixed, rows, layer->o.inputs, bits, rounding);
  multiply(team, &taken, &layer->o, &team->out, 1, next + 2);
  for (long row = 0; row < rows; row++) {
    for (long i = 0; i < width; i++) x[row * width + i] += team->out[row * layer->o.outputs + i];
    norm(x + row * width, layer->ffn_norm, width, step->eps, scratch + row * width);
  }
  taken = take_rows(scratch, rows, width, bits, rounding);
  multiply(team, &taken, &layer->gate, (float *const[]){team->gate, team->up}, 2, next + 3);
  gate_up(team, layer, step, thread);
  meet(team);
  multiply(team, &team->ffn, &layer->down, &team->out, 1, next + 4);
  for (long row = 0; row < rows; row++)
    for (long i = 0; i < width; i++) x[row * width + i] += team->out[row * layer->down.outputs + i];
}

enum { STRETCHES = 5 }; /* of work that is shared out piece by piece, in a layer */

/* x (rows * positions, width) through `count` layers, in place; the caches get their columns. Returns 0, or 1 when memory
 * ran out. */
int mars_decode(float *x, const Layer *layers, long count, const Step *step) {
  long rows = step->rows * step->positions, width = step->width, heads = step->heads * step->head_width, ffn = layers->gate.outputs;
  long queries = layers->q.outputs, kv = layers->k.outputs;
  long shared = rows * (queries + 2 * kv + heads + 2 * ffn + layers->o.outputs) * sizeof(float);
  long attention = step->head_width + step->longest, scratch = rows * width > attention ? rows * width : attention;
  long own = (rows * width + scratch) * sizeof(float) + taken_bytes(rows, width > heads ? width : heads, layers->q.bits);
  own = (own + LINE - 1) / LINE * LINE;
  long taken = taken_bytes(rows, layers->down.inputs, layers->down.bits);
  taken = (taken + LINE - 1) / LINE * LINE;
  char *memory = malloc(shared + taken + own * omp_get_max_threads());
  atomic_long *next = calloc(count * STRETCHES, sizeof *next);
  if (memory && next) {
    Team team = {.q = (float *)memory};
    team.k = team.q + rows * queries, team.v = team.k + rows * kv, team.mixed = team.v + rows * kv;
    team.gate = team.mixed + rows * heads, team.up = team.gate + rows * ffn, team.out = team.up + rows * ffn;
    team.ffn = rows_in(memory + shared, rows, layers->down.inputs, layers->down.bits);
#pragma omp parallel
    {
#pragma omp single
      team.threads = omp_get_num_threads();
      int thread = omp_get_thread_num();
      float *mine = (float *)(memory + shared + taken + own * thread), *rest = mine + rows * width;
      memcpy(mine, x, rows * width * sizeof(float));
      for (long i = 0; i < count; i++)
        run_layer(&team, layers + i, step, thread, mine, rest, rest + scratch, next + i * STRETCHES);
#pragma omp barrier
      if (thread == 0) memcpy(x, mine, rows * width * sizeof(float));
    }
  }
  int failed = !memory || !next;
  free(memory), free(next);
  return failed;
}
