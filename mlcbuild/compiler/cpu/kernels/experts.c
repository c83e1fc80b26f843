// Mixtures of experts: which experts a token goes to, which rows each expert has, and what comes out together.

#include "experts.h"

// The `count` likeliest of softmax(logits) for one row (the first of equal ones), as chosen [., count], and how much each
// counts: its probability, over the sum of the chosen ones' where `normalised`, times `scale`.
EXPORT void mlcbuild_choose_experts(const f32 *logits, i32 *chosen, f32 *share, i64 row, i64 experts, i64 count,
                                    i32 normalised, f32 scale) {
    logits += row * experts;
    chosen += row * count;
    share += row * count;
    for (i64 i = 0; i < count; i++) {
        i64 best = -1;  // NaN is no reason to choose no expert at all: it shows in the shares
        for (i64 e = 0; e < experts; e++) {
            i32 taken = 0;
            for (i64 j = 0; j < i; j++) taken |= chosen[j] == e;
            if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
        }
        chosen[i] = (i32)best;
    }
    f32 top = logits[chosen[0]], total = 0.0f;
    for (i64 i = 0; i < count; i++) share[i] = exp_v(splat(logits[chosen[i]] - top))[0];
    if (normalised)
        for (i64 i = 0; i < count; i++) total += share[i];
    else
        for (i64 e = 0; e < experts; e++) total += exp_v(splat(logits[e] - top))[0];
    for (i64 i = 0; i < count; i++) share[i] *= scale / total;
}

// A plan for chosen [pairs], where x has one row for `per_row` pairs.
EXPORT void mlcbuild_plan_experts(const i32 *chosen, i32 *memory, i64 pairs, i64 experts, i64 per_row) {
    plan p = plan_in(memory, experts, pairs);
    for (i64 e = 0; e <= experts; e++) p.first[e] = 0;
    for (i64 i = 0; i < pairs; i++) p.first[chosen[i] + 1]++;
    i32 active = 0, stretches = 0;
    for (i64 e = 0; e < experts; e++) {
        i32 rows = p.first[e + 1];
        if (rows) p.active[active++] = (i32)e;
        for (i32 row = 0; row < rows; row += PACK_TOKENS, stretches++) {
            p.stretches[2 * stretches] = (i32)e;
            p.stretches[2 * stretches + 1] = row;
        }
        p.first[e + 1] += p.first[e];
    }
    *p.active_count = active;
    *p.stretch_count = stretches;
    // first[e] counts up to first[e + 1] while the lists are filled, which is then moved back by one place.
    for (i64 i = 0; i < pairs; i++) {
        i32 at = p.first[chosen[i]]++;
        p.to[at] = (i32)i;
        p.from[at] = (i32)(i / per_row);
    }
    for (i64 e = experts; e > 0; e--) p.first[e] = p.first[e - 1];
    p.first[0] = 0;
}

// y [., width] = the sum of `count` rows of x [., count, width], each times its share [., count].
EXPORT void mlcbuild_weighted_sum(const f32 *x, const f32 *share, f32 *y, i64 row, i64 count, i64 width) {
    x += row * count * width;
    share += row * count;
    y += row * width;
    i64 k = 0;
    for (; k + LANES <= width; k += LANES) {
        f32v total = load_float32(x + k) * splat(share[0]);
        for (i64 i = 1; i < count; i++) total += load_float32(x + i * width + k) * splat(share[i]);
        store_float32(y + k, total);
    }
    for (; k < width; k++) {
        f32 total = x[k] * share[0];
        for (i64 i = 1; i < count; i++) total += x[i * width + k] * share[i];
        y[k] = total;
    }
}
