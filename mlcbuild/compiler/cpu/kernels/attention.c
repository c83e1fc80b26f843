// Attention of a block of query rows over keys and values in pages, or in rows of the same call.
//
// One task is the rows of a block and one head of keys: all query heads that share it, so that a key is brought to
// float32 once for all of them. Scores of ROWS positions and their sums of values are products of panels (panels.h).
// The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), in powers of two: the state of a query is
// its largest score m, the sum d of 2^(score - m), and the weighted sum of values. `lse` is m + log2(d), which is what
// the KV cache's merge step expects; a row that sees no key gives zeros and the lowest score.

#include "panels.h"

f32 log2f(f32);

#define MAX_HEAD_DIM 576
#define QUERIES 48  // of one task: QUERIES in attention.py
#define LOWEST (-5e4f)

DEFINE_WIDTH(rows_wide, WIDTH, 1, ROWS)
DEFINE_WIDTH(rows_4, 4, 1, ROWS)
DEFINE_WIDTH(rows_2, 2, 1, ROWS)
DEFINE_WIDTH(rows_1, 1, 1, ROWS)

typedef struct {
    __attribute__((aligned(64))) f32 query[QUERIES * MAX_HEAD_DIM];  // panels
    f32 value[QUERIES * (MAX_HEAD_DIM + ROWS)];                      // [dim / ROWS][count][ROWS]
    f32 total[QUERIES * LANES];                                      // of each lane
    f32 score[QUERIES * ROWS];
    f32 keys[MAX_HEAD_DIM * ROWS];                                   // [dim][position]
    f32 values[ROWS * ROWS];                                         // [position][dim]
    f32 largest[QUERIES];
    f32 slope[QUERIES];                                              // of linear biases, in powers of two
    i64 first[QUERIES], end[QUERIES], own[QUERIES];                  // positions that a query sees, and its own
    i64 dim, count;
    i64 half;    // numbers of a row of keys, or of values, in its first part; the rest are in the other one
    i64 summed;  // of a value
    f32 cap;     // scores are capped to it, in powers of two; 0: they are not
    i32 biased;  // whether scores have linear biases
    const f32 *table;  // of biases by a key's position less the query's own; or null
    i64 at[ROWS];      // the positions of keys, where there is a table
} state;

INLINE void begin(state *s, i64 dim, f32 cap) {
    s->dim = s->half = s->summed = dim;
    s->count = 0;
    s->cap = cap * LOG2E;
    s->biased = 0;
    s->table = 0;
}

INLINE f32v tanh_v(f32v x) {
    f32v e = exp2_v(x * splat(2 * LOG2E)), square = x * x;  // small values would lose digits in the quotient
    f32v small = x * (splat(1.0f) + square * (splat(-1.0f / 3) + square * (splat(2.0f / 15) - square * splat(17.0f / 315))));
    return select_v(square < splat(0.01f), small, (e - splat(1.0f)) / (e + splat(1.0f)));
}

// The next query; all of them before the first key.
INLINE void add_query(state *s, i64 first, i64 end) {
    s->first[s->count] = first;
    s->end[s->count] = end;
    s->largest[s->count] = LOWEST;
    s->count++;
}

// Linear biases (ALiBi; Press et al., arXiv 2108.12409): scores fall with distance from `own`. The slope of head h, from
// 1, is 2 ** (-alibi * h / heads). Where heads are no power of two, the first of them, so many as the next lower power p
// has, have those of p heads, and the others every second of 2 p heads (transformers, modeling_bloom.py).
INLINE void set_bias(state *s, i64 at, i64 own, i64 head, i64 heads, f32 alibi) {
    i64 power = 1;
    while (2 * power <= heads) power *= 2;
    f32 exponent = head < power ? (f32)(head + 1) / (f32)power : (f32)(2 * (head - power) + 1) / (f32)(2 * power);
    s->slope[at] = exp2_v(splat(-alibi * exponent))[0] * LOG2E;
    s->own[at] = own;
    s->biased = 1;
}

INLINE void set_query(state *s, i64 at, const model *query, f32 scale) {
    i64 panel = 0;
    while (at >= panel + panel_width(s->count - panel)) panel += panel_width(s->count - panel);
    i64 width = panel_width(s->count - panel);
    f32 *out = s->query + panel * s->dim + (at - panel);
    for (i64 d = 0; d < s->dim; d++) out[d * width] = get_model(query + d) * (scale * LOG2E);
}

