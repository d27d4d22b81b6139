"""Language models assembled from what transformers saves have transformers' logits."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx import weights
from agevlm_mlx.data import chat
from convert import __main__ as cli

pytestmark = pytest.mark.parity

BOUND = 1e-4
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
THETA = {"rope_type": "default", "rope_theta": 2e4}
#: More layers than its pattern of windows. mlx-lm rounds the scale of the embedding to bfloat16,
#: in which Gemma was trained; that of width 64 has nothing to round.
GEMMA = {"num_hidden_layers": 7, "hidden_size": 64}
CASES = [
    ("Llama", "SmolLM2: tied", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    ("Llama", "Llama 3.2: its rope", {"rope_parameters": LLAMA_3, "head_dim": 16}),
    ("SmolLM3", "layers without rope", {"rope_parameters": THETA, "pad_token_id": 0}),
    ("Qwen2", "biases", {"rope_parameters": THETA}),
    ("Qwen3", "norms of queries and keys", {"rope_parameters": THETA, "head_dim": 16}),
    ("Gemma3", "sliding windows", {"sliding_window": 16, "head_dim": 8, **GEMMA}),
]


@pytest.mark.parametrize(("family", "case", "options"), CASES)
def test_logits(
    family: str,
    case: str,
    options: dict[str, Any],
    transformers: Any,
    randomise: Any,
    parity: Any,
    tmp_path: Path,
) -> None:
    import torch

    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(**SIZES | options)
    reference = randomise(getattr(transformers, f"{family}ForCausalLM")(config))
    reference.save_pretrained(tmp_path / "lm")
    chat.build_tokenizer(["a dog"], vocab_size=300).save_pretrained(str(tmp_path / "lm"))
    arguments = ["--lm", str(tmp_path / "lm"), "--vision", "shipped"]
    assert cli.main(["assemble", *arguments, "--mlx-path", str(tmp_path / "out")]) == 0
    ours = weights.load(tmp_path / "out").model
    ids = np.random.default_rng(0).integers(0, 300, (2, 96))
    with torch.no_grad():
        want = reference(torch.from_numpy(ids)).logits.numpy()
    cache = ours.see(mx.zeros((2, 128, 128, 3)))
    got = np.array(ours(mx.array(ids), cache=cache))
    error = float((np.abs(got - want).max(-1) / np.abs(want).max(-1)).max())
    parity("Language models", f"transformers.{family}ForCausalLM", case, error, BOUND)
