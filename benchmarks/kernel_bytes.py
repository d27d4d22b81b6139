"""Which kernels pay: bytes that must be moved and launches, with and without each of them.

Nothing here runs on a GPU. Bytes are counted from shapes: every launch reads each of its inputs
once and writes each of its outputs once. Only the last table is measured, on this CPU.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from agevlm_mlx.benchmarking.shapes import SHAPES
from agevlm_mlx.data.image import Preprocessor, load_image

WIDTH = 2  # bytes of a bf16 number
LOOKING = 4  # looking layers of a model: the default


@dataclass(frozen=True)
class Sizes:
    """One language model: D width, N query and K key heads of H, F width of the MLP."""

    name: str
    layers: int
    vocabulary: int
    D: int
    N: int
    K: int
    H: int
    F: int

    @classmethod
    def of(cls, name: str) -> "Sizes":
        c = SHAPES[name]
        D, N = c["hidden_size"], c["num_attention_heads"]
        return cls(
            name,
            c["num_hidden_layers"],
            c["vocab_size"],
            D,
            N,
            c["num_key_value_heads"],
            c.get("head_dim") or D // N,
            c["intermediate_size"],
        )

    def language_model(self, T: int) -> int:
        """Bytes of the language model's own pass over T tokens: weights and activations."""
        q, kv = self.N * self.H, self.K * self.H
        weights = self.layers * self.D * (2 * q + 2 * kv + 3 * self.F) + self.vocabulary * self.D
        # Two norms, seven products, rope twice, attention, SwiGLU and two sums.
        layer = (2 + 3 + 1 + 3 + 2 + 2 + 1 + 3) * self.D + (1 + 2 + 2 + 1) * q + 6 * kv
        layer += (2 + 3 + 1) * self.F
        return WIDTH * (weights + T * self.layers * layer)


def fusion(model: Sizes, T: int, S: int) -> tuple[int, int, int]:
    """(bytes of a looking layer for T tokens, of these saved by fused kernels, and by mx.compile).

    Launches: norm, q_proj, q_norm, attention, o_proj, tanh of the gate, product, sum. Fused
    kernels would put both norms into q_proj and everything after o_proj into it: 3 launches
    instead of 8. ``mx.compile`` joins the last three: 6 launches.
    """
    x, q = WIDTH * T * model.D, WIDTH * T * model.N * model.H
    weights = 2 * WIDTH * model.D * model.N * model.H
    keys_values = 2 * WIDTH * model.K * S * model.H
    norm, q_proj, q_norm, attention, o_proj = 2 * x, x + q, 2 * q, 2 * q, q + x
    product, add = 2 * x, 3 * x
    total = weights + keys_values
    total += norm + q_proj + q_norm + attention + o_proj + product + add
    # norm writes what q_proj reads, q_proj what q_norm reads; then o_proj, product, sum in turn.
    return total, 2 * x + 2 * q + 4 * x, 2 * x


def decode(model: Sizes, B: int, S: int) -> tuple[int, int]:
    """Bytes of attention with its map for one token a row: (plain operations, kernel)."""
    q = B * model.N * model.H
    kv = 2 * B * model.K * S * model.H
    scores = 4 * B * model.N * S
    # To fp32 and back; written by the product, read and written by softmax, read twice after.
    plain = kv * (WIDTH + 4 + 4) + 5 * scores + q * 2 * (WIDTH + 4)
    kernel = kv * WIDTH + 2 * scores + 2 * q * WIDTH
    return plain, kernel


def guided(model: Sizes, B: int, C: int, S: int, P: int) -> tuple[int, int]:
    """Bytes of the maps of P rows of B C and of their gradient: (plain operations, kernels)."""
    q, keys = B * model.N * C * model.H, B * model.K * S * model.H
    scores, maps = 4 * B * model.N * C * S, 4 * P * model.N * S
    forward = q * (WIDTH + 3 * 4 + 4) + keys * (WIDTH + 2 * 4) + scores + 4 * maps
    # softmax; a block of zeros with the rows in it, read by two products; casts.
    backward = 4 * maps + scores + 2 * scores + (q + keys) * (4 + 4 + 4 + WIDTH)
    plain = forward + backward
    read = WIDTH * P * model.N * model.H + WIDTH * keys
    kernels = read + 3 * maps  # the scores are written, read and replaced
    kernels += 5 * maps + 2 * maps + WIDTH * 2 * (q + keys) + 2 * P * B * C
    return plain, kernels


