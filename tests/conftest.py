"""Fixtures that several test folders share."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agevlm_mlx.openblas import preload

preload()  # before the first import of mlx, also when the package is not yet imported

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from agevlm_mlx.config import FusionConfig, ModelConfig  # noqa: E402


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    mx.random.seed(0)
    return 0


@pytest.fixture(scope="session")
def tiny_model_config() -> Callable[..., ModelConfig]:
    """``tiny_model_config(vocab_size=100, **fusion)``: a three-layer model of a few thousand
    parameters; ``fusion`` overrides the fields of its FusionConfig."""

    def build(vocab_size: int = 100, **fusion: Any) -> ModelConfig:
        return ModelConfig(
            text_config={
                "model_type": "llama",
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "intermediate_size": 64,
                "vocab_size": vocab_size,
                "rms_norm_eps": 1e-5,
            },
            vision_config={
                "model_type": "agevlm_vit",
                "image_size": 16,
                "patch_size": 4,
                "hidden_size": 24,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 48,
            },
            fusion_config=FusionConfig(**{"layers": (1, 2), "gate_init": 0.5, **fusion}),
        )

    return build


@pytest.fixture
def tiny_config(tiny_model_config: Callable[..., ModelConfig]) -> ModelConfig:
    """The default of `tiny_model_config`."""
    return tiny_model_config()


@pytest.fixture
def tiny_model(tiny_config: ModelConfig) -> Any:
    """An evaluated `AgeVLM` of `tiny_config` with the same random weights in every test."""
    from agevlm_mlx.models.agevlm import AgeVLM

    model = AgeVLM(tiny_config)
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="session")
def tiny_checkpoint(
    tiny_model_config: Callable[..., ModelConfig], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A complete checkpoint folder of the tiny model, untrained. Do not write in it."""
    from agevlm_mlx.data.chat import build_tokenizer
    from agevlm_mlx.data.image import Preprocessor
    from agevlm_mlx.models.agevlm import AgeVLM
    from agevlm_mlx.weights import save_model

    mx.random.seed(0)
    tokenizer = build_tokenizer(["Is there a dog? Yes No", "Describe the image."], vocab_size=290)
    model = AgeVLM(tiny_model_config(len(tokenizer)))
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    save_model(folder, model, tokenizer, Preprocessor(image_size=16), "# A tiny model\n")
    return folder


@pytest.fixture(scope="session", params=["cross", "concat"])
def talker(request: pytest.FixtureRequest, tiny_talker: Callable[[str], Any]) -> Any:
    """`tiny_talker` of either fusion."""
    return tiny_talker(request.param)


@pytest.fixture(scope="session")
def tiny_talker(
    tiny_model_config: Callable[..., ModelConfig], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Any]:
    """``tiny_talker(fusion)``: a loaded checkpoint whose greedy answers change with the image,
    the question and each other; 512 tokens of context."""
    from dataclasses import replace

    from agevlm_mlx.data.chat import build_tokenizer
    from agevlm_mlx.data.image import Preprocessor
    from agevlm_mlx.models.agevlm import AgeVLM
    from agevlm_mlx.weights import Loaded, load, save_model

    made: dict[str, Loaded] = {}
    texts = ["Is there a dog? Yes No", "Describe the image.", "Where is the car? Top left"]

    def build(fusion: str) -> Loaded:
        if fusion not in made:
            mx.random.seed(8)
            tokenizer = build_tokenizer(texts, vocab_size=320)
            layers = {"layers": (1, 2)} if fusion == "cross" else {"layers": None}
            config = tiny_model_config(len(tokenizer), fusion=fusion, **layers)
            context = {"max_position_embeddings": 512, "tie_word_embeddings": False}
            model = AgeVLM(replace(config, text_config={**config.text_config, **context}))
            # At the usual initial scale every greedy answer repeats one token.
            for layer in model.layers:
                layer.mlp.down_proj.weight = 16 * layer.mlp.down_proj.weight
                layer.self_attn.o_proj.weight = 16 * layer.self_attn.o_proj.weight
                layer.self_attn.q_proj.weight = 10 * layer.self_attn.q_proj.weight
                if "cross_attn" in layer:
                    layer.cross_attn.o_proj.weight = 16 * layer.cross_attn.o_proj.weight
                    layer.cross_attn.q_norm.weight = 10 * layer.cross_attn.q_norm.weight
            folder = tmp_path_factory.mktemp(f"talker-{fusion}") / "checkpoint"
            save_model(folder, model, tokenizer, Preprocessor(image_size=16), "# Talker\n")
            made[fusion] = load(folder)
        return made[fusion]

    return build


@pytest.fixture(scope="session")
def noise() -> Callable[[int], Any]:
    """``noise(n)``: the n-th of any number of pictures that have nothing in common."""
    from PIL import Image

    def draw(n: int) -> Image.Image:
        pixels = np.random.default_rng(n).integers(0, 255, (20, 30, 3), np.uint8)
        return Image.fromarray(pixels)

    return draw


#: Where `scripts/parity_table.py` wants the figures of this run.
RECORD = os.environ.get("AGEVLM_PARITY_RECORD")


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """torchvision, importable also where its compiled operators do not load (Linux, CPU)."""
    from agevlm_mlx.sam.torchvision_ops import import_torchvision

    return import_torchvision()


@pytest.fixture(scope="session")
def transformers(torchvision: Any) -> Any:
    import transformers

    return transformers


@pytest.fixture(scope="session")
def parity() -> Callable[..., None]:
    """``parity(part, reference, case, figure, bound)``: `figure` is at most `bound`.

    With ``AGEVLM_PARITY_RECORD`` set to a file, the figures are appended to it as JSON lines,
    from which docs/parity.md is made.
    """

    def check(part: str, reference: str, case: str, figure: float, bound: float) -> None:
        if RECORD:
            row = {"part": part, "reference": reference, "case": case}
            with open(RECORD, "a", encoding="utf-8") as file:
                file.write(json.dumps(row | {"figure": figure, "bound": bound}) + "\n")
        assert figure <= bound

    return check


@pytest.fixture(scope="session")
def randomise() -> Callable[[Any], Any]:
    """Weights large enough that every layer matters (the libraries' own start near zero)."""
    import torch

    def noise(model: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                values = torch.randn(parameter.shape, generator=generator)
                parameter.add_(values, alpha=0.1)
        return model.eval()

    return noise