INLINE void clear(state *s) {
    i64 blocks = (s->summed + ROWS - 1) / ROWS;
    for (i64 i = 0; i < blocks * s->count * ROWS; i += LANES) store_float32(s->value + i, splat(0.0f));
    for (i64 i = 0; i < s->count * LANES; i += LANES) store_float32(s->total + i, splat(0.0f));
}

// Keys of `held` <= ROWS positions as columns; what is behind the first half is in `rest`.
INLINE void load_keys(state *s, const model *const *key, const model *const *rest, i64 held) {
    for (int v = 0; v < VECTORS; v++)
        for (i64 d = 0; d < s->dim; d += LANES) {
            u32v block[LANES];
            i64 left = min_i64(LANES, s->dim - d);
            for (int p = 0; p < LANES; p++) {
                f32v values = splat(0.0f);
                if (v * LANES + p < held) {
                    const model *at = d < s->half ? key[v * LANES + p] + d : rest[v * LANES + p] + d - s->half;
                    if (__builtin_expect(left == LANES, 1)) values = load_model(at);
                    else
                        for (i64 i = 0; i < left; i++) values[i] = get_model(at + i);
                }
                block[p] = *(u32v *)&values;
            }
            transpose(block);
            for (i64 i = 0; i < left; i++) *(u32v *)(s->keys + (d + i) * ROWS + v * LANES) = block[i];
        }
}

// Dimensions from d on of the values of `held` positions, likewise.
INLINE void load_values(state *s, const model *const *value, const model *const *rest, i64 held, i64 d) {
    for (i64 p = 0; p < held; p++)
        for (int v = 0; v < VECTORS; v++) {
            i64 at = d + v * LANES;
            f32v values = splat(0.0f);
            const model *from = at < s->half ? value[p] + at : rest[p] + at - s->half;
            if (at + LANES <= s->dim) values = load_model(from);
            else
                for (i64 i = 0; at + i < s->dim; i++) values[i] = get_model(from + i);
            store_float32(s->values + p * ROWS + v * LANES, values);
        }
}

// The `held` <= ROWS positions from `position` on.
NOINLINE void add_keys(state *s, const model *const *key, const model *const *value, i64 position, i64 held) {
    i64 count = s->count;
    i32v lane;
    for (int i = 0; i < LANES; i++) lane[i] = i;
    const i32 joined = s->half < s->dim;  // a row is the key, whose first numbers are the value
    load_keys(s, key, joined ? value : key, held);
    for (i64 i = 0; i < count * ROWS; i += LANES) store_float32(s->score + i, splat(0.0f));
    multiply_panels(s->query, s->dim, 0, s->keys, s->dim, s->score, count);
    i64 blocks = (s->summed + ROWS - 1) / ROWS;
    for (i64 q = 0; q < count; q++) {
        f32 *row = s->score + q * ROWS;
        i32 from = (i32)(s->first[q] - position), to = (i32)(min_i64(s->end[q] - position, held));
        f32v score[VECTORS], largest_v = splat(s->largest[q]);
        for (int v = 0; v < VECTORS; v++) {
            i32v at = lane + v * LANES;
            score[v] = load_float32(row + v * LANES);
            if (s->cap != 0.0f) score[v] = splat(s->cap) * tanh_v(score[v] / splat(s->cap));
            if (s->biased) {
                f32v distance = __builtin_convertvector(at, f32v) + splat((f32)(position - s->own[q]));
                score[v] += splat(s->slope[q]) * distance;
            }
            if (s->table)
                for (int i = 0; i < LANES; i++)
                    if (v * LANES + i < held) score[v][i] += s->table[s->at[v * LANES + i] - s->own[q]] * LOG2E;
            score[v] = select_v((at >= from) & (at < to), score[v], splat(2 * LOWEST));
            largest_v = select_v(score[v] > largest_v, score[v], largest_v);
        }
        f32 largest = s->largest[q];
        for (int i = 0; i < LANES; i++) largest = max_f32(largest_v[i], largest);
        f32v total = load_float32(s->total + q * LANES);
        if (largest > s->largest[q]) {
            f32v keep = exp2_v(splat(s->largest[q] - largest));
            total *= keep;
            for (i64 b = 0; b < blocks; b++)
                for (int v = 0; v < VECTORS; v++) {
                    f32 *at = s->value + (b * count + q) * ROWS + v * LANES;
                    store_float32(at, load_float32(at) * keep);
                }
            s->largest[q] = largest;
        }
        for (int v = 0; v < VECTORS; v++) {
            f32v weight = exp2_v(score[v] - splat(largest));
            store_float32(row + v * LANES, weight);
            total += weight;
        }
        store_float32(s->total + q * LANES, total);
    }
    for (i64 b = 0; b < blocks; b++) {
        load_values(s, joined ? key : value, value, held, b * ROWS);
        for (i64 q = 0; q < count;) {
            i64 width = panel_width(count - q);
            f32 *c = s->value + (b * count + q) * ROWS;
            if (width == WIDTH) rows_wide(s->score + q * ROWS, s->values, held, c);
            else if (width == 4) rows_4(s->score + q * ROWS, s->values, held, c);
            else if (width == 2) rows_2(s->score + q * ROWS, s->values, held, c);
            else rows_1(s->score + q * ROWS, s->values, held, c);
            q += width;
        }
    }
}

