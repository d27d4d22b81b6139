"""CLIP's ConvNeXt, as timm publishes the trunk and open_clip the two towers."""

from collections.abc import Mapping
from typing import Any

from agevlm_mlx.errors import UserError
from agevlm_mlx.models.tensors import Rule, channels_last

_LARGE = {"depths": (3, 3, 27, 3), "hidden_sizes": (192, 384, 768, 1536)}
_TEST = {"layer_norm_eps": 1e-5, "hidden_act": "gelu_pytorch_tanh"}
#: timm's architectures -> our ``vision_config``. Depths and widths could be read off the
#: tensors instead, but not what else a name stands for: convnext_xxlarge has another epsilon
#: than the rest, which no shape shows, and a wrong one changes every token a little. So the
#: name decides, as in timm, and `check_shapes` says when the tensors are another model's. The
#: ones called test are the very small models of timm's own tests, which it publishes too.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"depths": (3, 3, 9, 3), "hidden_sizes": (96, 192, 384, 768)},
    "convnext_small": {"depths": (3, 3, 27, 3), "hidden_sizes": (96, 192, 384, 768)},
    "convnext_base": {"depths": (3, 3, 27, 3), "hidden_sizes": (128, 256, 512, 1024)},
    "convnext_large": _LARGE,
    "convnext_large_mlp": _LARGE,  # the same trunk under another head
    "convnext_xlarge": {"depths": (3, 3, 27, 3), "hidden_sizes": (256, 512, 1024, 2048)},
    "convnext_xxlarge": {
        "depths": (3, 4, 30, 3),
        "hidden_sizes": (384, 768, 1536, 3072),
        "layer_norm_eps": 1e-5,
    },
    "test_convnext": _TEST | {"depths": (1, 2, 4, 2), "hidden_sizes": (24, 32, 48, 64)},
    "test_convnext2": _TEST | {"depths": (1, 1, 1, 1), "hidden_sizes": (32, 64, 96, 128)},
}
#: timm's ``model_args``, which override what an architecture's name stands for -> our field.
_MODEL_ARGS = {
    "depths": "depths",
    "dims": "hidden_sizes",
    "norm_eps": "layer_norm_eps",
    "act_layer": "hidden_act",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
#: ``model_args`` that only the head or training reads. (Without ls_init_value a trunk has no
#: layer scale; then those tensors are missing, which is an error of its own.)
_NOT_THE_TRUNK = {
    "num_classes",
    "global_pool",
    "head_init_scale",
    "head_hidden_size",
    "drop_rate",
    "drop_path_rate",
    "ls_init_value",
}
#: ``model_args`` that would make another trunk -> the values that make this one.
_FIXED: dict[str, tuple[Any, ...]] = {
    "in_chans": (3,),
    "output_stride": (32,),
    "kernel_sizes": (7, [7, 7, 7, 7]),
    "stem_type": ("patch",),
    "patch_size": (4,),
    "head_norm_first": (False,),
    "conv_mlp": (False,),
    "conv_bias": (True,),
    "use_grn": (False,),
    "norm_layer": (None, "layernorm"),
}


def timm_config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our ``vision_config`` of timm's config.json."""
    ours = _architecture(table.get("architecture"), f"{where}: architecture")
    # Older files hold the pretrained_cfg's entries without a table around them.
    trained = _table(table.get("pretrained_cfg", table), f"{where}: pretrained_cfg")
    size = trained.get("input_size")
    ours["image_size"] = _side(
        size[1:] if isinstance(size, list) else size, f"{where}: pretrained_cfg.input_size"
    )
    for name, value in _table(table.get("model_args", {}), f"{where}: model_args").items():
        if name in _MODEL_ARGS:
            if name == "act_layer":
                value = _ACTIVATIONS.get(str(value), value)
            ours[_MODEL_ARGS[name]] = value
        elif name not in _NOT_THE_TRUNK and value not in _FIXED.get(name, ()):
            expected = " or ".join(map(repr, _FIXED.get(name, ()))) or "nothing of that name"
            raise UserError(
                f"{where}: model_args.{name}: expected {expected}, got {value!r}; "
                "only the trunk that CLIP uses can be converted"
            )
    return ours


def open_clip_config(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Our ``vision_config`` of open_clip_config.json, which names one of timm's models and,
    unlike timm's own file, has no place for overrides."""
    table = _table(table, where)
    model = _table(table.get("model_cfg", table), f"{where}: model_cfg")
    vision = _table(model.get("vision_cfg"), f"{where}: vision_cfg")
    if "timm_model_name" not in vision:
        raise UserError(
            f"{where}: vision_cfg: expected a timm_model_name (a ConvNeXt), found a tower of "
            "open_clip's own; take a repository with Hugging Face's config.json for it"
        )
    ours = _architecture(vision["timm_model_name"], f"{where}: vision_cfg.timm_model_name")
    return ours | {"image_size": _side(vision.get("image_size"), f"{where}: vision_cfg.image_size")}


def _table(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: expected a table, got {value!r}")
    return value


def _architecture(name: Any, where: str) -> dict[str, Any]:
    """What a name stands for. A tag after a dot names weights, not another architecture."""
    known = ARCHITECTURES.get(name.partition(".")[0]) if isinstance(name, str) else None
    if known is None:
        raise UserError(f"{where}: expected {' or '.join(ARCHITECTURES)}; got {name!r}")
    return dict(known)


def _side(size: Any, where: str) -> int:
    """A square's side, given as one number or as height and width."""
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or height != width:
        raise UserError(f"{where}: expected a square size in pixels, got {size!r}")
    return height


def rules(config: Mapping[str, Any]) -> tuple[Rule, ...]:
    """One list for both: timm's CLIP repositories hold an open_clip_config.json as well, so
    that open_clip's configuration may come with the trunk's tensors alone."""
    trunk = r"(?:visual\.trunk\.)?"
    stage = rf"{trunk}stages\.(\d+)"
    block = rf"{stage}\.blocks\.(\d+)"
    layer = r"encoder.stages.\1.layers.\2"
    return (
        Rule(rf"{trunk}stem\.0\.weight", "embeddings.patch_embeddings.weight", channels_last),
        Rule(rf"{trunk}stem\.0\.bias", "embeddings.patch_embeddings.bias"),
        Rule(rf"{trunk}stem\.1\.(weight|bias)", r"embeddings.layernorm.\1"),
        Rule(
            rf"{stage}\.downsample\.(0\.weight|[01]\.bias)",
            r"encoder.stages.\1.downsampling_layer.\2",
        ),
        Rule(
            rf"{stage}\.downsample\.1\.weight",
            r"encoder.stages.\1.downsampling_layer.1.weight",
            channels_last,
        ),
        Rule(rf"{block}\.conv_dw\.weight", rf"{layer}.dwconv.weight", channels_last),
        Rule(rf"{block}\.conv_dw\.bias", rf"{layer}.dwconv.bias"),
        Rule(rf"{block}\.norm\.(weight|bias)", rf"{layer}.layernorm.\3"),
        Rule(rf"{block}\.mlp\.fc([12])\.(weight|bias)", rf"{layer}.pwconv\3.\4"),
        Rule(rf"{block}\.gamma", rf"{layer}.layer_scale_parameter"),
        Rule(rf"{trunk}head\..+", drop="pooling head"),
        Rule(r"visual\.head\..+", drop="image projection"),
        Rule(
            r"(?:text|transformer|ln_final)\..+|token_embedding\.weight|positional_embedding|"
            r"text_projection|attn_mask|logit_(?:scale|bias)",
            drop="text tower",
        ),
    )
