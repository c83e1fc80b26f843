// Attention to the keys that an indexer chooses (mlcbuild.models.indexer has the heads of queries and keys, and lists).
//
// A call of scale 0 chooses: for each row and set of keys the best are found, and lists of several sets are merged. In a
// row's result, behind the list of positions, are the keys' scores as float32. The row's first logarithm says that it is
// such a row. Rows that see no more keys than are chosen have an empty list, which means all keys.

#include "attention.c"

#define MAX_KEYS 4096   // MOST_KEYS in indexer.py
#define CHOICE 1e38f    // a logarithm that no attention has

typedef unsigned long long u64;

// What an indexer's calls have in common: `keys` are chosen by `heads` heads of `width` numbers. A row's queries and
// results begin with `before` numbers of the model's heads. The index key of a position begins at number `at` of its key,
// and then its value, of head `key_head`; the attention's keys have `key_heads` heads, and `used` numbers of rows of
// latents are multiplied.
typedef struct {
    i64 keys, heads, width, before, at, key_head, used;
} indexer;

// Candidates: scores that are ordered as whole numbers are, and behind them positions, the first of equal ones largest.
INLINE u64 candidate(f32 score, i64 position) {
    u32 bits;
    score = score == 0.0f ? 0.0f : score;  // no -0
    __builtin_memcpy(&bits, &score, 4);
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (u64)bits << 32 | (u32)~(u32)position;
}

INLINE i64 position_of(u64 candidate) { return (i64)(u32) ~(u32)candidate; }

// The `keys` largest of `count` candidates first, in any order (Hoare's quickselect; the middle of three divides).
NOINLINE void best_first(u64 *of, i64 count, i64 keys) {
    for (i64 low = 0, high = count - 1; low < high;) {
        u64 a = of[low], b = of[low + (high - low) / 2], c = of[high];
        u64 middle = a > b ? (b > c ? b : a > c ? c : a) : (a > c ? a : b > c ? c : b);
        i64 i = low, j = high;
        while (i <= j) {
            while (of[i] > middle) i++;
            while (of[j] < middle) j--;
            if (i <= j) {
                u64 other = of[i];
                of[i++] = of[j];
                of[j--] = other;
            }
        }
        if (keys <= j) high = j;
        else if (keys >= i + 1) low = i;
        else return;
    }
}

INLINE i64 listed(const model *list, i64 i) {
    return (i64)get_model(list + 3 * i) + 256 * (i64)get_model(list + 3 * i + 1) + 65536 * (i64)get_model(list + 3 * i + 2) - 1;
}

INLINE void put_listed(model *list, i64 i, i64 position) {
    for (int digit = 0; digit < 3; digit++) put_model(list + 3 * i + digit, (f32)((position + 1) >> 8 * digit & 255));
}

// A score, which begins anywhere.
INLINE u8 *score_of(model *list, const indexer *x, i64 i) { return (u8 *)(list + 3 * x->keys) + 4 * i; }

INLINE void write_list(model *list, const indexer *x, const u64 *of, i64 count) {
    for (i64 i = 0; i < count; i++) {
        u32 bits = (u32)(of[i] >> 32);
        bits = bits >> 31 ? bits & 0x7FFFFFFFu : ~bits;
        put_listed(list, i, position_of(of[i]));
        __builtin_memcpy(score_of(list, x, i), &bits, 4);
    }
    if (count < x->keys) put_listed(list, count, -1);
}

INLINE i64 read_list(model *list, const indexer *x, u64 *of) {
    i64 count = 0;
    for (; count < x->keys; count++) {
        f32 score;
        i64 position = listed(list, count);
        if (position < 0) break;
        __builtin_memcpy(&score, score_of(list, x, count), 4);
        of[count] = candidate(score, position);
    }
    return count;
}

