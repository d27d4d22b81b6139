"""Training speed against PyTorch, the same model, batch and optimiser, on this machine's CPU.

    python benchmarks/train_against_torch.py --json train_against_torch.json

The torch side is written here as nanoVLM does it: a SigLIP vision transformer, pixel shuffle and
one linear layer, a Llama whose first tokens are the image's, AdamW with clipping; plain modules,
`scaled_dot_product_attention`, fp32. It is given what is quickest: the output layer for text
positions only and torch's fused AdamW. Ours trains three models of these sizes: `concat`, which is
the same network (the same weights give the same loss, checked before anything is timed), `cross`,
in which the text looks at the image through gated cross-attention, and `cross` with its attention
guided by masks.

Shapes: SmolLM2-135M, SigLIP-B/16 at 224 pixels, 49 image tokens, one text of 64 tokens an image, of
which 48 are supervised (and 8 guided); everything is trained. Random weights. A step is loss,
gradients, clipping and optimiser; batches are ready. Both programs run in this process with the
same number of threads and take turns. MLX computes element by element in one thread and uses more
in matrix products alone; --threads 1 compares the two one to one.
"""

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_early.add_argument("--threads", default=os.environ.get("OPENBLAS_NUM_THREADS", os.cpu_count()))
# Before OpenBLAS is opened, which asks only then.
os.environ["OPENBLAS_NUM_THREADS"] = str(_early.parse_known_args()[0].threads)

from agevlm_mlx.openblas import preload  # noqa: E402

preload()  # before the first import of mlx

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from agevlm_mlx import errors  # noqa: E402
from agevlm_mlx.benchmarking import report, shapes, timing  # noqa: E402
from agevlm_mlx.benchmarking.training import TrainingStep, quartiles, random_batch  # noqa: E402
from agevlm_mlx.config import FusionConfig  # noqa: E402
from agevlm_mlx.data.batches import Batch  # noqa: E402
from agevlm_mlx.evaluation import files  # noqa: E402
from agevlm_mlx.evaluation.machine import versions  # noqa: E402
from agevlm_mlx.malloc import keep_freed  # noqa: E402
from agevlm_mlx.models.agevlm import AgeVLM  # noqa: E402
from agevlm_mlx.training.rules import named_parameters  # noqa: E402
from agevlm_mlx.training.stages import AttentionLoss, Losses  # noqa: E402

TEXT = shapes.SHAPES["smollm2-135m"]
VISION = {**shapes.VISION, "image_size": 224}
SHUFFLE = 2
TINY_TEXT = {**TEXT, **shapes.TINY_TEXT}
TINY_VISION = {**VISION, **shapes.TINY_VISION}
#: The two losses may differ by that much, relatively.
SAME = 1e-4


