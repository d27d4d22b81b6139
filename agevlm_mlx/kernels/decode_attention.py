"""Attention of one query per text row over the image tokens, with its map, in one pass."""

import mlx.core as mx

from . import chooser
from .metal import metal_kernel


def decode_attention(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """What each text row reads from the image, and where it looks.

    q: [B N H], one query per row. keys, values: [B K S H], the null slot included; N is a
        multiple of K. mask: bool [B S], True = may attend; None means all.
    Returns the output [B N H] in q's dtype and the attention map fp32 [B S], the mean over the
    heads, which sums to 1. A row of the mask without any True gives NaN.
    For generation: only the twin has a gradient.
    """
    if chooser.wanted() and chooser.eligible(q, keys) and values.dtype == q.dtype:
        return kernel(q, keys, values, scale, mask)
    return twin(q, keys, values, scale, mask)


def twin(
    q: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """`decode_attention` in plain MLX: the specification of the kernel.

    The queries of a group are the rows of one matrix product with their keys, so that keys and
    values are read once and not repeated.
    """
    B, N, H = q.shape
    K = keys.shape[1]
    grouped = (q.astype(mx.float32) * scale).reshape(B, K, N // K, H)
    scores = grouped @ keys.astype(mx.float32).swapaxes(-1, -2)  # B K N/K S
    if mask is not None:
        scores = mx.where(mask[:, None, None], scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1)
    out = weights @ values.astype(mx.float32)
    return out.reshape(B, N, H).astype(q.dtype), weights.mean(axis=(1, 2))


# One threadgroup reads the keys and values of one key head once, for TILE query heads of its
# group. Each of its SIMDS simdgroups walks over chunks of STEP slots with an online softmax; the
# loads of a chunk are independent of each other, which hides their latency.
#
# The map needs every raw score again once the maximum and the sum of the row are known. The
# scores wait in device memory, not in threadgroup memory: S has no limit there (8 heads x 1089
# slots x 4 bytes would not fit into 32 KB), the kernel need not be compiled for each S, and
# threadgroup memory stays small, so that more threadgroups share a core. It costs 8 bytes a head
# and slot, written and read by the same threadgroup while they are in the cache; keys and values
# are 4 H bytes a slot in 16 bits.
#
# Each part of the map belongs to one threadgroup and `kernel` adds the parts up: no atomics, so
# the same input gives the same bits.
SOURCE = """
    constexpr int E = H / 32;  // elements of a head in each lane
    constexpr float LOWEST = -3.4e38f;  // finite: exp(-INFINITY - LOWEST) is 0, not NaN
    const int lane = thread_index_in_simdgroup;
    const int walker = simdgroup_index_in_threadgroup;
    const int me = thread_index_in_threadgroup;
    const int N = q_shape[1], K = keys_shape[1], S = keys_shape[2];
    const int group = N / K;
    const int tiles = (group + TILE - 1) / TILE;
    const int part = threadgroup_position_in_grid.x;  // of B * K * tiles
    const int row = part / tiles;                     // of B * K
    const int first = (part % tiles) * TILE;          // head of the group
    const int heads = metal::min(TILE, group - first);
    const int64_t query = (int64_t(row) * group + first) * H;
    const int64_t base = int64_t(row) * S * H + lane * E;
    const int64_t seen = int64_t(row / K) * S;
    const int64_t score = int64_t(part) * TILE * S;

    float x[TILE][E], sum[TILE][E], top[TILE], total[TILE];
    #pragma clang loop unroll(full)
    for (int h = 0; h < TILE; h++) {
        top[h] = LOWEST;
        total[h] = 0.0f;
        for (int e = 0; e < E; e++) {
            x[h][e] = h < heads ? float(q[query + h * H + lane * E + e]) * scale : 0.0f;
            sum[h][e] = 0.0f;
        }
    }
    for (int start = walker * STEP; start < S; start += SIMDS * STEP) {
        float k[STEP][E], v[STEP][E];
        bool open[STEP];
        for (int j = 0; j < STEP; j++) {
            const int s = metal::min(start + j, S - 1);  // beyond the end: read, but not open
            open[j] = start + j < S && (!MASKED || mask[seen + s]);
            for (int e = 0; e < E; e++) {
                k[j][e] = float(keys[base + s * H + e]);
                v[j][e] = float(values[base + s * H + e]);
            }
        }
        #pragma clang loop unroll(full)
        for (int h = 0; h < TILE; h++) {
            float dot[STEP];
            float highest = top[h];
            float mine = 0.0f;
            for (int j = 0; j < STEP; j++) {
                dot[j] = 0.0f;
                for (int e = 0; e < E; e++) {
                    dot[j] += x[h][e] * k[j][e];
                }
                dot[j] = simd_sum(dot[j]);
                dot[j] = open[j] ? dot[j] : -INFINITY;
                highest = metal::max(highest, dot[j]);
                mine = lane == j ? dot[j] : mine;
            }
            if (lane < STEP && start + lane < S) {
                scores[score + int64_t(h) * S + start + lane] = mine;
            }
            const float keep = metal::exp(top[h] - highest);
            total[h] *= keep;
            for (int e = 0; e < E; e++) {
                sum[h][e] *= keep;
            }
            for (int j = 0; j < STEP; j++) {
                const float weight = metal::exp(dot[j] - highest);
                total[h] += weight;
                for (int e = 0; e < E; e++) {
                    sum[h][e] += weight * v[j][e];
                }
            }
            top[h] = highest;
        }
    }

    threadgroup float tg_top[TILE][SIMDS], tg_total[TILE][SIMDS], tg_sum[SIMDS][H];
    if (lane == 0) {
        #pragma clang loop unroll(full)
        for (int h = 0; h < TILE; h++) {
            tg_top[h][walker] = top[h];
            tg_total[h][walker] = total[h];
        }
    }
    // mem_device: other threads of the group read the scores below.
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    #pragma clang loop unroll(full)
    for (int h = 0; h < TILE; h++) {
        const float its_top = lane < SIMDS ? tg_top[h][lane] : LOWEST;
        const float its_total = lane < SIMDS ? tg_total[h][lane] : 0.0f;
        const float highest = simd_max(its_top);
        const float whole = simd_sum(its_total * metal::exp(its_top - highest));
        const float part_of_whole = metal::exp(top[h] - highest) / whole;
        for (int e = 0; e < E; e++) {
            tg_sum[walker][lane * E + e] = sum[h][e] * part_of_whole;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        if (h < heads) {
            for (int d = me; d < H; d += SIMDS * 32) {
                float value = 0.0f;
                for (int i = 0; i < SIMDS; i++) {
                    value += tg_sum[i][d];
                }
                out[query + h * H + d] = static_cast<T>(value);
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        top[h] = highest;
        total[h] = whole;
    }
    for (int s = me; s < S; s += SIMDS * 32) {
        float share = 0.0f;
        #pragma clang loop unroll(full)
        for (int h = 0; h < TILE; h++) {
            if (h < heads) {
                share += metal::exp(scores[score + int64_t(h) * S + s] - top[h]) / total[h];
            }
        }
        parts[int64_t(part) * S + s] = share / N;
    }
"""


def kernel(
    q: mx.array, keys: mx.array, values: mx.array, scale: float, mask: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """`decode_attention` on Metal, for what `chooser.eligible` allows."""
    B, N, H = q.shape
    K, S = keys.shape[1:3]
    group = N // K
    # Per thread: tile * H / 32 numbers of the queries and as many sums, at most 32 in all.
    tiles = -(-group // (8 if H <= 64 else 4))
    tile = -(-group // tiles)
    simds = 16 if tile * H <= 256 else 8
    threads = 32 * simds
    run = metal_kernel(
        "decode_attention",
        ("q", "keys", "values", "mask", "scale"),
        ("out", "parts", "scores"),
        SOURCE,
    )
    out, parts, _ = run(
        inputs=[q, keys, values, mx.array([True]) if mask is None else mask, scale],
        template=[
            ("T", q.dtype),
            ("H", H),
            ("TILE", tile),
            ("SIMDS", simds),
            ("STEP", 4),
            ("MASKED", mask is not None),
        ],
        grid=(B * K * tiles * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(B, N, H), (B, K * tiles, S), (B, K * tiles, tile, S)],
        output_dtypes=[q.dtype, mx.float32, mx.float32],
    )
    return out, parts.sum(axis=1)