// The best of `length` positions, from `start` of the sequence on, for a row at position `own`.
NOINLINE void choose(state *s, const call *c, const indexer *x, const source *from, i64 row, i64 own, i64 start, i64 length) {
    model *list = c->out + row * c->row + x->before;
    const model *query = c->q + row * c->row + x->before, *weights = query + x->heads * x->width;
    u64 best[2 * MAX_KEYS];
    model copied[ROWS][MAX_HEAD_DIM];
    i64 count = 0;
    c->lse[row * c->logs] = CHOICE;
    if (own < x->keys) {
        put_listed(list, 0, -1);
        return;
    }
    begin(s, x->width, 0.0f);
    i64 first = min_i64(x->width, from->dim - x->at > 0 ? from->dim - x->at : 0);  // numbers that are in the key
    i64 value_at = x->at > from->dim ? x->at - from->dim : 0;
    i32 apart = first > 0 && first < x->width;
    i64 seen = min_i64(length, own - start + 1);
    u64 least = 0;
    for (i64 i = 0; i < seen; i += ROWS) {
        const model *key[ROWS];
        i64 held = min_i64(ROWS, seen - i);
        for (i64 p = 0; p < held; p++) {
            i64 offset = offset_of(from, i + p);
            const model *a = from->key + offset + x->at, *b = from->value + offset + value_at;
            key[p] = first ? a : b;
            if (apart) {
                for (i64 d = 0; d < x->width; d++) copied[p][d] = d < first ? a[d] : b[d - first];
                key[p] = copied[p];
            }
        }
        load_keys(s, key, key, held);
        f32 total[ROWS] = {};
        for (i64 h = 0; h < x->heads; h += QUERIES) {
            s->count = min_i64(QUERIES, x->heads - h);
            if (i == 0 || x->heads > QUERIES)
                for (i64 q = 0; q < s->count; q++) set_query(s, q, query + (h + q) * x->width, 1.0f);
            for (i64 q = 0; q < s->count * ROWS; q += LANES) store_float32(s->score + q, splat(0.0f));
            multiply_panels(s->query, s->dim, 0, s->keys, s->dim, s->score, s->count);
            for (i64 q = 0; q < s->count; q++) {
                f32 weight = get_model(weights + h + q);
                for (i64 p = 0; p < ROWS; p++) total[p] += weight * max_f32(s->score[q * ROWS + p], 0.0f);
            }
        }
        for (i64 p = 0; p < held; p++) {
            u64 one = candidate(total[p], start + i + p);
            if (one <= least) continue;
            best[count++] = one;
            if (count < 2 * x->keys) continue;
            best_first(best, count, x->keys);
            count = x->keys;
            least = best[0];
            for (i64 k = 1; k < count; k++) least = best[k] < least ? best[k] : least;
        }
    }
    if (count > x->keys) {
        best_first(best, count, x->keys);
        count = x->keys;
    }
    write_list(list, x, best, count);
}

// Rows [row, end) of a sequence over one set of keys, of which the first is at position `start`, as `attend` does: all
// keys, or those that a row's list has. Rows of several sequences may be over a beginning that they share.
INLINE void attend_to(state *s, const call *c, const indexer *x, source *from, const i32 *q_position, i64 row, i64 end,
                      i64 start, i64 length, i64 kv_head) {
    i32 places[MAX_KEYS];
    while (row < end) {
        model *list = (model *)c->q + row * c->row + x->before;
        i64 at = q_position[row] - start, next = row + 1, count = 0;
        if (listed(list, 0) < 0) {
            while (next < end && q_position[next] == q_position[next - 1] + 1 &&
                   listed(list + (next - row) * c->row, 0) < 0) next++;
            attend(s, c, from, row, next, at, start, length, kv_head, at < length);
            row = next;
            continue;
        }
        for (i64 i = 0; i < x->keys; i++) {
            i64 position = listed(list, i);
            if (position < 0) break;
            if (position >= start && position < start + length) places[count++] = (i32)(position - start);
        }
        from->list = places;
        attend(s, c, from, row, next, count - 1, 0, count, kv_head, at < length);
        from->list = 0;
        row = next;
    }
}

INLINE void over(state *s, const call *c, const indexer *x, const model *key, const model *value, const i32 *pages,
                 i64 stride, i64 heads_apart, i64 page, const i32 *q_position, i64 row, i64 end, i64 start, i64 length,
                 i64 task) {
    i64 kv_head = task % c->kv_heads, mine = c->joined ? 0 : kv_head;
    source from = {key + mine * heads_apart, value + mine * heads_apart, pages, stride, page, c->dim, 0};
    if (c->scale != 0.0f) {
        attend_to(s, c, x, &from, q_position, row, end, start, length, kv_head);
        return;
    }
    from.key = key + x->key_head * heads_apart;
    from.value = value + x->key_head * heads_apart;
    for (; row < end; row++)
        if (row % c->kv_heads == kv_head) choose(s, c, x, &from, row, q_position[row], start, length);
}

