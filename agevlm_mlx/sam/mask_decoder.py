"""SAM's mask decoder (arXiv 2304.02643, appendix A) in MLX.

Matches the ``MaskDecoder`` and ``TwoWayTransformer`` of Meta's ``segment_anything``, with Hugging
Face's parameter names. Tokens of S image cells and of T = 5 + 2 queries: the estimated IoU, four
masks, and the prompt's two.
"""

import mlx.core as mx
import mlx.nn as nn

from .architecture import Architecture

#: The mask of a clear prompt, and three (whole, part, sub-part) of an ambiguous one.
MASKS = 4
#: Attention between queries and cells is this many times narrower than the tokens.
_NARROWER = 2


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, narrower: int = 1) -> None:
        super().__init__()
        inner, self.n_heads = width // narrower, heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def __call__(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """q [n T D] or [1 T D] (the same for all), k and v [n S D] or [1 S D] -> [n T D]."""
        heads = [
            self._heads(p(x)) for p, x in ((self.q_proj, q), (self.k_proj, k), (self.v_proj, v))
        ]
        n = max(len(q), len(k))
        heads = [mx.broadcast_to(x, (n, *x.shape[1:])) for x in heads]
        scale = heads[0].shape[-1] ** -0.5
        out = mx.fast.scaled_dot_product_attention(*heads, scale=scale)
        return self.out_proj(out.swapaxes(1, 2).flatten(2))

    def _heads(self, x: mx.array) -> mx.array:
        return x.reshape(*x.shape[:2], self.n_heads, -1).swapaxes(1, 2)


class Mlp(nn.Module):
    """lin1, ReLU, lin2."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.lin1 = nn.Linear(width, inner)
        self.lin2 = nn.Linear(inner, width)

    def __call__(self, x: mx.array) -> mx.array:
        return self.lin2(nn.relu(self.lin1(x)))


class Head(nn.Module):
    """Three linear layers with ReLU between."""

    def __init__(self, width: int, inner: int, out: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(width, inner)
        self.layers = [nn.Linear(inner, inner)]
        self.proj_out = nn.Linear(inner, out)

    def __call__(self, x: mx.array) -> mx.array:
        return self.proj_out(nn.relu(self.layers[0](nn.relu(self.proj_in(x)))))


class TwoWayBlock(nn.Module):
    """Queries attend to one another and to the cells, then the cells to the queries."""

    def __init__(self, width: int, heads: int, mlp_dim: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, heads, _NARROWER)
        self.layer_norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_dim)
        self.layer_norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, heads, _NARROWER)
        self.layer_norm4 = nn.LayerNorm(width)

    def __call__(
        self, queries: mx.array, keys: mx.array, query_places: mx.array, key_places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """queries [n T D], keys [n S D] or [1 S D] and their places -> both [n . D], changed."""
        if self.first:  # the queries are their own places still
            queries = self.self_attn(queries, queries, queries)
        else:
            q = queries + query_places
            queries = queries + self.self_attn(q, q, queries)
        queries = self.layer_norm1(queries)
        k = keys + key_places
        queries = queries + self.cross_attn_token_to_image(queries + query_places, k, keys)
        queries = self.layer_norm2(queries)
        queries = self.layer_norm3(queries + self.mlp(queries))
        keys = keys + self.cross_attn_image_to_token(k, queries + query_places, queries)
        return queries, self.layer_norm4(keys)


class TwoWayTransformer(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width, heads = architecture.out_chans, architecture.decoder_num_heads
        self.layers = [
            TwoWayBlock(width, heads, architecture.decoder_mlp_dim, first=i == 0)
            for i in range(architecture.decoder_depth)
        ]
        self.final_attn_token_to_image = Attention(width, heads, _NARROWER)
        self.layer_norm_final_attn = nn.LayerNorm(width)

    def __call__(
        self, tokens: mx.array, cells: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """tokens [n T D], cells [n S D] or [1 S D], places [S D] -> queries and cells [n . D]."""
        queries = tokens
        for layer in self.layers:
            queries, cells = layer(queries, cells, tokens, places)
        attended = self.final_attn_token_to_image(queries + tokens, cells + places, cells)
        return self.layer_norm_final_attn(queries + attended), cells


class Double(nn.Module):
    """Twice as fine a map: a transposed convolution whose stride is its kernel of 2 x 2, which is
    a linear layer for each of the four new cells."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = mx.zeros((2, 2, out, width))
        self.bias = mx.zeros((out,))

    def __call__(self, x: mx.array) -> mx.array:
        """[n h w C] -> [n 2h 2w out]."""
        n, h, w, C = x.shape
        x = (x @ self.weight.reshape(-1, C).T).reshape(n, h, w, 2, 2, -1) + self.bias
        return x.swapaxes(2, 3).reshape(n, 2 * h, 2 * w, -1)


class MaskDecoder(nn.Module):
    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        width = architecture.out_chans
        self.side = architecture.grid
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASKS, width)
        self.transformer = TwoWayTransformer(architecture)
        self.upscale_conv1 = Double(width, width // 4)
        self.upscale_layer_norm = nn.LayerNorm(width // 4, 1e-6)
        self.upscale_conv2 = Double(width // 4, width // 8)
        self.output_hypernetworks_mlps = [Head(width, width, width // 8) for _ in range(MASKS)]
        self.iou_prediction_head = Head(width, architecture.iou_head_hidden_dim, MASKS)

    def __call__(
        self, prompts: mx.array, cells: mx.array, places: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Four masks for each prompt.

        prompts: [n 2 C] of the prompt encoder. cells: image embedding plus dense prompt, [n S C],
        or [1 S C] where all prompts are of one image. places: [S C]. Returns logits
        f32 [n 4 4Gs 4Gs] and the estimated IoU f32 [n 4].
        """
        n, S = len(prompts), self.side
        own = mx.concatenate([self.iou_token.weight, self.mask_tokens.weight])
        tokens = mx.concatenate([mx.broadcast_to(own, (n, *own.shape)), prompts], axis=1)
        queries, cells = self.transformer(tokens, cells, places)
        fine = self.upscale_conv1(cells.reshape(n, S, S, -1))
        fine = nn.gelu(self.upscale_layer_norm(fine))
        fine = nn.gelu(self.upscale_conv2(fine)).flatten(1, 2)
        mixes = [mlp(queries[:, 1 + i]) for i, mlp in enumerate(self.output_hypernetworks_mlps)]
        logits = mx.stack(mixes, axis=1) @ fine.swapaxes(1, 2)
        iou = self.iou_prediction_head(queries[:, 0])
        return logits.reshape(n, MASKS, 4 * S, 4 * S).astype(mx.float32), iou.astype(mx.float32)
