"""Gated cross-attention from text to image tokens, fused, with explicit maps on request.

The block is the one of Flamingo (arXiv 2204.14198) and Llama-3.2-Vision, as AGE-VLM
(arXiv 2511.17793) interleaves it in a small language model: RMSNorm, per-head norms of
queries and keys, attention over the image tokens and one learnable null slot, and a tanh
gate on the residual.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from ..kernels.decode_attention import decode_attention
from ..kernels.guided_attention import guided_attention

#: A token position that no text ever reaches: image slots that start here are hidden.
NEVER = 2**30


@dataclass
class VisionKV:
    """What one layer keeps of the images: keys and values, and who may look at them.

    keys, values: [B K S H], with the null slot (if the layer has one) at index 0.
    start: None when every text position sees every slot, else int32 [B S]: the first text
        position that may attend to the slot (``NEVER`` for padding).
    texts: R, the number of consecutive text rows that share each row of keys.
    null: number of null slots, 0 or 1.
    """

    keys: mx.array
    values: mx.array
    start: mx.array | None = None
    texts: int = 1
    null: int = 1

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def starts(self) -> mx.array:
        """int32 [B S], also when every slot is visible from the beginning."""
        if self.start is not None:
            return self.start
        B, _, S, _ = self.keys.shape
        return mx.zeros((B, S), mx.int32)

    def visible(self, offset: int | mx.array, T: int) -> mx.array | None:
        """bool [B T S] for the text positions ``offset .. offset+T-1``; None means all."""
        if self.start is None:
            return None
        positions = mx.reshape(mx.array(offset), (-1, 1)) + mx.arange(T)  # [1 or B] T
        return positions[..., None] >= self.start[:, None, :]


@dataclass
class MapRequest:
    """Query positions whose attention over the image is wanted, and where it is put.

    rows, cols: int32 [P], text row and position within the current call.
    heads: how many heads, counted from the first; None for all.
    maps: filled by each layer with fp32 [P heads S] (without the null slot).
    """

    rows: mx.array
    cols: mx.array
    heads: int | None
    maps: list[mx.array]


@dataclass
class Recorder:
    """Keeps where the newest text positions of one sequence looked while a model generates.

    layers: L, how many layers look. first: the first text position that is kept. newest: how
        many of a call's last positions are kept (speculative decoding judges several at once).
    maps: text position -> fp32 [B S] of each layer so far: the mean over the heads, without
        the null slot. A position that is computed again replaces what was kept.
    """

    layers: int
    first: int = 0
    newest: int = 1
    maps: dict[int, list[mx.array]] = field(default_factory=dict)

    def columns(self, offset: int | mx.array, T: int) -> range:
        """Which of the T columns of a call that starts at text position `offset` are kept.

        ``ValueError`` for a batch, whose rows are at positions of their own.
        """
        if not isinstance(offset, int):
            raise ValueError("expected one sequence to record, got a batch")
        return range(max(T - self.newest, self.first - offset, 0), T)

    def add(self, position: int, attn_map: mx.array) -> None:
        """One layer's map of a position; layers come in order."""
        kept = self.maps.get(position, [])
        self.maps[position] = [attn_map] if len(kept) == self.layers else [*kept, attn_map]

    def take(self, position: int) -> mx.array:
        """fp32 [B L S]; it and all before it are forgotten."""
        taken = self.maps[position]
        self.maps = {p: maps for p, maps in self.maps.items() if p > position}
        return mx.stack(taken, axis=1)


