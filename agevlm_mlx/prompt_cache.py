"""A conversation, its images and its prompt cache as one safetensors file.

The tensors are those of mlx-lm's ``save_prompt_cache``; the file's metadata also says which
checkpoint made them and what they have read, so that another checkpoint refuses them.
"""

import json
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from . import atomic
from .conversation import Conversation
from .errors import UserError, one_line
from .weights import Loaded, fingerprint

#: Changes when files can no longer be read by what wrote them before.
FORMAT = "agevlm-prompt-cache-1"


def save(path: Path, conversation: Conversation) -> None:
    """Write what has been said, shown and read; whole or not at all.

    ``UserError`` before the first answer, and with a draft model, whose cache mlx-lm's file has
    no place for.
    """
    model = conversation.loaded.model
    if not conversation.cache:
        raise UserError(f"{path}: expected a conversation with an answer, nothing was asked yet")
    if len(conversation.cache) != len(model.layers):
        raise UserError(f"{path}: the cache of a draft model cannot be saved; use none")
    about = {
        "format": FORMAT,
        "model": fingerprint(conversation.loaded.path),
        **conversation.describe(),
    }
    metadata = {name: json.dumps(value) for name, value in about.items()}

    def write(name: Path) -> None:
        try:
            save_prompt_cache(str(name), conversation.cache, metadata)
        except RuntimeError as error:  # MLX says no more than that it could not
            raise UserError(
                f"{path}: could not be written ({one_line(error)}); is the disk full?"
            ) from None

    atomic.write_file(path, write)


def load(path: Path, loaded: Loaded, **options: Any) -> Conversation:
    """The conversation of a file that `save` wrote; it goes on exactly where it was.

    options: those of `Conversation`. ``UserError`` for what is no such file, is damaged, or was
    made by another checkpoint.
    """
    if options.get("draft_model") is not None:
        raise UserError(f"{path}: the file holds no cache of a draft model; use none")
    try:
        found = path.is_file()
    except OSError:  # a name too long
        found = False
    if not found:
        raise UserError(f"{path}: no such file; make one with --save-prompt-cache")
    try:
        cache, metadata = load_prompt_cache(str(path), return_metadata=True)
        about = {name: json.loads(value) for name, value in metadata.items()}
        kind, made_by = about.pop("format"), about.pop("model")
    except Exception as error:  # whatever mlx-lm makes of a damaged or foreign file
        raise UserError(
            f"{path}: not a prompt cache that agevlm saved, or damaged: {one_line(error)}"
        ) from None
    if kind != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, got {kind}; make the file again")
    own = fingerprint(loaded.path)
    if made_by != own:
        raise UserError(
            f"{path}: made by another checkpoint: expected {own}, got {made_by}; use the model "
            "that made it, or make the file again"
        )
    conversation = Conversation(loaded, **options)
    try:
        conversation.restore(cache, about)
    except Exception as error:  # whatever a file made by hand leads to
        raise UserError(f"{path}: damaged prompt cache: {one_line(error)}") from None
    size, bits = options.get("max_kv_size"), options.get("kv_bits")
    if size is not None and size != about["max_kv_size"]:
        raise UserError(f"{path}: made with max_kv_size {about['max_kv_size']}, got {size}")
    if bits and any(getattr(entry, "bits", bits) != bits for entry in cache):
        raise UserError(f"{path}: its cache has been quantised in other than {bits} bits")
    return conversation
