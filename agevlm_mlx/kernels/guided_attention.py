"""Attention maps of a few query rows, as training asks for them, with their gradient."""

from typing import cast

import mlx.core as mx

from . import chooser
from .metal import metal_kernel

SIMDS = 8  # simdgroups in a threadgroup
SLOTS = 4  # slots whose gradient a simdgroup sums at a time


def guided_attention(
    q: mx.array,
    keys: mx.array,
    image: mx.array,
    column: mx.array,
    heads: int,
    scale: float,
    mask: mx.array | None = None,
) -> mx.array:
    """Where the queries ``q[image[p], :heads, column[p]]`` look: softmax rows fp32 [P heads S].

    q: [B N C H]. keys: [B K S H]; N is a multiple of K. image, column: int32 [P] with
        0 <= image < B and 0 <= column < C; rows may repeat and come in any order.
    heads: how many query heads, counted from the first. mask: bool [P S], True = may attend;
        None means all.
    Differentiable in q and keys.
    """
    if chooser.wanted() and chooser.eligible(q, keys) and image.size > 0:
        return kernel(q, keys, image, column, heads, scale, mask)
    return twin(q, keys, image, column, heads, scale, mask)


def twin(
    q: mx.array,
    keys: mx.array,
    image: mx.array,
    column: mx.array,
    heads: int,
    scale: float,
    mask: mx.array | None = None,
) -> mx.array:
    """`guided_attention` in plain MLX: the specification of the kernels.

    Scores are computed for every column and gathered before the softmax: a gather of keys would
    be cheaper in arithmetic, but on the CPU its gradient is a slow scatter.
    """
    B, N, C, H = q.shape
    K, S = keys.shape[1:3]
    group = N // K
    kv = -(-heads // group)  # the key heads that the wanted query heads belong to
    grouped = (q[:, : kv * group].astype(mx.float32) * scale).reshape(B, kv, group * C, H)
    scores = grouped @ keys[:, :kv].astype(mx.float32).swapaxes(-1, -2)
    scores = scores.reshape(B, kv * group, C, S)
    scores = scores[image[:, None], mx.arange(heads), column[:, None]]  # P heads S
    if mask is not None:
        scores = mx.where(mask[:, None], scores, -mx.inf)
    return mx.softmax(scores, axis=-1)


# One threadgroup per (row, head): its simdgroups walk over the slots with an online softmax. The
# raw scores wait in the output itself, and the same threadgroup turns them into shares.
FORWARD = """
    constexpr int E = H / 32;  // elements of a head in each lane
    constexpr float LOWEST = -3.4e38f;  // finite: exp(-INFINITY - LOWEST) is 0, not NaN
    const int lane = thread_index_in_simdgroup;
    const int walker = simdgroup_index_in_threadgroup;
    const int me = thread_index_in_threadgroup;
    const int row = threadgroup_position_in_grid.x;
    const int head = threadgroup_position_in_grid.y;
    const int heads = threadgroups_per_grid.y;
    const int N = q_shape[1], C = q_shape[2], K = keys_shape[1], S = keys_shape[2];
    const int64_t b = image[row];
    const int64_t query = ((b * N + head) * C + column[row]) * H + lane * E;
    const int64_t base = (b * K + head / (N / K)) * S * H + lane * E;
    const int64_t map = (int64_t(row) * heads + head) * S;

    float x[E];
    for (int e = 0; e < E; e++) {
        x[e] = float(q[query + e]) * scale;
    }
    float top = LOWEST, total = 0.0f;
    for (int s = walker; s < S; s += SIMDS) {
        float dot = 0.0f;
        for (int e = 0; e < E; e++) {
            dot += x[e] * float(keys[base + s * H + e]);
        }
        dot = simd_sum(dot);
        if (MASKED && !mask[int64_t(row) * S + s]) {
            dot = -INFINITY;
        }
        const float highest = metal::max(top, dot);
        total = total * metal::exp(top - highest) + metal::exp(dot - highest);
        top = highest;
        if (lane == 0) {
            maps[map + s] = dot;
        }
    }
    threadgroup float tg_top[SIMDS], tg_total[SIMDS];
    if (lane == 0) {
        tg_top[walker] = top;
        tg_total[walker] = total;
    }
    // mem_device: other threads of the group read the scores below.
    threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device);
    const float its_top = lane < SIMDS ? tg_top[lane] : LOWEST;
    const float its_total = lane < SIMDS ? tg_total[lane] : 0.0f;
    const float highest = simd_max(its_top);
    const float whole = simd_sum(its_total * metal::exp(its_top - highest));
    for (int s = me; s < S; s += SIMDS * 32) {
        maps[map + s] = metal::exp(maps[map + s] - highest) / whole;
    }
"""

# The gradients read `slope` [P heads S], that of the scores, and the rows sorted by `place`
# (image * C + column): `order` are the sorted rows, `begin` [B*C + 1] says where the rows of a
# place start.
#
# One threadgroup per (place, head). It adds up the slopes of all rows that ask for its place and
# writes 0 where none does, so nothing is added to device memory and nothing filled before.
QUERY_GRADIENT = """
    constexpr int E = H / 32;
    const int lane = thread_index_in_simdgroup;
    const int walker = simdgroup_index_in_threadgroup;
    const int me = thread_index_in_threadgroup;
    const int here = threadgroup_position_in_grid.x;
    const int head = threadgroup_position_in_grid.y;
    const int heads = slope_shape[1];
    const int N = q_shape[1], C = q_shape[2], K = keys_shape[1], S = keys_shape[2];
    const int from = begin[here], to = begin[here + 1];
    const int64_t b = here / C;
    const int64_t base = (b * K + head / (N / K)) * S * H + lane * E;

    float sum[E];
    for (int e = 0; e < E; e++) {
        sum[e] = 0.0f;
    }
    if (from < to && head < heads) {  // the same for the whole threadgroup
        for (int s = walker; s < S; s += SIMDS) {
            float weight = 0.0f;
            for (int i = from; i < to; i++) {
                weight += slope[(int64_t(order[i]) * heads + head) * S + s];
            }
            for (int e = 0; e < E; e++) {
                sum[e] += weight * float(keys[base + s * H + e]);
            }
        }
    }
    threadgroup float tg_sum[SIMDS][H];
    for (int e = 0; e < E; e++) {
        tg_sum[walker][lane * E + e] = sum[e];
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const int64_t target = ((b * N + head) * C + here % C) * H;
    for (int d = me; d < H; d += SIMDS * 32) {
        float value = 0.0f;
        for (int i = 0; i < SIMDS; i++) {
            value += tg_sum[i][d];
        }
        dq[target + d] = static_cast<T>(value * scale);
    }
"""

# One threadgroup per (tile of slots, key head, image). A simdgroup holds SLOTS slots in registers
# and goes through the sorted rows of its image: no thread waits for another, and the order of the
# sum is fixed.
KEY_GRADIENT = """
    constexpr int E = H / 32;
    const int lane = thread_index_in_simdgroup;
    const int walker = simdgroup_index_in_threadgroup;
    const int kv = threadgroup_position_in_grid.y;
    const int b = threadgroup_position_in_grid.z;
    const int N = q_shape[1], C = q_shape[2], K = keys_shape[1], S = keys_shape[2];
    const int heads = slope_shape[1];
    const int group = N / K;
    const int first = (int(threadgroup_position_in_grid.x) * SIMDS + walker) * SLOTS;

    float sum[SLOTS][E];
    for (int j = 0; j < SLOTS; j++) {
        for (int e = 0; e < E; e++) {
            sum[j][e] = 0.0f;
        }
    }
    for (int i = begin[b * C]; i < begin[(b + 1) * C]; i++) {
        for (int head = kv * group; head < metal::min(heads, (kv + 1) * group); head++) {
            const int64_t query = ((int64_t(b) * N + head) * C + place[i] % C) * H + lane * E;
            const int64_t row = (int64_t(order[i]) * heads + head) * S;
            float x[E];
            for (int e = 0; e < E; e++) {
                x[e] = float(q[query + e]);
            }
            for (int j = 0; j < SLOTS; j++) {
                const float weight = first + j < S ? slope[row + first + j] : 0.0f;
                for (int e = 0; e < E; e++) {
                    sum[j][e] += weight * x[e];
                }
            }
        }
    }
    const int64_t base = (int64_t(b) * K + kv) * S * H + lane * E;
    for (int j = 0; j < SLOTS; j++) {
        if (first + j < S) {
            for (int e = 0; e < E; e++) {
                dkeys[base + (first + j) * H + e] = static_cast<T>(sum[j][e] * scale);
            }
        }
    }
"""


def kernel(
    q: mx.array,
    keys: mx.array,
    image: mx.array,
    column: mx.array,
    heads: int,
    scale: float,
    mask: mx.array | None = None,
) -> mx.array:
    """`guided_attention` on Metal, for what `chooser.eligible` allows."""

    @mx.custom_function
    def maps(q: mx.array, keys: mx.array) -> mx.array:
        return forward(q, keys, image, column, heads, scale, mask)

    @maps.vjp
    def gradients(
        primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array
    ) -> tuple[mx.array, mx.array]:
        slope = output * (cotangent - (output * cotangent).sum(axis=-1, keepdims=True))
        return backward(*primals, image, column, slope, scale)

    return cast(mx.array, maps(q, keys))


def forward(
    q: mx.array,
    keys: mx.array,
    image: mx.array,
    column: mx.array,
    heads: int,
    scale: float,
    mask: mx.array | None,
) -> mx.array:
    """The maps fp32 [P heads S]."""
    P, S = image.size, keys.shape[2]
    run = metal_kernel(
        "guided_attention",
        ("q", "keys", "image", "column", "mask", "scale"),
        ("maps",),
        FORWARD,
    )
    return run(
        inputs=[q, keys, image, column, mx.array([True]) if mask is None else mask, scale],
        template=[("H", q.shape[3]), ("SIMDS", SIMDS), ("MASKED", mask is not None)],
        grid=(P * 32 * SIMDS, heads, 1),
        threadgroup=(32 * SIMDS, 1, 1),
        output_shapes=[(P, heads, S)],
        output_dtypes=[mx.float32],
    )[0]


def backward(
    q: mx.array,
    keys: mx.array,
    image: mx.array,
    column: mx.array,
    slope: mx.array,
    scale: float,
) -> tuple[mx.array, mx.array]:
    """Gradients of q and keys for the gradient `slope` fp32 [P heads S] of the scores."""
    B, N, C, H = q.shape
    K, S = keys.shape[1:3]
    place = image * C + column
    order = mx.argsort(place)
    place = place[order]
    begin = (place < mx.arange(B * C + 1)[:, None]).sum(axis=1)
    order, place, begin = (x.astype(mx.int32) for x in (order, place, begin))
    template = [("T", q.dtype), ("H", H), ("SIMDS", SIMDS)]
    run = metal_kernel(
        "guided_attention_dq",
        ("q", "keys", "slope", "order", "begin", "scale"),
        ("dq",),
        QUERY_GRADIENT,
    )
    (dq,) = run(
        inputs=[q, keys, slope, order, begin, scale],
        template=template,
        grid=(B * C * 32 * SIMDS, N, 1),
        threadgroup=(32 * SIMDS, 1, 1),
        output_shapes=[q.shape],
        output_dtypes=[q.dtype],
    )
    run = metal_kernel(
        "guided_attention_dkeys",
        ("q", "keys", "slope", "order", "place", "begin", "scale"),
        ("dkeys",),
        KEY_GRADIENT,
    )
    (dkeys,) = run(
        inputs=[q, keys, slope, order, place, begin, scale],
        template=[*template, ("SLOTS", SLOTS)],
        grid=(-(-S // (SIMDS * SLOTS)) * 32 * SIMDS, K, B),
        threadgroup=(32 * SIMDS, 1, 1),
        output_shapes=[keys.shape],
        output_dtypes=[keys.dtype],
    )
    return dq, dkeys
