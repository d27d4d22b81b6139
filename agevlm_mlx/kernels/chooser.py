"""Which of the two forms of an operation runs: the Metal kernel or its plain-MLX twin."""

import os

import mlx.core as mx

from ..errors import UserError

#: Environment variable: "off" forces the twins; "on", "auto" and unset let the device decide.
VARIABLE = "AGEVLM_KERNELS"
#: The types that the kernels are written for.
DTYPES = (mx.float32, mx.float16, mx.bfloat16)


def wanted() -> bool:
    """True if kernels may run here: Metal is the default device and nobody said "off"."""
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "on", "auto", "off"):
        raise UserError(
            f"expected {VARIABLE} to be on, off or auto, got {value!r}; unset it to let the "
            "device decide"
        )
    if value == "off":
        return False
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def eligible(q: mx.array, keys: mx.array) -> bool:
    """True if the kernels can read queries [B N ... H] and keys [B K S H] of this shape."""
    K, S, H = keys.shape[1:]
    return (
        q.dtype == keys.dtype
        and q.dtype in DTYPES
        and H in (32, 64, 96, 128)
        and q.shape[1] % K == 0
        and min(q.size, keys.size) > 0
        and S * H < 2**31  # positions inside one head are 32-bit numbers
    )