INLINE void write_query(const state *s, i64 q, model *out, f32 *lse) {
    f32 total = sum(load_float32(s->total + q * LANES));
    f32 inverse = total == 0.0f ? 0.0f : 1.0f / total;
    for (i64 d = 0; d < s->summed; d++)
        put_model(out + d, s->value[((d / ROWS) * s->count + q) * ROWS + d % ROWS] * inverse);
    for (i64 d = s->summed; d < s->dim; d++) put_model(out + d, 0.0f);
    *lse = total == 0.0f ? LOWEST : s->largest[q] + log2f(total);
}

// The last number of a query is its sink, a logit that takes a share and gives nothing. It counts once: among those of a
// row's sets of keys that holds the row's own.
INLINE void set_sink(state *s, i64 at, const model *query) {
    f32 sink = get_model(query + s->dim - 1) * LOG2E;
    s->largest[at] = max_f32(sink, LOWEST);
    s->total[at * LANES] = exp2_v(splat(sink - s->largest[at]))[0];
}

INLINE i64 lowest_first(const state *s) {
    i64 first = s->first[0];
    for (i64 q = 1; q < s->count; q++) first = min_i64(first, s->first[q]);
    return first;
}

INLINE i64 highest_end(const state *s) {
    i64 end = 0;
    for (i64 q = 0; q < s->count; q++) end = s->end[q] > end ? s->end[q] : end;
    return end;
}

// What all tasks of a call have in common. A layer whose scale is negative slides: its rows see `window` positions, the
// last one their own; or, where it is below 0, those of their chunk of -window positions. The scale itself is positive.
// `window` 0: no layer does. `sinks`: set_sink. `joined`: 0, or how many numbers of a row of latents are its value: a row
// of 2 * dim numbers is a head's query, and all heads' key, of which keys and values [.., 1, dim] have a half each. There
// are kv_heads tasks to a block of rows then, of some heads each, and a logarithm of the sum for each half of a head.
// Rows of queries and results are `row` numbers apart, those of logarithms `logs`; `width` numbers of keys are multiplied.
typedef struct {
    const model *q;
    model *out;
    f32 *lse;
    i64 heads, kv_heads, dim, joined, window;
    i32 sinks;
    f32 cap, alibi, scale;
    i64 row, logs, width;
} call;

// Keys and values of one sequence: rows of one array, or slots of pages; those at places in `list`, where there is one.
typedef struct {
    const model *key, *value;  // of position 0, or of page 0
    const i32 *pages;          // null: rows
    i64 stride;                // from a row to the next, or from a page to the next
    i64 page, dim;
    const i32 *list;
} source;

INLINE i64 offset_of(const source *from, i64 position) {
    if (from->list) position = from->list[position];
    if (!from->pages) return position * from->stride;
    return (i64)from->pages[position / from->page] * from->stride + position % from->page * from->dim;
}

