"""Fixtures that several test folders share."""

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
