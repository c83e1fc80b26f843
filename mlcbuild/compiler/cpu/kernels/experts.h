// Which expert multiplies which rows: a plan, made once for a product (experts.c) and read by its tasks (linear.c).
//
// Every token has chosen a few experts; a pair is one token and one of its choices, and there are `pairs` of them in the
// order of [tokens, choices]. A plan lists them expert by expert, in one piece of memory of
// 3 + 2 * experts + 2 * (pairs / PACK_TOKENS + experts) + 2 * pairs int32 (plan_size in cpu/experts.py).
#pragma once

#include "common.h"

#define PACK_TOKENS 24  // activation rows that one task packs: whole panels on every CPU; PACK_TOKENS in linear.py

typedef struct {
    i32 *active_count, *stretch_count;
    i32 *first;      // [experts + 1]: an expert's pairs are first[e] .. first[e + 1] - 1 of the lists
    i32 *active;     // experts that have pairs
    i32 *stretches;  // (expert, first of its rows) of each task that packs PACK_TOKENS rows at most
    i32 *to, *from;  // [pairs]: the row of y, which is the pair, and the row of x
} plan;

INLINE plan plan_in(i32 *memory, i64 experts, i64 pairs) {
    plan p;
    p.active_count = memory;
    p.stretch_count = memory + 1;
    p.first = memory + 2;
    p.active = p.first + experts + 1;
    p.stretches = p.active + experts;
    p.to = p.stretches + 2 * (pairs / PACK_TOKENS + experts);
    p.from = p.to + pairs;
    return p;
}