// Rows [row, end) over positions below `length`; row r is at position `at` + r - row, counted as the keys are, and sees
// no later ones. The first key is at position `start` of the sequence. With a list, `owns`: the row's own key is of it
// or could be.
INLINE void attend(state *s, const call *c, const source *from, i64 row, i64 end, i64 at, i64 start, i64 length,
                   i64 kv_head, i32 owns) {
    i64 shared = c->heads / c->kv_heads, head = c->joined ? 2 * c->dim : c->dim;
    i64 window = c->scale < 0.0f ? c->window : 0;
    const i32 in_key = c->joined && c->width <= c->dim;  // a row of latents, of which the rest is none of attention's
    for (i64 g = 0; g < shared; g += QUERIES) {
        i64 some = min_i64(QUERIES, shared - g), first_head = kv_head * shared + g;
        begin(s, c->width, c->cap);
        if (c->joined) s->half = min_i64(c->dim, c->width), s->summed = c->joined;
        for (i64 r = row; r < end; r++) {
            i64 own = at + r - row, first = window > 0 ? own - window + 1 : window < 0 ? own - (start + own) % -window : 0;
            if (first < 0) first = 0;
            for (i64 i = 0; i < some; i++) add_query(s, first, min_i64(length, own + 1));
        }
        for (i64 i = 0; i < s->count; i++)
            set_query(s, i, c->q + (row + i / some) * c->row + (first_head + i % some) * head,
                      c->scale < 0.0f ? -c->scale : c->scale);
        for (i64 i = 0; c->alibi != 0.0f && i < s->count; i++)
            set_bias(s, i, at + i / some, first_head + i % some, c->heads, c->alibi);
        clear(s);
        for (i64 i = 0; c->sinks && i < s->count; i++)
            if (from->list ? owns : at + i / some < length)
                set_sink(s, i, c->q + (row + i / some) * c->row + (first_head + i % some) * head);
        i64 seen = highest_end(s);
        for (i64 i = lowest_first(s); i < seen; i += ROWS) {
            const model *key[ROWS], *value[ROWS];
            i64 held = min_i64(ROWS, seen - i);
            for (i64 p = 0; p < held; p++) {
                i64 offset = offset_of(from, i + p);
                key[p] = from->key + offset;
                value[p] = (in_key ? from->key : from->value) + offset;
            }
            add_keys(s, key, value, i, held);
        }
        for (i64 i = 0; i < s->count; i++) {
            i64 to = first_head + i % some;
            f32 *lse = c->lse + (row + i / some) * c->logs + (c->joined ? 2 * to : to);
            write_query(s, i, c->out + (row + i / some) * c->row + to * head, lse);
            if (c->joined) lse[1] = lse[0];
        }
    }
}

// Rows `task / kv_heads * block` and on of q [rows, heads, dim], which belong to the sequences whose ranges in q_indptr
// hold them; keys and values [rows, kv_heads, dim] are the same call's new tokens.
EXPORT void mlcbuild_attention_ragged(const model *q, const i32 *q_indptr, const model *k, const model *v,
                                      const i32 *kv_indptr, const i32 *q_position, model *out, f32 *lse, i64 rows, i64 heads, i64 kv_heads,
                                      i64 dim, i64 joined, i64 block, i64 task, i64 window, i32 sinks, f32 cap, f32 alibi,
                                      f32 scale) {
    i64 width = joined ? 2 * dim : dim, logs = joined ? 2 * heads : heads;
    const call c = {q, out, lse, heads, kv_heads, dim, joined, window, sinks, cap, alibi, scale, heads * width, logs, width};
    i64 row = task / kv_heads * block, last = min_i64(row + block, rows), kv_head = task % kv_heads, b = 0;
    state s;
    while (row < last) {
        while (row >= q_indptr[b + 1]) b++;
        i64 kv_len = kv_indptr[b + 1] - kv_indptr[b], end = min_i64(last, q_indptr[b + 1]);
        i64 stride = joined ? dim : kv_heads * dim, first = kv_indptr[b] * stride + (joined ? 0 : kv_head * dim);
        const source from = {k + first, v + first, 0, stride, 0, dim, 0};
        i64 at = kv_len - (q_indptr[b + 1] - row);
        attend(&s, &c, &from, row, end, at, q_position[row] - at, kv_len, kv_head, 0);
        row = end;
    }
}