def table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in [head, *rows]:
        first, *rest = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(text.rjust(width) for text, width in rest)]))


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def picture(width: int, height: int) -> Image.Image:
    """Noise of several sizes: compresses about as a photograph does."""
    rng = np.random.default_rng(0)
    layers = []
    for cell, strength in ((256, 90), (32, 40), (4, 12), (1, 6)):
        small = rng.normal(0, strength, (height // cell + 1, width // cell + 1, 3))
        small = np.clip(small + 128, 0, 255).astype(np.uint8)
        big = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        layers.append(np.asarray(big, np.int16) - 128)
    return Image.fromarray(np.clip(np.sum(layers, axis=0) + 128, 0, 255).astype(np.uint8))


def milliseconds(work: Callable[[], object], trials: int) -> float:
    times = []
    for _ in range(trials + 1):  # the first warms up
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[1:])


def preprocessing(width: int, height: int, size: int, format: str, trials: int) -> list[str]:
    file = io.BytesIO()
    picture(width, height).save(file, format, quality=90)
    content = file.getvalue()
    preprocessor = Preprocessor(image_size=size, resample="bicubic")
    image = load_image(content)
    small, geometry = preprocessor.resized(image)
    pixels = np.asarray(small)
    parts = [
        milliseconds(lambda: load_image(content), trials),
        milliseconds(lambda: preprocessor.resized(image), trials),
        milliseconds(lambda: preprocessor.normalise(pixels, geometry), trials),
    ]
    left, top, right, bottom = geometry.shown
    result, across = (right - left) * (bottom - top), height * (right - left)
    # PIL keeps 4 bytes a pixel and resizes along one axis, then the other; numpy makes fp32 of it.
    cpu = width * height * 4 + 2 * across * 4 + result * 4 + size * size * 3 * (1 + 3 * 2 * 4)
    # PIL's pixels become a numpy array of 3 bytes each and that an MLX array (mx.array copies):
    # then come the two passes, the second of which normalises.
    gpu = width * height * (4 + 3 + 3 + 3 + 3) + 2 * across * 3 * 4 + size * size * 3 * WIDTH
    return [
        f"{width}x{height} {format} -> {size}",
        f"{len(content) / 1e6:.2f} MB",
        *(f"{part:.2f} ms" for part in parts),
        f"{sum(parts[1:]) / sum(parts):.0%}",
        megabytes(cpu),
        megabytes(gpu),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: python benchmarks/kernel_bytes.py --image-tokens 576",
    )
    parser.add_argument("--image-tokens", type=int, default=1088, metavar="S")
    parser.add_argument("--trials", type=int, default=7, help="of each measured time (default 7)")
    args = parser.parse_args()
    S = args.image_tokens + 1  # with the null slot
    models = [Sizes.of(name) for name in ("smollm2-135m", "smollm2-360m", "llama-3.2-1b")]
    rows = []
    for model in models:
        for T in (1, 32, 512):
            total, fused, compiled = (LOOKING * n for n in fusion(model, T, S))
            rows.append(
                [
                    f"{model.name}, {'decode' if T == 1 else f'prefill {T}'}",
                    megabytes(total),
                    f"{fused / 1e6:.3f} MB",
                    f"{fused / total:.1%}",
                    f"{compiled / total:.1%}",
                    f"{fused / (model.language_model(T) + total):.2%}",
                ]
            )
    table(
        f"Norms in q_proj, tanh gate and residual in o_proj ({LOOKING} looking layers, bf16, "
        f"S = {args.image_tokens}; {8 * LOOKING} launches, {3 * LOOKING} with fused kernels, "
        f"{6 * LOOKING} with mx.compile)",
        ["", "bytes", "fused saves", "", "mx.compile saves", "fused, of the whole pass"],
        rows,
    )
    rows = []
    for model in models:
        plain, kernel = decode(model, 1, S)
        rows.append([model.name, megabytes(plain), megabytes(kernel), f"{plain / kernel:.1f}x"])
    table(
        f"Attention with its map, a token and layer (S = {args.image_tokens}; 9 launches of plain "
        "operations, 2 with the kernel)",
        ["", "plain", "kernel", ""],
        rows,
    )
    rows = []
    for model in models:
        plain, kernel = guided(model, B=8, C=3 * 64, S=S, P=64)
        rows.append([model.name, megabytes(plain), megabytes(kernel), f"{plain / kernel:.1f}x"])
    table(
        "Maps of 64 guided rows and their gradient, a training step and layer "
        f"(8 images, 3 texts of 64 tokens each, S = {args.image_tokens})",
        ["", "plain", "kernels", ""],
        rows,
    )
    table(
        "Preprocessing: times measured on this CPU (medians), bytes after the decoder",
        ["", "file", "decode", "resize", "normalise", "not decoding", "PIL + numpy", "GPU version"],
        [
            preprocessing(4032, 3024, 384, "JPEG", args.trials),
            preprocessing(1024, 768, 384, "JPEG", args.trials),
            preprocessing(64, 64, 64, "PNG", args.trials),
        ],
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
