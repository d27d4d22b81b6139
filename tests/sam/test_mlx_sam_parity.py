"""The SAM in MLX against Meta's `segment_anything` and transformers' SamModel: random weights, and
those of the shipped teacher."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.sam import architecture
from agevlm_mlx.sam.architecture import Architecture
from agevlm_mlx.sam.mlx_teacher import MlxTeacher

pytestmark = pytest.mark.parity

LOGITS, IOU, FEATURES = 1e-3, 1e-4, 1e-3
#: Windows that do not divide the grid, so that the last of a row and a column are padded.
TINY = Architecture(
    image_size=112,
    patch_size=16,
    embed_dim=32,
    depth=3,
    num_heads=4,
    window_size=3,
    global_attn_indexes=(1,),
    out_chans=32,
    mask_in_chans=8,
    decoder_mlp_dim=40,
    decoder_num_heads=2,
    iou_head_hidden_dim=24,
)
#: vit_b's input, embedding and decoder, behind two layers of its encoder's twelve.
SHALLOW = Architecture(embed_dim=96, depth=2, num_heads=2, global_attn_indexes=(1,))
SIZES = {"tiny": TINY, "large": SHALLOW}


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def sizes(request, monkeypatch) -> Architecture:
    """Takes the place of vit_b's."""
    chosen = SIZES[request.param]
    monkeypatch.setitem(architecture.META, "vit_b", chosen)
    return chosen


@pytest.fixture
def checkpoint(sizes, randomise, tmp_path) -> Path:
    """A file like Meta's, with random weights that make logits of both signs, beyond -1 and 1."""
    import torch

    from agevlm_mlx.sam.teacher import build

    torch.manual_seed(0)
    sam = randomise(build(sizes))
    if sizes is TINY:
        for parameter in sam.mask_decoder.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    return tmp_path / "sam_vit_b.pth"


