// Vectors at the end of a row, which fill no register: what is beyond is 0 and is not written.
#pragma once

#include "common.h"

// The first `count` values, LANES at most.
INLINE f32v take(const f32 *p, i64 count) {
    u32v v = load_first((const u32 *)p, count);
    return *(f32v *)&v;
}

INLINE void give(f32 *p, f32v v, i64 count) {
    if (count >= LANES) store_float32(p, v);
    else
        for (i64 lane = 0; lane < count; lane++) p[lane] = v[lane];
}