def heads(x: torch.Tensor, n: int) -> torch.Tensor:
    """[B T n*H] -> [B n T H]."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


class Tower(nn.Module):
    """A SigLIP vision transformer: pixels [B 3 Hi Wi] -> [B S' Dv]."""

    embeddings: Any
    encoder: Any

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        D, patch = c["hidden_size"], c["patch_size"]
        self.embeddings = nn.Module()
        self.embeddings.patch_embedding = nn.Conv2d(3, D, patch, patch)
        self.embeddings.position_embedding = nn.Embedding((c["image_size"] // patch) ** 2, D)
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(TowerLayer(c) for _ in range(c["num_hidden_layers"]))
        self.post_layernorm = nn.LayerNorm(D, 1e-6)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = x + self.embeddings.position_embedding.weight
        for layer in self.encoder.layers:
            x = layer(x)
        return self.post_layernorm(x)


class TowerLayer(nn.Module):
    """Pre-norm attention and an MLP with GELU."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        D = c["hidden_size"]
        self.n = c["num_attention_heads"]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(D, 1e-6), nn.LayerNorm(D, 1e-6)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(D, D) for name in names})
        self.mlp = nn.ModuleDict(
            {
                "fc1": nn.Linear(D, c["intermediate_size"]),
                "fc2": nn.Linear(c["intermediate_size"], D),
            }
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, y = self.self_attn, self.layer_norm1(x)
        q, k, v = (heads(a[name](y), self.n) for name in ("q_proj", "k_proj", "v_proj"))
        out = F.scaled_dot_product_attention(q, k, v)
        x = x + a["out_proj"](out.transpose(1, 2).flatten(2))
        hidden = F.gelu(self.mlp["fc1"](self.layer_norm2(x)), approximate="tanh")
        return x + self.mlp["fc2"](hidden)


class LlamaLayer(nn.Module):
    """Pre-norm causal attention with rotary positions, and a gated MLP."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        D, N, K = c["hidden_size"], c["num_attention_heads"], c["num_key_value_heads"]
        H, wide = D // N, c["intermediate_size"]
        self.n, self.k = N, K
        self.input_layernorm = nn.RMSNorm(D, c["rms_norm_eps"])
        self.post_attention_layernorm = nn.RMSNorm(D, c["rms_norm_eps"])
        sizes = {"q_proj": (D, N * H), "k_proj": (D, K * H), "v_proj": (D, K * H)}
        sizes |= {"o_proj": (N * H, D)}
        self.self_attn = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})
        sizes = {"gate_proj": (D, wide), "up_proj": (D, wide), "down_proj": (wide, D)}
        self.mlp = nn.ModuleDict({n: nn.Linear(*s, bias=False) for n, s in sizes.items()})

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        a, y = self.self_attn, self.input_layernorm(x)
        q, k, v = (
            heads(a[name](y), n)
            for name, n in (("q_proj", self.n), ("k_proj", self.k), ("v_proj", self.k))
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + a["o_proj"](out.transpose(1, 2).flatten(2))
        m, y = self.mlp, self.post_attention_layernorm(x)
        return x + m["down_proj"](F.silu(m["gate_proj"](y)) * m["up_proj"](y))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of [B n T H]; cos, sin [T H]."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


class TorchVLM(nn.Module):
    """Tower, pixel shuffle, one linear layer, Llama; parameters are named as ours."""

    language_model: Any

    def __init__(self, text: dict[str, Any], vision: dict[str, Any]) -> None:
        super().__init__()
        D = text["hidden_size"]
        self.vision_tower = Tower(vision)
        joined = vision["hidden_size"] * SHUFFLE**2
        self.multi_modal_projector = nn.ModuleDict({"linear": nn.Linear(joined, D, bias=False)})
        self.language_model = nn.Module()
        trunk: Any = nn.Module()
        self.language_model.model = trunk
        trunk.embed_tokens = nn.Embedding(text["vocab_size"], D)
        layers = (LlamaLayer(text) for _ in range(text["num_hidden_layers"]))
        trunk.layers, trunk.norm = nn.ModuleList(layers), nn.RMSNorm(D, text["rms_norm_eps"])
        self.rope, self.head_dim = text["rope_theta"], D // text["num_attention_heads"]

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """pixels [B 3 Hi Wi], ids [B T] -> logits of the text [B T V]."""
        z = self.vision_tower(pixels)
        B, S, width = z.shape
        side, f = math.isqrt(S), SHUFFLE
        z = z.view(B, side // f, f, side // f, f, width).transpose(2, 3).reshape(B, S // f**2, -1)
        trunk = self.language_model.model
        x = torch.cat((self.multi_modal_projector["linear"](z), trunk.embed_tokens(ids)), 1)
        steps = torch.arange(0, self.head_dim, 2) / self.head_dim
        angles = torch.outer(torch.arange(x.shape[1]), self.rope**-steps).repeat(1, 2)
        cos, sin = angles.cos(), angles.sin()
        for layer in trunk.layers:
            x = layer(x, cos, sin)
        text = trunk.norm(x[:, -ids.shape[1] :])
        return text @ trunk.embed_tokens.weight.T


class TorchStep:
    """A training step of `TorchVLM`; the counterpart of `TrainingStep`."""

    def __init__(self, model: TorchVLM, batch: Batch, lr: float = 1e-6) -> None:
        (group,) = batch.groups
        self.model = model
        self.pixels = torch.from_numpy(batch.pixels.transpose(0, 3, 1, 2).copy())
        self.ids = torch.from_numpy(group.ids[:, 0].astype(np.int64))
        labels = np.where(group.loss_mask[:, 0] > 0, group.labels[:, 0], -100)
        self.labels = torch.from_numpy(labels.astype(np.int64))
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.02}, {"params": others, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr, (0.9, 0.98), fused=True)
        self.loss, self.seconds = float("nan"), (0.0, 0.0)

    def __call__(self) -> None:
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        logits = self.model(self.pixels, self.ids)
        loss = F.cross_entropy(logits.flatten(0, 1), self.labels.flatten(), ignore_index=-100)
        loss.backward()
        middle = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.loss = loss.item()
        self.seconds = middle - start, time.perf_counter() - middle


def copied(model: AgeVLM, text: dict[str, Any], vision: dict[str, Any]) -> TorchVLM:
    """`TorchVLM` with the weights of our concat model."""
    other = TorchVLM(text, vision)
    weights = {}
    for name, value in named_parameters(model).items():
        array = np.array(value)
        if name.endswith("patch_embedding.weight"):
            array = array.transpose(0, 3, 1, 2).copy()
        weights[name] = torch.from_numpy(array)
    other.load_state_dict(weights)
    return other


def ours(fusion: str, text: dict[str, Any], vision: dict[str, Any]) -> AgeVLM:
    settings: Any = {
        "fusion": fusion,
        "projector": "pixel_shuffle",
        "pixel_shuffle_factor": SHUFFLE,
        "gate_init": 0.5,
    }
    model = shapes.random_model(text, vision, FusionConfig(**settings))
    mx.eval(model.parameters())
    model.train()
    return model


def compare(images: int, tokens: int, trials: int, tiny: bool) -> dict[str, Any]:
    """Seconds of every program's step, side by side."""
    text, vision = (TINY_TEXT, TINY_VISION) if tiny else (TEXT, VISION)
    concat, cross = ours("concat", text, vision), ours("cross", text, vision)
    batch = random_batch(concat, images, tokens)
    theirs = TorchStep(copied(concat, text, vision), batch)
    guided = Losses(attention=AttentionLoss(weight=0.3))
    steps: dict[str, Any] = {
        "torch": theirs,
        "ours, concat": TrainingStep(concat, batch, Losses()),
        "ours, cross": TrainingStep(cross, batch, Losses()),
        "ours, cross, guided": TrainingStep(cross, batch, guided),
    }
    for name in ("torch", "ours, concat"):
        steps[name]()
    losses = [steps[name].loss for name in ("torch", "ours, concat")]
    if not abs(losses[0] - losses[1]) <= SAME * losses[0]:
        raise errors.UserError(
            f"expected the same loss of the same weights within {SAME:g}, got {losses[0]:.6f} "
            f"(torch) and {losses[1]:.6f} (ours): the two are not the same model"
        )

    def timed(step: Any) -> Callable[[], tuple[float, float]]:
        def measure() -> tuple[float, float]:
            step()
            return step.seconds

        return measure

    taken = timing.interleaved({n: timed(s) for n, s in steps.items()}, trials, report.progress)
    found = {}
    for name, times in taken.items():
        whole = [sum(t) for t in times]
        ratios = [sum(a) / b for a, b in zip(taken["torch"], whole, strict=True)]
        found[name] = {
            "step": timing.summary(whole),
            "gradients": timing.summary([t[0] for t in times]),
            "optimiser": timing.summary([t[1] for t in times]),
            "samples_per_second": images / timing.summary(whole)["median"],
            "of_torch": {**timing.summary(ratios), "quartiles": quartiles(ratios)},
        }
    return {"losses": dict(zip(("torch", "ours"), losses, strict=True)), "programs": found}


def table(measured: dict[str, Any]) -> str:
    """The comparison for people."""
    rows = []
    for name, told in measured["programs"].items():
        ratio, (low, high) = told["of_torch"]["median"], told["of_torch"]["quartiles"]
        times = [f"{told[key]['median'] * 1e3:.0f}" for key in ("step", "gradients", "optimiser")]
        rows.append(
            [
                name,
                *times,
                f"{told['samples_per_second']:.3g}",
                f"{ratio:.2f} ({low:.2f} to {high:.2f})" if name != "torch" else "1",
            ]
        )
    header = ["program", "step, ms", "loss and gradients, ms", "clipping and optimiser, ms"]
    return report.table([*header, "samples/s", "of torch's (quartiles)"], rows)


@errors.command
def main(argv: list[str] | None = None) -> int:
    """Run the comparison; see ``--help``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=2, help="images of a step (2)")
    parser.add_argument("--tokens", type=int, default=64, help="of the text of an image (64)")
    parser.add_argument("--trials", type=int, default=7, help="steps of each program (7)")
    threads = os.environ["OPENBLAS_NUM_THREADS"]
    parser.add_argument("--threads", type=int, default=threads, help="of both (all cores)")
    parser.add_argument("--tiny", action="store_true", help="miniatures, to test this script")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number and fact")
    args = parser.parse_args(argv)
    for name in ("batch", "tokens", "trials", "threads"):
        if getattr(args, name) < 1:
            raise errors.UserError(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.json:
        files.check_writable(args.json)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    mx.random.seed(0)
    command = sys.argv[1:] if argv is None else argv
    about: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/train_against_torch.py", *command]),
        "machine": report.facts(),
        "versions": {**versions(), "torch": torch.__version__},
        "threads": args.threads,
    }
    measured = compare(args.batch, args.tokens, args.trials, args.tiny)
    about["measured"] = measured
    report.progress("")
    print(f"{about['command']}\n{report.machine_line(about['machine'])}")
    print(
        f"torch {torch.__version__}, {args.threads} threads; {args.trials} turns, load "
        f"{about['machine']['load_average'][0]:.1f}; loss of the same weights: torch "
        f"{measured['losses']['torch']:.6f}, ours {measured['losses']['ours']:.6f}\n"
    )
    print(table(measured))
    if args.json:
        files.write_json(args.json, about)
        print(f"\nwritten: {args.json}")
    return 0


if __name__ == "__main__":
    keep_freed()  # as `agevlm train` does
    sys.exit(main())