def picture(height: int, width: int) -> np.ndarray:
    """Blobs, not noise: what resizing leaves of it is a picture still."""
    rng = np.random.default_rng(height)
    coarse = rng.uniform(0, 255, (height // 8 + 2, width // 8 + 2, 3))
    return np.kron(coarse, np.ones((8, 8, 1)))[:height, :width].astype(np.uint8)


def prompts(height: int, width: int, count: int) -> list[tuple[float, ...]]:
    """Boxes and points in turn."""
    rng = np.random.default_rng(count)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
    return [tuple(c.ravel() if i % 2 else c[0]) for i, c in enumerate(corners)]


def torch_masks(teacher: Any, image: np.ndarray, asked: list) -> tuple[Any, ...]:
    """Meta's own forward of one image, a prompt at a time: embedding [Gs Gs C], logits of all four
    masks in the picture's size [n 4 h w], their IoUs [n 4]."""
    import torch
    from segment_anything.utils.transforms import (  # pyright: ignore[reportMissingImports]
        ResizeLongestSide,
    )

    sam, size = teacher.sam, image.shape[:2]
    resize = ResizeLongestSide(sam.image_encoder.img_size)
    resized = resize.apply_image(image)
    with torch.inference_mode():
        pixels = sam.preprocess(torch.from_numpy(resized).permute(2, 0, 1))[None]
        embedding = sam.image_encoder(pixels)
        logits, iou = [], []
        for prompt in asked:
            moved = resize.apply_coords(np.array(prompt).reshape(-1, 2), size)
            place = torch.tensor(moved, dtype=torch.float32)
            box = place.reshape(1, 4) if len(prompt) == 4 else None
            point = None if len(prompt) == 4 else (place[None], torch.ones(1, 1))
            sparse, dense = sam.prompt_encoder(points=point, boxes=box, masks=None)
            places = sam.prompt_encoder.get_dense_pe()
            masks, scores = sam.mask_decoder.predict_masks(embedding, places, sparse, dense)
            logits.append(sam.postprocess_masks(masks, resized.shape[:2], size)[0])
            iou.append(scores[0])
    stacked = (torch.stack(part).numpy() for part in (logits, iou))
    return embedding[0].permute(1, 2, 0).numpy(), *stacked


def mlx_masks(teacher: MlxTeacher, image: np.ndarray, asked: list) -> tuple[Any, ...]:
    """The same of ours, all prompts at once."""
    from agevlm_mlx.sam.mlx_teacher import input_row

    look = teacher.look(image)
    rows = mx.array(np.stack([input_row(look.geometry, prompt) for prompt in asked]))
    boxes = mx.array([len(prompt) == 4 for prompt in asked])
    logits, iou = teacher.sam.masks(look.embedding, rows, boxes)
    full = [[teacher.full_size(mask, look.geometry) for mask in four] for four in logits]
    return look.features, np.array([[np.array(m) for m in four] for four in full]), np.array(iou)


@pytest.mark.parametrize(
    ("sizes", "size"),
    [("tiny", (150, 260)), ("tiny", (90, 64)), ("tiny", (40, 40)), ("large", (150, 260))],
    indirect=["sizes"],
)
def test_every_mask_of_every_prompt_is_metas(sizes, checkpoint, size, parity):
    from agevlm_mlx.sam.teacher import Teacher

    image, asked = picture(*size), prompts(size[0], size[1], 6)
    theirs, ours = Teacher(checkpoint, device="cpu"), MlxTeacher(checkpoint)
    assert ours.architecture == sizes
    assert ours.fingerprint == theirs.fingerprint
    wanted, got = torch_masks(theirs, image, asked), mlx_masks(ours, image, asked)
    name, case = "segment_anything", f"{sizes.image_size} px, picture of {size[1]}x{size[0]}"
    for what, w, g, bound in zip(
        ("embedding", "logits", "IoU"), wanted, got, (FEATURES, LOGITS, IOU), strict=True
    ):
        assert w.shape == g.shape
        assert w.std() > 0.5  # else everything would be near everything
        parity("SAM's masks", name, f"{what}, {case}", float(np.abs(w - g).max()), bound)
    differing = float(((wanted[1] > 0) != (got[1] > 0)).mean())
    parity("SAM's masks", name, f"pixels of masks, {case}", differing, 1e-4)


@pytest.mark.parametrize("sizes", ["tiny"], indirect=True)
def test_labels_of_a_batch_are_the_torch_teachers(sizes, checkpoint, parity):
    from agevlm_mlx.sam.teacher import Teacher

    theirs, ours = Teacher(checkpoint, device="cpu"), MlxTeacher(checkpoint)
    images = [picture(60, 90), picture(64, 64), picture(133, 51)]
    asked = [prompts(60, 90, 5), [], prompts(133, 51, 1)]
    wanted = theirs.label(images, asked, features=True)
    differing = 0.0
    for got in (ours.label(images, asked, features=True), ours.label(images, asked, chunk=2)):
        for one, other, image in zip(got, wanted, images, strict=True):
            assert one.masks.shape == other.masks.shape
            assert one.masks.shape[1:] == image.shape[:2]
            assert one.masks.dtype == other.masks.dtype == bool
            assert one.iou.dtype == other.iou.dtype
            np.testing.assert_allclose(one.iou, other.iou, atol=IOU)
            if one.masks.size:
                differing = max(differing, float((one.masks != other.masks).mean()))
            if one.features is not None and other.features is not None:
                np.testing.assert_allclose(one.features, other.features, atol=FEATURES)
    parity("SAM's masks", "segment_anything", "pixels of masks, a batch", differing, 1e-4)
    assert {ours.batch_size, ours.feature_channels} == {theirs.batch_size, theirs.feature_channels}
    masks, iou = ours.masks(images[0], asked[0])
    np.testing.assert_allclose(iou, wanted[0].iou, atol=IOU)
    assert (masks == wanted[0].masks).mean() > 0.999


@pytest.mark.parametrize("sizes", ["tiny"], indirect=True)
def test_candidates_are_the_torch_teachers(sizes, checkpoint):
    from agevlm_mlx.sam.teacher import Teacher

    def between(values: np.ndarray) -> float:
        """A limit that half of them keep, not near any of them."""
        return float(np.sort(values)[6:8].mean())

    image = picture(60, 90)
    points = np.random.default_rng(0).uniform(0, 1, (5, 2)) * (90, 60)
    theirs = Teacher(checkpoint, device="cpu").look(image)
    ours = MlxTeacher(checkpoint).look(image)
    everything = theirs.candidates(points, min_iou=-1e3, min_stability=0)
    assert len(everything.masks) == 15
    for limits in (
        {"min_iou": -1e3, "min_stability": 0.0},
        {"min_iou": between(everything.iou), "min_stability": 0.0},
        {"min_iou": -1e3, "min_stability": between(everything.stability)},
    ):
        wanted, got = (look.candidates(points, **limits) for look in (theirs, ours))
        assert got.masks.shape == wanted.masks.shape
        assert len(got.masks) > 0
        np.testing.assert_allclose(got.iou, wanted.iou, atol=IOU)
        np.testing.assert_allclose(got.stability, wanted.stability, atol=1e-3)
        assert (got.masks == wanted.masks).mean() > 0.9999


def test_the_shipped_teacher_sees_the_same_masks(parity):
    from agevlm_mlx.sam.teacher import Teacher

    theirs, ours = Teacher(device="cpu"), MlxTeacher()
    assert ours.fingerprint == theirs.fingerprint
    wrong = count = 0
    iou = 0.0
    for i in range(30):
        scene = make_scene(4_000_000, "nouns", i)
        middles = [((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in scene.boxes.tolist()]
        image = scene.image[: 128 - i]  # not square
        asked = [*map(tuple, scene.boxes.tolist()), *middles]
        (one,), (other,) = ours.label([image], [asked]), theirs.label([image], [asked])
        wrong, count = wrong + int((one.masks != other.masks).sum()), count + one.masks.size
        iou = max(iou, float(np.abs(one.iou - other.iou).max()))
    name = "segment_anything, the shipped teacher"
    parity("SAM's masks", name, "pixels of masks, 30 scenes", wrong / count, 1e-5)
    parity("SAM's masks", name, "IoU, 30 scenes", iou, IOU)


@pytest.mark.parametrize("side", [128, 1024])
def test_hugging_faces_model(transformers, randomise, side, parity, tmp_path):
    import torch

    width = 256 if side == 1024 else 32
    decoder = {} if side == 1024 else {"mlp_dim": 40, "num_attention_heads": 2}
    decoder |= {} if side == 1024 else {"iou_head_hidden_dim": 24}
    # transformers' own default, 1e-6, is not what these models were trained with.
    config = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_dim": 80,
            "window_size": 5,
            "global_attn_indexes": [0],
            "output_channels": width,
            "num_pos_feats": width // 2,
            "image_size": side,
            "patch_size": 16,
        },
        prompt_encoder_config={"hidden_size": width, "image_size": side, "patch_size": 16},
        mask_decoder_config={"hidden_size": width, "layer_norm_eps": 1e-5, **decoder},
    )
    torch.manual_seed(0)
    model = randomise(transformers.SamModel(config))
    model.save_pretrained(tmp_path / "hf")
    processor = transformers.SamImageProcessorPil(
        size={"longest_edge": side}, pad_size={"height": side, "width": side}
    )
    image = picture(90, 140)
    boxes = [p for p in prompts(90, 140, 6) if len(p) == 4]
    inputs = processor(image, return_tensors="pt")
    down, across = inputs["reshaped_input_sizes"][0] / inputs["original_sizes"][0]
    moved = torch.tensor(boxes)[None] * torch.stack([across, down, across, down])
    with torch.no_grad():
        embedding = model.get_image_embeddings(inputs["pixel_values"])
        shown = {"input_boxes": moved, "multimask_output": False}
        of_boxes = model(image_embeddings=embedding, **shown)
    ours = MlxTeacher(tmp_path / "hf")
    features, logits, iou = mlx_masks(ours, image, boxes)
    case = f"{side} px"
    error = np.abs(features - embedding[0].permute(1, 2, 0).numpy()).max()
    parity("SAM's masks", "transformers.SamModel", f"embedding, {case}", float(error), FEATURES)
    (full,) = processor.post_process_masks(
        of_boxes.pred_masks,
        inputs["original_sizes"],
        inputs["reshaped_input_sizes"],
        binarize=False,
    )
    error = np.abs(logits[:, :1] - full.numpy()).max()
    parity("SAM's masks", "transformers.SamModel", f"logits, {case}", float(error), LOGITS)
    error = np.abs(iou[:, 0] - of_boxes.iou_scores[0, :, 0].numpy()).max()
    parity("SAM's masks", "transformers.SamModel", f"IoU, {case}", float(error), IOU)