#define INDEXED                                                                                                       \
    const indexer x = {keys, index_heads, index_width, before, at, key_head, used};                                   \
    const call c = {q, out, lse, heads, kv_heads, dim, joined, window, sinks, cap, alibi, scale, before + more,        \
                    (before + more) / dim, joined ? used : dim};                                                      \
    i64 row = task / kv_heads * block, last = min_i64(row + block, rows), b = 0;                                      \
    state s

// As mlcbuild_attention_ragged and _paged; `stored` heads of keys are in the cache, kv_heads the tasks' share of them.
EXPORT void mlcbuild_choice_ragged(const model *q, const i32 *q_indptr, const model *k, const model *v,
                                   const i32 *kv_indptr, const i32 *q_position, model *out, f32 *lse, i64 rows,
                                   i64 heads, i64 kv_heads, i64 dim, i64 joined, i64 keys, i64 index_heads,
                                   i64 index_width, i64 before, i64 more, i64 at, i64 key_head, i64 used, i64 stored,
                                   i64 block, i64 task, i64 window, i32 sinks, f32 cap, f32 alibi, f32 scale) {
    INDEXED;
    while (row < last) {
        while (row >= q_indptr[b + 1]) b++;
        i64 kv_len = kv_indptr[b + 1] - kv_indptr[b], end = min_i64(last, q_indptr[b + 1]);
        i64 first = kv_indptr[b] * stored * dim, at_row = kv_len - (q_indptr[b + 1] - row);
        over(&s, &c, &x, k + first, v + first, 0, stored * dim, dim, 0, q_position, row, end, q_position[row] - at_row,
             kv_len, task);
        row = end;
    }
}

EXPORT void mlcbuild_choice_paged(const model *q, const i32 *q_indptr, const model *pages, const i32 *page_indptr,
                                  const i32 *page_values, const i32 *last_page_len, const i32 *k_start,
                                  const i32 *q_position, model *out, f32 *lse, i64 rows, i64 heads, i64 kv_heads,
                                  i64 dim, i64 joined, i64 keys, i64 index_heads, i64 index_width, i64 before,
                                  i64 more, i64 at, i64 key_head, i64 used, i64 stored, i64 page, i64 block, i64 task,
                                  i64 window, i32 sinks, f32 cap, f32 alibi, f32 scale) {
    INDEXED;
    i64 half = stored * page * dim;
    while (row < last) {
        if (q_indptr)
            while (row >= q_indptr[b + 1]) b++;
        else
            b = row;
        i64 end = q_indptr ? min_i64(last, q_indptr[b + 1]) : row + 1;
        i64 held = page_indptr[b + 1] - page_indptr[b], length = held ? (held - 1) * page + last_page_len[b] : 0;
        over(&s, &c, &x, pages, pages + half, page_values + page_indptr[b], 2 * half, page * dim, page, q_position, row,
             end, k_start[b], length, task);
        row = end;
    }
}

// As mlcbuild_attention_merge, for all of a row's heads; or two lists become one.
EXPORT void mlcbuild_choice_merge(model *out, f32 *lse, const model *other, const f32 *other_lse, i64 heads, i64 dim,
                                  i64 keys, i64 before, i64 logs, i64 row) {
    const indexer x = {keys, 0, 0, before, 0, 0, 0};
    if (lse[row * heads] == CHOICE) {
        u64 best[2 * MAX_KEYS];
        model *list = out + row * heads * dim + before;
        i64 count = read_list(list, &x, best);
        count += read_list((model *)other + row * heads * dim + before, &x, best + count);
        if (count > keys) {
            best_first(best, count, keys);
            count = keys;
        }
        write_list(list, &x, best, count);
        return;
    }
    for (i64 head = 0; head < logs; head++) mlcbuild_attention_merge(out, lse, other, other_lse, dim, row * heads + head);
}
