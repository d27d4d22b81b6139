"""The torch SAM teacher against Meta's own code, and `agevlm teach` from end to end."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agevlm_mlx import teach
from agevlm_mlx.data.image import Preprocessor
from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.data.scenes import write_scenes
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam.architecture import EMBEDDED, META, Architecture
from agevlm_mlx.sam.mlx_teacher import MlxTeacher
from agevlm_mlx.sam.store import Store
from agevlm_mlx.sam.targets import mask_iou

torch = pytest.importorskip("torch")

from agevlm_mlx.sam import teacher as sam_teacher  # noqa: E402
from agevlm_mlx.sam.teacher import Teacher, build, decode  # noqa: E402
from agevlm_mlx.sam.torchvision_ops import nms  # noqa: E402

pytestmark = pytest.mark.e2e

SMALL = Architecture(
    image_size=64,
    patch_size=8,
    embed_dim=32,
    depth=2,
    num_heads=2,
    window_size=4,
    global_attn_indexes=(1,),
    out_chans=32,
    decoder_mlp_dim=32,
    decoder_num_heads=2,
    iou_head_hidden_dim=16,
)


@pytest.fixture(autouse=True)
def few_threads():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def meta(monkeypatch) -> Architecture:
    """Stands in for Meta's vit_b, which has 91 M parameters."""
    monkeypatch.setitem(META, "vit_b", SMALL)
    return SMALL


@pytest.fixture
def checkpoint(meta, tmp_path) -> Path:
    """A file like Meta's, with random weights."""
    sam = build(meta)
    # As trained: the masks of different prompts differ, and so do their estimated IoUs.
    for parameter in sam.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save(sam.state_dict(), tmp_path / "sam_vit_b.pth")
    return tmp_path / "sam_vit_b.pth"


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)


def test_one_batch_over_many_images_is_metas_own_forward_of_each(checkpoint):
    teacher = Teacher(checkpoint, device="cpu")
    images = torch.randn(3, 3, 64, 64) * 50 + 100
    prompts = torch.rand(8, 4) * 30 + torch.tensor([0, 0, 30, 30])
    kinds = torch.tensor([True, False, True, True, False, False, True, False])
    owners = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    sam = teacher.sam
    with torch.inference_mode():
        embeddings = sam.image_encoder(torch.stack([sam.preprocess(i) for i in images]))
        logits, iou = decode(sam, embeddings[owners], prompts, kinds)
        for row, (prompt, box, owner) in enumerate(zip(prompts, kinds, owners, strict=True)):
            record = {"image": images[owner], "original_size": (64, 64)}
            if box:
                record["boxes"] = prompt[None]
            else:
                record["point_coords"] = prompt[None, None, :2]
                record["point_labels"] = torch.ones(1, 1)
            for multimask, chosen in ((False, slice(0, 1)), (True, slice(1, 4))):
                (theirs,) = sam([record], multimask_output=multimask)
                ours = logits[row : row + 1, chosen]
                torch.testing.assert_close(ours, theirs["low_res_logits"], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(
                    iou[row : row + 1, chosen], theirs["iou_predictions"], atol=1e-5, rtol=1e-4
                )


@pytest.mark.parametrize("size", [(40, 90), (90, 40), (64, 64), (200, 131), (5, 3)])
def test_masks_of_any_image_are_those_of_metas_predictor(checkpoint, size):
    from segment_anything import SamPredictor  # pyright: ignore[reportMissingImports]

    teacher, image = Teacher(checkpoint, device="cpu"), noise(*size)
    predictor = SamPredictor(teacher.sam)
    predictor.set_image(image)
    height, width = size
    box, point = (1, 0, width - 1, height), (width // 2, height // 3)
    masks, iou = teacher.masks(image, [box, point])
    assert masks.shape == (2, height, width)
    theirs, scores, _ = predictor.predict(box=np.array(box), multimask_output=False)
    assert (masks[0] == theirs[0]).mean() > 0.999
    assert iou[0] == pytest.approx(scores[0], abs=1e-4)
    theirs, scores, _ = predictor.predict(np.array([point]), np.array([1]), multimask_output=True)
    assert (masks[1] == theirs[scores.argmax()]).mean() > 0.999
    assert iou[1] == pytest.approx(scores.max(), abs=1e-4)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (2, 999)])
