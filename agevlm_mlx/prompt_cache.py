"""A conversation, its images and its prompt cache as one safetensors file.

The tensors are those of mlx-lm's ``save_prompt_cache``; the file's metadata also says which
checkpoint made them and what they have read, so that another checkpoint refuses them.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from .atomic import TEMPORARY
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
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY, suffix=".safetensors")
    os.close(handle)
    try:
        save_prompt_cache(name, conversation.cache, metadata)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(path: Path, loaded: Loaded, **options: Any) -> Conversation:
    """The conversation of a file that `save` wrote; it goes on exactly where it was.

    options: those of `Conversation`. ``UserError`` for what is no such file, is damaged, or was
    made by another checkpoint.
    """
    if not path.is_file():
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
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, UserError) as error:
        raise UserError(f"{path}: damaged prompt cache: {one_line(error)}") from None
    return conversation
