// Vectors at the end of a row, which fill no register: what is beyond is 0 and is not written.
#pragma once

#include "common.h"

// The first `count` values, LANES at most.
INLINE f32v take(const f32 *p, i64 count) {
    if (count >= LANES) return load_float32(p);
    f32v v = splat(0.0f);
    for (i64 lane = 0; lane < count; lane++) v[lane] = p[lane];
    return v;
}

INLINE void give(f32 *p, f32v v, i64 count) {
    if (count >= LANES) store_float32(p, v);
    else
        for (i64 lane = 0; lane < count; lane++) p[lane] = v[lane];
}