def test_a_long_thin_picture_is_labelled_as_in_mlx(size):
    torch_teacher, mlx_teacher, image = Teacher(device="cpu"), MlxTeacher(), noise(*size)
    prompts = [(0, 0, size[1], size[0]), (size[1] / 2, size[0] / 2)]
    (one,) = torch_teacher.label([image], [prompts], features=True)
    (other,) = mlx_teacher.label([image], [prompts], features=True)
    assert one.masks.shape == other.masks.shape == (2, *size)
    assert (one.masks == other.masks).mean() > 0.999
    np.testing.assert_allclose(one.iou, other.iou, atol=1e-3)
    assert one.features is not None
    assert other.features is not None
    np.testing.assert_allclose(one.features, other.features, atol=0.01)
    look = torch_teacher.look(image)
    found = look.candidates(np.array([prompts[1]]), min_iou=-9, min_stability=0)
    assert found.masks.shape == (1, *size)


def test_a_batch_of_images_of_many_sizes_gives_each_its_own(checkpoint):
    teacher = Teacher(checkpoint, device="cpu")
    images = [noise(40, 90, 1), noise(64, 64, 2), noise(30, 30, 3)]
    prompts = [[(5, 5, 50, 30), (20, 20)], [], [(3, 3)]]
    together = teacher.label(images, prompts, features=True)
    chunked = teacher.label(images, prompts, features=True, chunk=1)
    for image, group, one, other in zip(images, prompts, together, chunked, strict=True):
        masks, iou = teacher.masks(image, group)
        assert one.masks.shape == (len(group), *image.shape[:2])
        assert (one.masks == masks).mean() > 0.999 if len(group) else True
        assert (one.masks == other.masks).mean() > 0.999 if len(group) else True
        np.testing.assert_allclose(one.iou, iou, atol=1e-5)
        assert one.features is not None
        np.testing.assert_allclose(one.features, teacher.features(image), atol=1e-4)
        assert one.features.shape == (8, 8, 32)


def test_the_model_is_recognised_by_its_weights(checkpoint):
    assert Teacher(checkpoint, device="cpu").architecture == SMALL
    assert Teacher(checkpoint, "vit_b", "cpu").architecture == SMALL
    with pytest.raises(UserError, match="holds vit_b, got --model-type vit_h"):
        Teacher(checkpoint, "vit_h", "cpu")


