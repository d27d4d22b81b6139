"""Sizes, time and peak memory (Linux) of assembling the two models that the README names.

Makes the published parts with random weights (same shapes, same dtypes, same file layout), so
that it needs no network, and runs the command that a user runs on them.

  python scripts/measure_assemble.py --work /tmp/measure
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from agevlm_mlx import weights
from agevlm_mlx.data import chat
from agevlm_mlx.models.graft import build_language_model
from agevlm_mlx.models.vision import build_encoder

import mlx.core as mx  # isort: skip  (after agevlm_mlx: its fast BLAS comes first)
from mlx.utils import tree_flatten  # isort: skip

SMOLLM2_360M = {
    "model_type": "llama",
    "hidden_size": 960,
    "intermediate_size": 2560,
    "num_hidden_layers": 32,
    "num_attention_heads": 15,
    "num_key_value_heads": 5,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_32_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
SIGLIP_BASE = {"model_type": "siglip_vision_model", "image_size": 224, "patch_size": 16}
CONVNEXT_BASE = {
    "architecture": "convnext_base",
    "num_classes": 0,
    "pretrained_cfg": {
        "input_size": [3, 256, 256],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711],
    },
}


def language_model(folder: Path, config: dict, shard: int) -> None:
    folder.mkdir(parents=True)
    tensors = dict(tree_flatten(build_language_model(config).parameters()))
    weights.write_weights(folder, {k: v.astype(mx.bfloat16) for k, v in tensors.items()}, shard)
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}))
    tokenizer = chat.build_tokenizer(["a dog", "a cat"], vocab_size=300)
    tokenizer.save_pretrained(str(folder))


def siglip(folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors = dict(tree_flatten(build_encoder(SIGLIP_BASE).parameters()))
    kernel = "embeddings.patch_embedding.weight"
    tensors[kernel] = tensors[kernel].transpose(0, 3, 1, 2)
    named = {f"vision_model.{k}": v for k, v in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), named, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(SIGLIP_BASE))


def convnext(folder: Path) -> None:
    """timm's own module writes it: needs torch and timm."""
    from agevlm_mlx.sam.torchvision_ops import import_torchvision

    import_torchvision()
    import timm
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    model = timm.create_model("convnext_base", num_classes=0)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONVNEXT_BASE))


#: Runs the command and prints its peak resident memory (getrusage would give a child of a large
#: process its parent's peak).
RUN = """
import re, sys
from convert.__main__ import main
status = main(sys.argv[1:])
kilobytes = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print("peak memory", kilobytes * 1024 // 10**6, "MB")
sys.exit(status)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="scratch folder (8 GB)")
    work = parser.parse_args().work
    if not (work / "smollm2").exists():
        language_model(work / "smollm2", SMOLLM2_360M, weights.MAX_SHARD)
        language_model(work / "llama", LLAMA_32_1B, 1 << 30)
        siglip(work / "siglip")
        convnext(work / "convnext")
    for name, lm, vision, options in (
        ("SmolLM2-360M + SigLIP base", "smollm2", "siglip", []),
        ("the same, 4 bits", "smollm2", "siglip", ["-q", "--q-bits", "4"]),
        ("Llama-3.2-1B + CLIP-ConvNeXt base", "llama", "convnext", ["--image-size", "512"]),
        ("the same, 4 bits", "llama", "convnext", ["--image-size", "512", "-q", "--q-bits", "4"]),
    ):
        out = work / "out"
        subprocess.run(["rm", "-rf", str(out)], check=True)
        arguments = ["assemble", "--lm", str(work / lm), "--vision", str(work / vision)]
        start = time.perf_counter()
        command = [sys.executable, "-c", RUN, *arguments, "--mlx-path", str(out), *options]
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
        print(f"## {name}: {time.perf_counter() - start:.1f} s\n{run.stdout}{run.stderr}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