// The same over cached pages [pages, 2, kv_heads, page, dim]: those of sequence b are page_values[page_indptr[b]] and
// on, its positions there begin at k_start[b], and row r is at q_position[r]. q_indptr may be null: one row per sequence.
EXPORT void mlcbuild_attention_paged(const model *q, const i32 *q_indptr, const model *pages, const i32 *page_indptr,
                                     const i32 *page_values, const i32 *last_page_len, const i32 *k_start,
                                     const i32 *q_position, model *out, f32 *lse, i64 rows, i64 heads, i64 kv_heads,
                                     i64 dim, i64 joined, i64 page, i64 block, i64 task, i64 window, i32 sinks,
                                     f32 cap, f32 alibi, f32 scale) {
    i64 width = joined ? 2 * dim : dim, logs = joined ? 2 * heads : heads;
    const call c = {q, out, lse, heads, kv_heads, dim, joined, window, sinks, cap, alibi, scale, heads * width, logs, width};
    i64 row = task / kv_heads * block, last = min_i64(row + block, rows), kv_head = task % kv_heads, b = 0;
    i64 half = (joined ? 1 : kv_heads) * page * dim;
    state s;
    while (row < last) {
        if (q_indptr)
            while (row >= q_indptr[b + 1]) b++;
        else
            b = row;
        i64 end = q_indptr ? min_i64(last, q_indptr[b + 1]) : row + 1;
        i64 held = page_indptr[b + 1] - page_indptr[b], length = held ? (held - 1) * page + last_page_len[b] : 0;
        const model *first = pages + (joined ? 0 : kv_head * page * dim);
        const source from = {first, first + half, page_values + page_indptr[b], 2 * half, page, dim, 0};
        attend(&s, &c, &from, row, end, (i64)q_position[row] - k_start[b], k_start[b], length, kv_head, 0);
        row = end;
    }
}

// (out, lse) becomes the attention over both sets of keys, for one row and head.
EXPORT void mlcbuild_attention_merge(model *out, f32 *lse, const model *other, const f32 *other_lse, i64 dim, i64 task) {
    f32 a = lse[task], b = other_lse[task], largest = max_f32(a, b);
    a = exp2_v(splat(a - largest))[0];
    b = exp2_v(splat(b - largest))[0];
    out += task * dim;
    other += task * dim;
    for (i64 d = 0; d < dim; d++) put_model(out + d, (get_model(out + d) * a + get_model(other + d) * b) / (a + b));
    lse[task] = log2f(a + b) + largest;
}

// Attention within each sequence of a batch of encoders, both ways: qkv [sequences * tokens, 3, heads, dim], mask
// [sequences, tokens]. A token whose mask is 0 is seen by nobody. bias [heads, width], or null, is added to scores by
// distance: that of the own position in its middle. One task: one head of `block` rows of a sequence.
EXPORT void mlcbuild_attention_masked(const model *qkv, const i32 *mask, const f32 *bias, model *out, i64 width,
                                      i64 tokens, i64 heads, i64 dim, i64 block, i64 task, f32 scale) {
    i64 blocks = (tokens + block - 1) / block, head = task % heads, sequence = task / heads / blocks;
    i64 row = task / heads % blocks * block, stride = 3 * heads * dim;
    qkv += sequence * tokens * stride + head * dim;
    mask += sequence * tokens;
    state s;
    begin(&s, dim, 0.0f);
    for (i64 r = row; r < min_i64(row + block, tokens); r++) add_query(&s, 0, tokens);
    for (i64 i = 0; i < s.count; i++) set_query(&s, i, qkv + (row + i) * stride, scale);
    for (i64 i = 0; i < s.count; i++) s.own[i] = row + i;
    if (bias) s.table = bias + head * width + width / 2;
    clear(&s);
    for (i64 i = 0; i < tokens;) {
        const model *key[ROWS], *value[ROWS];
        i64 held = 0;
        for (; held < ROWS && i < tokens; i++)
            if (mask[i]) {
                s.at[held] = i;
                key[held] = qkv + i * stride + heads * dim;
                value[held++] = qkv + i * stride + 2 * heads * dim;
            }
        if (held) add_keys(&s, key, value, 0, held);
    }
    f32 lse;
    for (i64 i = 0; i < s.count; i++)
        write_query(&s, i, out + ((sequence * tokens + row + i) * heads + head) * dim, &lse);
}
