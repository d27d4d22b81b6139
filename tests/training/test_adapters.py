"""Adapters: what they leave alone, what they change, the way into a file and into the weights."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.utils import load_adapters

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.agevlm import AgeVLM
from agevlm_mlx.models.recompute import recomputed
from agevlm_mlx.quantization import quantize_model
from agevlm_mlx.training import adapters
from agevlm_mlx.training.objective import loss_and_gradients
from agevlm_mlx.training.optim import AdamW
from agevlm_mlx.training.rules import named_parameters, set_trainable
from agevlm_mlx.training.stages import AttentionLoss, LoraSpec, Losses

from .conftest import VOCABULARY, noise_batch

KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
LOSSES = Losses(attention=AttentionLoss(weight=0.3))


@pytest.fixture
def model(tiny_model_config) -> AgeVLM:
    mx.random.seed(3)
    model = AgeVLM(tiny_model_config(VOCABULARY))
    mx.eval(model.parameters())
    return model


def logits(model: AgeVLM) -> np.ndarray:
    pixels = mx.random.normal((1, 16, 16, 3), key=mx.random.key(0))
    return np.array(model(mx.array([[1, 7, 3, 9]]), model.see(pixels)))


def train(model: AgeVLM, steps: int = 3) -> None:
    """Adapters only."""
    names = [f"language_model.{name}" for name in adapters.parameters(model)]
    set_trainable(model, names)
    optimizer = AdamW()
    for step in range(steps):
        params = named_parameters(model, trainable=True)
        _, grads = loss_and_gradients(model, params, noise_batch(step, 2, 2), LOSSES)
        new = optimizer.update(params, grads, 0.02, dict.fromkeys(params, 1.0))
        mx.eval(new, optimizer.state)
        model.load_weights(list(new.items()), strict=False)


@KINDS
def test_adapters_change_nothing_until_they_are_trained_and_then_fuse(model, dora):
    before, names = logits(model), set(named_parameters(model))
    spec = LoraSpec(rank=2, dora=dora)
    adapters.add(model, spec)
    assert (logits(model) == before).all()
    added = {f"language_model.{name}" for name in adapters.parameters(model)}
    per_layer = 3 if dora else 2
    assert len(added) == 3 * 7 * per_layer  # q k v o, gate up down in each layer
    assert all(name.rpartition(".")[2] in ("lora_a", "lora_b", "m") for name in added)
    assert not [name for name in added if "cross_attn" in name or "vision" in name]
    frozen = {k: v for k, v in named_parameters(model).items() if k not in added}
    train(model)
    after = logits(model)
    assert np.abs(after - before).max() > 0.01
    assert all(named_parameters(model)[name] is value for name, value in frozen.items())
    adapters.fuse(model)
    assert set(named_parameters(model)) == names
    assert np.abs(logits(model) - after).max() < 1e-5
    assert not adapters.parameters(model)


@KINDS
def test_untrained_adapters_fuse_to_the_same_weights(model, dora):
    before = {k: np.array(v) for k, v in named_parameters(model).items()}
    adapters.add(model, LoraSpec(dora=dora))
    adapters.fuse(model)
    assert all((np.array(v) == before[k]).all() for k, v in named_parameters(model).items())


@KINDS
def test_a_quantised_layer_is_fused_in_full_precision_and_others_stay(model, dora):
    quantize_model(model, bits=8, group_size=32)
    adapters.add(model, LoraSpec(rank=2, dora=dora, keys=("self_attn.q_proj",), num_layers=2))
    train(model)
    after = logits(model)
    adapters.fuse(model)
    assert np.abs(logits(model) - after).max() < 1e-5
    layers = model.layers
    assert ["scales" in layer.self_attn.q_proj for layer in layers] == [True, False, False]
    assert all("scales" in layer.self_attn.k_proj for layer in layers)


@KINDS
def test_mlx_lm_and_we_load_what_was_saved(model, tiny_model_config, dora, tmp_path: Path):
    spec = LoraSpec(rank=3, scale=7.0, dora=dora, keys=("mlp.up_proj", "self_attn.v_proj"))
    adapters.add(model, spec)
    train(model)
    expected = logits(model)
    adapters.save(tmp_path / "adapter", model, spec)
    for read in (
        lambda other: load_adapters(other.language_model, str(tmp_path / "adapter")),
        lambda other: adapters.load(tmp_path / "adapter", other),
    ):
        mx.random.seed(3)
        other = AgeVLM(tiny_model_config(VOCABULARY))
        assert np.abs(logits(other) - expected).max() > 1e-3
        read(other)
        np.testing.assert_allclose(logits(other), expected, atol=1e-6)
    assert adapters.load(tmp_path / "adapter", fresh(tiny_model_config)).dora is dora


def fresh(tiny_model_config, **fusion) -> AgeVLM:
    return AgeVLM(tiny_model_config(VOCABULARY, **fusion))


def test_the_last_layers_only(model):
    adapters.add(model, LoraSpec(num_layers=1))
    assert {name.split(".")[2] for name in adapters.parameters(model)} == {"2"}


def test_recomputed_layers_give_adapters_the_same_gradients(model):
    adapters.add(model, LoraSpec(rank=2))
    train(model, 1)
    params = named_parameters(model, trainable=True)
    batch = noise_batch(5, 2, 2)
    _, grads = loss_and_gradients(model, params, batch, LOSSES)
    with recomputed(model):
        _, again = loss_and_gradients(model, params, batch, LOSSES)
    for name, grad in grads.items():
        np.testing.assert_allclose(np.array(again[name]), np.array(grad), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": ("self_attn.q_prj",)}, r"did you mean 'self_attn\.q_proj'"),
        ({"keys": ("cross_attn.q_proj",)}, "no linear layer 'cross_attn.q_proj'"),
        ({"num_layers": 4}, "expected at most 3, got 4"),
    ],
)
def test_layers_that_are_not_there(model, changes, message):
    with pytest.raises(UserError, match=message):
        adapters.add(model, LoraSpec(**changes))


def test_adapters_are_not_put_on_adapters(model):
    adapters.add(model, LoraSpec())
    with pytest.raises(UserError, match="already"):
        adapters.add(model, LoraSpec())


def test_folders_that_are_no_adapters_of_this_model(model, tiny_model_config, tmp_path: Path):
    folder = tmp_path / "adapter"
    spec = LoraSpec(rank=2, keys=("self_attn.q_proj",))
    with pytest.raises(UserError, match="found no adapter_config"):
        adapters.load(folder, model)
    adapters.add(model, spec)
    adapters.save(folder, model, spec)
    whole = (folder / adapters.WEIGHTS).read_bytes()
    (folder / adapters.WEIGHTS).write_bytes(whole[:50])
    with pytest.raises(UserError, match=r"adapters\.safetensors: not readable"):
        adapters.load(folder, fresh(tiny_model_config))
    mx.save_safetensors(str(folder / adapters.WEIGHTS), {"other.lora_a": mx.zeros(2)})
    with pytest.raises(UserError, match="0 of 1 tensors fit its 6"):
        adapters.load(folder, fresh(tiny_model_config))
    settings = json.loads((folder / adapters.CONFIG).read_text())
    (folder / adapters.CONFIG).write_text(json.dumps(settings | {"fine_tune_type": "full"}))
    with pytest.raises(UserError, match="expected fine_tune_type lora or dora"):
        adapters.load(folder, fresh(tiny_model_config))
    wrong = settings | {"lora_parameters": {"rank": 2, "alpha": 1.0}}
    (folder / adapters.CONFIG).write_text(json.dumps(wrong))
    with pytest.raises(UserError, match="alpha: unknown key"):
        adapters.load(folder, fresh(tiny_model_config))


def test_dropout_and_training_flag_follow_the_recipe(model):
    adapters.add(model, LoraSpec(dropout=0.5))
    train(model, 1)
    model.train()
    assert (logits(model) != logits(model)).any()
    model.eval()
    assert (logits(model) == logits(model)).all()
