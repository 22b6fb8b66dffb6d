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
  uint16_t *keys, *values;                      /* (rows, key/value heads, size, head width) fp16 */
} Layer;

typedef struct {
  long first, rows;                             /* the first row in the cache, and how many */
  long positions, block;                        /* new positions of a row; each sees its block whole, and what is before */
  long width, heads, kv_heads, head_width;
  long size, longest;                           /* columns of the cache, and at least those that any row uses */
  const int64_t *used;                          /* (rows) columns in use with the new ones, from the first */
  const float *rotary;                          /* (2, rows * positions, head width): cosines, sines */
  const float *norm;                            /* of the last layer's states, with `last_eps` */
  double eps, last_eps;
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

#include "attention.c"

/* Stores one row's keys and values of a key/value head, then attention of the heads that share it. */
static void attend(Team *team, const Layer *layer, const Step *step, long row, long kv, float *scratch) {
  long width = step->head_width, group = step->heads / step->kv_heads, start = step->used[row] - step->positions;
  long place = ((step->first + row) * step->kv_heads + kv) * step->size * width;
  uint16_t *keys = layer->keys + place, *values = layer->values + place;
  for (long i = 0; i < step->positions; i++) {
    long position = row * step->positions + i, from = position * layer->k.outputs + kv * width;
    finish_head(team->k + from, layer->k_bias, layer->k_norm, step, position, kv, 1, scratch);
    to_half(scratch, width, keys + (start + i) * width);
    finish_head(team->v + from, layer->v_bias, layer->v_norm, step, position, kv, 0, scratch);
    to_half(scratch, width, values + (start + i) * width);
  }
  Look look = {.keys = keys, .values = values, .width = width, .queries = scratch, .shares = scratch + QUERIES * width};
  for (long first = 0, all = step->positions * group; first < all; first += look.count) {
    look.count = least(QUERIES, all - first);
    for (int i = 0; i < look.count; i++) {
      long position = row * step->positions + (first + i) / group, head = kv * group + (first + i) % group;
      finish_head(team->q + position * layer->q.outputs + head * width, layer->q_bias, layer->q_norm, step, position, head, 1,
                  look.queries + i * width);
      look.ends[i] = start + ((first + i) / group / step->block + 1) * step->block;
      look.outs[i] = team->mixed + (position * step->heads + head) * width;
    }
    run_look(&look);
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

/* x (rows * positions, width) through `count` layers and a norm, in place; the caches get their columns. Returns 0, or 1 when memory
 * ran out. */
int mars_decode(float *x, const Layer *layers, long count, const Step *step) {
  long rows = step->rows * step->positions, width = step->width, heads = step->heads * step->head_width, ffn = layers->gate.outputs;
  long queries = layers->q.outputs, kv = layers->k.outputs;
  long shared = rows * (queries + 2 * kv + heads + 2 * ffn + layers->o.outputs) * sizeof(float);
  long attention = look_floats(step->head_width, step->longest), scratch = rows * width > attention ? rows * width : attention;
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
      for (long row = 0; row < rows && thread == 0; row++) norm(mine + row * width, step->norm, width, step->last_eps, x + row * width);
    }
  }
  int failed = !memory || !next;
  free(memory), free(next);
  return failed;
}