class GatedCrossAttention(nn.Module):
    """``x + tanh(gate) * attention(norm(x), image)``, the identity when the gate is 0."""

    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        eps: float = 1e-5,
        null_slot: bool = True,
        gate_init: float = 0.0,
        mlp_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.norm = nn.RMSNorm(dim, eps)
        self.q_proj = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(n_heads * head_dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps)
        self.k_norm = nn.RMSNorm(head_dim, eps)
        self.gate = mx.full((1,), gate_init)
        if null_slot:
            self.null_key = mx.zeros((n_kv_heads, head_dim))
            self.null_value = mx.zeros((n_kv_heads, head_dim))
        if mlp_dim:
            self.mlp_norm = nn.RMSNorm(dim, eps)
            self.up_proj = nn.Linear(dim, mlp_dim, bias=False)
            self.down_proj = nn.Linear(mlp_dim, dim, bias=False)
            self.mlp_gate = mx.full((1,), gate_init)

    @property
    def null_slots(self) -> int:
        return int("null_key" in self)

    def project(self, z_img: mx.array, *, null: bool = True) -> tuple[mx.array, mx.array]:
        """Keys and values [B K S H] of image tokens [B S D]; the null slot first if asked."""
        B, S, _ = z_img.shape
        shape = (B, S, self.n_kv_heads, self.head_dim)
        keys = self.k_norm(self.k_proj(z_img).reshape(shape)).swapaxes(1, 2)
        values = self.v_proj(z_img).reshape(shape).swapaxes(1, 2)
        return self.with_null(keys, values) if null else (keys, values)

    def with_null(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values [B K S H] with the null slot, if the layer has one, before them."""
        if not self.null_slots:
            return keys, values
        head = (keys.shape[0], self.n_kv_heads, 1, self.head_dim)
        null_key, null_value = self.null_key[None, :, None], self.null_value[None, :, None]
        keys = mx.concatenate([mx.broadcast_to(null_key, head), keys], axis=2)
        values = mx.concatenate([mx.broadcast_to(null_value, head), values], axis=2)
        return keys, values

    def __call__(
        self,
        x: mx.array,
        vision: VisionKV,
        offset: int | mx.array = 0,
        request: MapRequest | Recorder | None = None,
    ) -> mx.array:
        """x [B*R T D] at text positions ``offset ..`` -> the same shape.

        With a `request` the attention of the asked rows is put into it.
        """
        rows, T, _ = x.shape
        B, R = rows // vision.texts, vision.texts
        if vision.keys.shape[0] != B:
            raise ValueError(
                f"expected {vision.keys.shape[0]} x {R} text rows for these images, got {rows}"
            )
        q = self.q_norm(self.q_proj(self.norm(x)).reshape(B, R * T, self.n_heads, self.head_dim))
        q = q.swapaxes(1, 2)  # B N R*T H
        seen, mask = vision.visible(offset, T), None
        if seen is not None:
            if R > 1:
                raise ValueError("images that start later need one text row each (texts=1)")
            # A position that sees no image adds nothing below; slot 0 keeps its softmax finite.
            mask = seen | (mx.arange(seen.shape[-1]) == 0)
            mask = mx.broadcast_to(mask, (B, T, mask.shape[-1]))
        if isinstance(request, Recorder) and T == R == 1 and request.columns(offset, 1):
            out, attn_map = decode_attention(
                q[:, :, 0],
                vision.keys,
                vision.values,
                self.scale,
                None if mask is None else mask[:, 0],
            )
            request.add(int(offset), attn_map[:, vision.null :])
            out = out[:, :, None]
        else:
            if isinstance(request, Recorder):
                self._record(q, vision, mask, offset, request)
            elif request is not None:
                request.maps.append(self._maps(q, vision, mask, T, request))
            out = mx.fast.scaled_dot_product_attention(
                q,
                vision.keys,
                vision.values,
                scale=self.scale,
                mask=None if mask is None else mask[:, None],
            )
        out = self.o_proj(out.swapaxes(1, 2).reshape(rows, T, -1)) * mx.tanh(self.gate)
        if "mlp_gate" in self:
            hidden = nn.relu2(self.up_proj(self.mlp_norm(x + out)))
            out = out + self.down_proj(hidden) * mx.tanh(self.mlp_gate)
        if seen is not None:
            looks = seen[..., vision.null :].any(axis=-1, keepdims=True)  # B T 1
            out = mx.where(looks, out, 0)
        return x + out

    def _maps(
        self,
        q: mx.array,
        vision: VisionKV,
        mask: mx.array | None,
        T: int,
        request: MapRequest,
    ) -> mx.array:
        """fp32 [P heads S] of queries [B N R*T H]; the null slot is left out."""
        image = request.rows // vision.texts
        column = (request.rows % vision.texts) * T + request.cols
        allowed = None if mask is None else mask[image, column]
        heads = request.heads or self.n_heads
        maps = guided_attention(q, vision.keys, image, column, heads, self.scale, allowed)
        return maps[..., vision.null :]

    def _record(
        self,
        q: mx.array,
        vision: VisionKV,
        mask: mx.array | None,
        offset: int | mx.array,
        recorder: Recorder,
    ) -> None:
        """Maps of the newest columns of a call with several."""
        columns = recorder.columns(offset, q.shape[2])
        if not columns:
            return
        B = q.shape[0]
        image = mx.repeat(mx.arange(B), len(columns))
        column = mx.tile(mx.array(list(columns)), B)
        allowed = None if mask is None else mask[image, column]
        maps = guided_attention(
            q, vision.keys, image, column, self.n_heads, self.scale, allowed
        ).mean(1)
        maps = maps.reshape(B, len(columns), -1)[..., vision.null :]
        for n, c in enumerate(columns):
            recorder.add(int(offset) + c, maps[:, n])