def test_meta_sizes_are_metas():
    from segment_anything import sam_model_registry  # pyright: ignore[reportMissingImports]

    with torch.device("meta"):
        ours, theirs = build(META["vit_b"]), sam_model_registry["vit_b"]()
    shapes = {name: tuple(t.shape) for name, t in ours.state_dict().items()}
    assert shapes == {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    for name, block in enumerate(ours.image_encoder.blocks):
        assert block.window_size == theirs.image_encoder.blocks[name].window_size


@pytest.mark.parity
def test_a_hugging_face_folder_or_file_gives_its_own_models_masks(tmp_path, monkeypatch):
    import transformers  # pyright: ignore[reportMissingImports]

    sizes = transformers.SamConfig(
        vision_config={
            "hidden_size": 32,
            "output_channels": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 128,
            "num_pos_feats": 16,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 64, "patch_size": 8},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 32,
            "num_attention_heads": 2,
            "iou_head_hidden_dim": 16,
            "layer_norm_eps": 1e-5,  # as these models were trained, not transformers' default
        },
    )
    theirs = transformers.SamModel(sizes).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "hf")
    teacher = Teacher(tmp_path / "hf", device="cpu")
    assert teacher.architecture == replace(SMALL, mlp_ratio=4.0)
    pixels, box = torch.randn(1, 3, 64, 64), torch.tensor([[10.0, 12, 50, 60]])
    with torch.inference_mode():
        expected = theirs(pixel_values=pixels, input_boxes=box[None], multimask_output=False)
        embedding = teacher.sam.image_encoder(pixels)
        logits, iou = decode(teacher.sam, embedding, box, torch.tensor([True]))
    torch.testing.assert_close(logits[:, :1], expected.pred_masks[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(iou[:, :1], expected.iou_scores[0], atol=1e-4, rtol=1e-4)
    monkeypatch.setitem(META, "vit_b", teacher.architecture)
    file = Teacher(tmp_path / "hf/model.safetensors", device="cpu")
    same = zip(file.sam.state_dict().values(), teacher.sam.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_a_look_gives_the_masks_of_the_points(checkpoint):
    teacher, image = Teacher(checkpoint, device="cpu"), noise(40, 90)
    look, points = teacher.look(image), np.array([[20.0, 20.0], [70, 5], [3, 39]])
    np.testing.assert_allclose(look.features, teacher.features(image), atol=1e-5)
    every = look.candidates(points, min_iou=-9, min_stability=0)
    assert every.masks.shape == (9, 40, 90)  # three a point
    masks, iou = teacher.masks(image, points.tolist())
    for number in range(3):
        three = slice(3 * number, 3 * number + 3)
        best = every.iou[three].argmax()
        assert every.iou[three][best] == pytest.approx(iou[number], abs=1e-5)
        assert (every.masks[three][best] == masks[number]).mean() > 0.999
    limit = float(np.median(every.iou))
    some = look.candidates(points, min_iou=limit, min_stability=0)
    assert np.array_equal(some.masks, every.masks[every.iou > limit])
    limit = float(np.median(every.stability))
    some = look.candidates(points, min_iou=-9, min_stability=limit)
    assert np.array_equal(some.masks, every.masks[every.stability >= limit])
    assert look.candidates(points, min_iou=9, min_stability=0).masks.shape == (0, 40, 90)


def test_masks_of_a_large_picture_are_made_one_by_one(checkpoint, monkeypatch):
    teacher, image = Teacher(checkpoint, device="cpu"), noise(40, 90)
    prompts = [(5, 5, 50, 30), (20, 20), (1, 1, 80, 30)]
    together, scores = teacher.masks(image, prompts)
    monkeypatch.setattr(sam_teacher, "_PIXELS", 1)
    made, postprocess = [], teacher.sam.postprocess_masks
    monkeypatch.setattr(
        teacher.sam, "postprocess_masks", lambda m, *a: made.append(len(m)) or postprocess(m, *a)
    )
    alone, others = teacher.masks(image, prompts)
    assert made == [1, 1, 1]
    assert np.array_equal(together, alone)
    np.testing.assert_array_equal(scores, others)


def test_a_large_picture_is_asked_about_in_pieces(checkpoint, monkeypatch):
    teacher, points = Teacher(checkpoint, device="cpu"), np.array([[20.0, 20.0], [70, 5]])
    look = teacher.look(noise(40, 90))
    together = look.candidates(points, min_iou=-9, min_stability=0)
    monkeypatch.setattr(sam_teacher, "_PIXELS", 1)
    alone = look.candidates(points, min_iou=-9, min_stability=0)
    assert np.array_equal(together.masks, alone.masks)
    np.testing.assert_array_equal(together.stability, alone.stability)


class Malicious:
    """Would make a folder when unpickled by a careless reader."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def other_keys(state):
    return {"model": state}


def other_model(state):
    return {f"detector.{name}": value for name, value in state.items()}


def too_wide(state):
    weight = state["image_encoder.patch_embed.proj.weight"]
    return {**state, "image_encoder.patch_embed.proj.weight": torch.cat([weight, weight])}


def one_missing(state):
    return {name: t for name, t in state.items() if name != "mask_decoder.mask_tokens.weight"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (other_keys, r"got \['model'\]; use one of Meta's"),
        (other_model, "got keys like detector"),
        (too_wide, "width 64 and depth 2"),
        (one_missing, r"not the weights of this SAM model: .*mask_tokens"),
    ],
)
def test_a_checkpoint_of_something_else_is_explained(checkpoint, tmp_path, change, says):
    torch.save(change(torch.load(checkpoint, weights_only=True)), tmp_path / "other.pth")
    with pytest.raises(UserError, match=says) as caught:
        Teacher(tmp_path / "other.pth", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_damaged_or_malicious_checkpoint_is_refused(checkpoint, tmp_path):
    (tmp_path / "short.pth").write_bytes(checkpoint.read_bytes()[:5000])
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"state": Malicious(tmp_path / "pwned")}, tmp_path / "evil.pth")
    for name in ("short.pth", "text.safetensors", "evil.pth"):
        with pytest.raises(UserError, match="not a readable checkpoint") as caught:
            Teacher(tmp_path / name, device="cpu")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(UserError, match="no such file"):
        Teacher(tmp_path / "nothing.pth")


def test_a_device_that_is_not_there_is_explained():
    with pytest.raises(UserError, match="not available here; choose from"):
        Teacher(device="tpu")


def test_the_embedded_teacher_is_small_and_segments_nouns_it_never_saw():
    folder = EMBEDDED
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 3_000_000
    about = json.loads((folder / "config.json").read_text())
    assert about["made_by"]["script"] == "scripts/train_teacher.py"
    teacher = Teacher(device="cpu")
    assert teacher.light
    assert teacher.name == "embedded"
    scores: dict[str, list[float]] = {"box": [], "point": []}
    rng = np.random.default_rng(0)
    for i in range(30):
        scene = make_scene(4_000_000, "nouns", i)
        points = []
        for mask in scene.masks:
            rows, columns = np.nonzero(mask)
            chosen = rng.integers(len(rows))
            points.append((columns[chosen], rows[chosen]))
        for kind, prompts in (("box", scene.boxes.tolist()), ("point", points)):
            masks, _ = teacher.masks(scene.image, prompts)
            scores[kind] += mask_iou(masks, scene.masks).tolist()
    assert np.mean(scores["box"]) >= 0.73
    assert np.mean(scores["point"]) >= 0.65


def test_non_maximum_suppression_keeps_the_best_of_each_heap():
    boxes = torch.tensor([[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40], [0, 0, 10, 9.0]])
    scores = torch.tensor([0.5, 0.9, 0.1, 0.6])
    assert nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert nms(boxes, scores, 0.85).tolist() == [1, 3, 2]
    assert nms(boxes, scores, 0.95).tolist() == [1, 3, 0, 2]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_metas_automatic_mask_generator_runs():
    from segment_anything import (  # pyright: ignore[reportMissingImports]
        SamAutomaticMaskGenerator,
    )

    generator = SamAutomaticMaskGenerator(
        Teacher(device="cpu").sam,
        points_per_side=4,
        pred_iou_thresh=-10,
        stability_score_thresh=0.0,
    )
    masks = generator.generate(make_scene(1, "test", 0).image)
    assert masks
    assert masks[0]["segmentation"].shape == (128, 128)


def features(store: Store, key: str) -> np.ndarray:
    read = store.features(key)
    assert read is not None
    return read


def command(data: Path, out: Path, *extra: str) -> list[str]:
    words = ["--data", str(data), "--out", str(out), "--device", "cpu", *extra]
    return [sys.executable, "-m", "agevlm_mlx.teach", *words]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scenes") / "data"
    write_scenes(folder, 96, 5)
    return folder


def test_workers_give_the_labels_of_one_process_and_they_fit_the_true_masks(scenes, tmp_path):
    words = [*command(scenes, tmp_path / "two", "--features", "--limit", "48"), "--workers", "2"]
    run = subprocess.run(
        words, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr
    assert "48 images" in run.stdout
    assert "images 48/48" in run.stderr
    words = command(scenes, tmp_path / "one", "--features", "--limit", "48", "--workers", "1")
    assert teach.main(words[3:]) == 0
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert list(one) == list(two)
    assert one.meta.feature_channels == 96
    for key in one:
        np.testing.assert_allclose(features(one, key), features(two, key), atol=0.02)
        for prompt in one.prompts(key):
            difference = np.abs(one.target(key, prompt) - two.target(key, prompt))
            assert difference.max() < 0.1
    # Against the masks the scenes were painted with.
    overlap = []
    for i, key in enumerate(one):
        scene = make_scene(5, "train", i)
        geometry = Preprocessor().geometry(128, 128)
        for mask, box in zip(scene.masks, scene.boxes, strict=True):
            true = geometry.mask_to_grid(mask, (8, 8))
            found = one.target(key, "box:" + ",".join(str(v) for v in box))
            overlap.append(np.minimum(true, found).sum() / np.maximum(true, found).sum())
    assert np.mean(overlap) > 0.7


@pytest.mark.chaos
def test_kill_9_in_the_middle_and_the_same_command_again(scenes, tmp_path):
    root = Path(__file__).parents[2]
    quick = "import agevlm_mlx.sam.writer as w, sys; w.FLUSH_SECONDS = 0.1\n"
    quick += "from agevlm_mlx.teach import main; sys.exit(main(sys.argv[1:]))"
    words = command(scenes, tmp_path / "killed", "--workers", "1")[3:]
    run = subprocess.Popen([sys.executable, "-c", quick, *words], cwd=root, text=True)
    try:
        deadline = time.monotonic() + 120
        tail = tmp_path / "killed/tail-00000-0.bin"
        while not (tail.exists() and tail.stat().st_size) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait(timeout=30)
    survived = len(Store(tmp_path / "killed"))
    assert 0 < survived < 96
    assert teach.main(words) == 0
    assert teach.main(command(scenes, tmp_path / "whole", "--workers", "1")[3:]) == 0
    killed, whole = Store(tmp_path / "killed"), Store(tmp_path / "whole")
    killed.verify(scenes)
    assert list(killed) == list(whole)
    for key in whole:
        for prompt in whole.prompts(key):
            # Images are batched otherwise after the break: the last bits may differ.
            difference = np.abs(killed.target(key, prompt) - whole.target(key, prompt))
            assert difference.max() < 0.1
