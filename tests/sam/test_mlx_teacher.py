"""The SAM teacher in MLX without torch: its checkpoints, and what it answers."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from agevlm_mlx.data.painting import make_scene
from agevlm_mlx.errors import UserError
from agevlm_mlx.sam import architecture, names
from agevlm_mlx.sam.architecture import CONFIG, EMBEDDED, WEIGHTS, Architecture
from agevlm_mlx.sam.mlx_teacher import MlxTeacher, upsampling
from agevlm_mlx.sam.targets import mask_iou

META_FILE = EMBEDDED / WEIGHTS
#: The embedded teacher's sizes as Hugging Face would write them.
HUGGING_FACE = {
    "model_type": "sam",
    "vision_config": {
        "image_size": 128,
        "patch_size": 8,
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "mlp_dim": 384,
        "window_size": 8,
        "global_attn_indexes": [1, 3],
        "output_channels": 96,
    },
    "prompt_encoder_config": {"mask_input_channels": 16},
    "mask_decoder_config": {"mlp_dim": 256, "num_attention_heads": 4, "iou_head_hidden_dim": 96},
}


@pytest.fixture(scope="module")
def teacher() -> MlxTeacher:
    return MlxTeacher()


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    """The embedded teacher as a SamModel folder."""
    folder = tmp_path / "hf"
    folder.mkdir()
    tensors = names.as_hugging_face(mx.load(str(META_FILE)), "here")
    mx.save_safetensors(str(folder / WEIGHTS), tensors)
    (folder / CONFIG).write_text(json.dumps(HUGGING_FACE))
    return folder


def scene(number: int = 0) -> tuple[np.ndarray, list[tuple[float, ...]]]:
    """A picture that is wider than high, and a box and a point in it."""
    made = make_scene(4_000_000, "nouns", number)
    x0, y0, x1, y1 = made.boxes.tolist()[0]
    return made.image[:100], [(x0, y0, x1, y1), ((x0 + x1) / 2, (y0 + y1) / 2)]


def test_it_segments_what_it_is_shown(teacher):
    found = []
    for i in range(10):
        made = make_scene(4_000_000, "nouns", i)
        masks, iou = teacher.masks(made.image, made.boxes.tolist())
        assert masks.shape == made.masks.shape
        assert masks.dtype == bool
        assert iou.shape == (len(masks),)
        found += mask_iou(masks, made.masks).tolist()
    assert np.mean(found) >= 0.73


def test_what_a_store_asks_of_it(teacher):
    assert teacher.fingerprint == hashlib.sha256(META_FILE.read_bytes()).hexdigest()
    assert teacher.name == "embedded"
    assert teacher.feature_channels == 96
    assert teacher.batch_size == 8
    assert teacher.light == (mx.default_device() == mx.cpu)
    image, _ = scene()
    features = teacher.features(image)
    assert features.shape == (16, 16, 96)
    assert features.dtype == np.float32
    (nothing,) = teacher.label([image], [[]])
    assert nothing.masks.shape == (0, *image.shape[:2])
    assert nothing.iou.shape == (0,)
    assert nothing.features is None


def test_each_image_of_a_batch_gets_its_own(teacher):
    scenes = [scene(i) for i in range(3)]
    images, asked = [image for image, _ in scenes], [prompts for _, prompts in scenes]
    images[1], asked[1] = images[1][:40, :70], []
    for chunk in (1, 3, 32):
        for image, prompts, one in zip(
            images, asked, teacher.label(images, asked, features=True, chunk=chunk), strict=True
        ):
            masks, iou = teacher.masks(image, prompts)
            assert (one.masks == masks).mean() > 0.999 if prompts else one.masks.shape[0] == 0
            np.testing.assert_allclose(one.iou, iou, atol=1e-5)
            np.testing.assert_allclose(one.features, teacher.features(image), atol=1e-4)


def test_a_point_takes_the_best_of_three_masks_where_they_were_learnt(hugging_face, teacher):
    # The embedded teacher learnt one mask only; as a SamModel it is taken for one of Meta's.
    other = MlxTeacher(hugging_face)
    image, (box, point) = scene()
    np.testing.assert_array_equal(other.features(image), teacher.features(image))
    for mine, theirs in zip(other.masks(image, [box]), teacher.masks(image, [box]), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    masks, iou = other.masks(image, [point])
    three = other.look(image).candidates(np.array([point]), min_iou=-9, min_stability=0)
    best = three.iou.argmax()
    assert len(three.masks) == 3
    assert iou[0] == pytest.approx(three.iou[best])
    np.testing.assert_array_equal(masks[0], three.masks[best])
    assert (
        len(teacher.look(image).candidates(np.array([point]), min_iou=-9, min_stability=0).iou) == 1
    )


def test_candidates_are_those_that_look_good(teacher):
    image, _ = scene()
    look = teacher.look(image)
    points = np.random.default_rng(0).uniform(0, 100, (12, 2))
    everything = look.candidates(points, min_iou=-9, min_stability=0)
    assert len(everything.masks) == 12
    iou, stability = np.median(everything.iou), np.median(everything.stability)
    chosen = (everything.iou > iou) & (everything.stability >= stability)
    some = look.candidates(points, min_iou=float(iou), min_stability=float(stability))
    assert 0 < chosen.sum() < 12
    np.testing.assert_array_equal(some.masks, everything.masks[chosen])
    np.testing.assert_allclose(some.stability, everything.stability[chosen], rtol=1e-6)
    none = look.candidates(points, min_iou=9, min_stability=0)
    assert none.masks.shape == (0, *image.shape[:2])
    assert none.iou.shape == none.stability.shape == (0,)
    laxer = look.candidates(points, min_iou=-9, min_stability=0, offset=3.0)
    assert (laxer.stability <= everything.stability + 1e-6).all()
    assert laxer.stability.sum() < everything.stability.sum()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_changes_few_pixels(teacher, dtype):
    image, prompts = scene()
    half = MlxTeacher(dtype=dtype)
    wanted = teacher.label([image], [prompts], features=True)[0]
    got = half.label([image], [prompts], features=True)[0]
    assert half.fingerprint == teacher.fingerprint
    assert half.sam.mask_decoder.iou_token.weight.dtype == getattr(mx, dtype)
    assert half.sam.prompt_encoder.shared_embedding.positional_embedding.dtype == mx.float32
    assert got.features.dtype == np.float32
    assert 0 < np.abs(got.features - wanted.features).max() < 0.2
    assert (got.masks == wanted.masks).mean() > 0.99


def test_stretching_cuts_the_padding_off():
    # 4 values over 8 px of which 4 show a picture of 4 px: the first two values and between.
    got = np.array(upsampling(4, 8, 4, 4)) @ np.array([0.0, 1.0, 2.0, 3.0])
    np.testing.assert_allclose(got, [0, 0.25, 0.75, 1.25], atol=1e-6)
    np.testing.assert_allclose(np.array(upsampling(4, 8, 5, 9)).sum(1), 1, atol=1e-6)


def test_names_go_to_hugging_face_and_back():
    keys = {key: key for key in mx.load(str(META_FILE))}
    theirs = names.as_hugging_face(keys, "here")
    assert "vision_encoder.layers.3.layer_norm2.weight" in theirs
    assert names.as_meta(theirs, "here") == keys
    tied = "prompt_encoder.shared_embedding.positional_embedding"
    shared = theirs.pop("shared_image_embedding.positional_embedding")
    assert names.as_meta(theirs | {tied: shared}, "here") == keys
    both = theirs | {"shared_image_embedding.positional_embedding": shared, tied: "a copy"}
    assert names.as_meta(both, "here") == keys
    with pytest.raises(UserError, match=r"here: text_encoder\.x is no tensor of SAM's"):
        names.as_hugging_face({"text_encoder.x": 1}, "here")


def test_metas_files_are_known_by_their_sizes(monkeypatch, tmp_path, hugging_face):
    file = shutil.copy(META_FILE, tmp_path / "sam_vit_b.safetensors")
    with pytest.raises(UserError, match="an encoder of width 96 and depth 4; use one of Meta's"):
        MlxTeacher(file)
    table = json.loads((EMBEDDED / CONFIG).read_text())["architecture"]
    own = Architecture(**table | {"global_attn_indexes": (1, 3), "multimask": True})
    monkeypatch.setitem(architecture.META, "vit_b", own)
    assert MlxTeacher(file).architecture == MlxTeacher(file, "vit_b").architecture == own
    assert MlxTeacher(hugging_face / WEIGHTS).architecture == own  # their names, no config
    with pytest.raises(UserError, match="holds vit_b, got --model-type vit_h; pass vit_b"):
        MlxTeacher(file, "vit_h")


@pytest.mark.parametrize(
    "change",
    [
        {"mlp_ratio": 1e9},
        {"mlp_ratio": -1.0},
        {"mlp_ratio": float("nan")},
        {"window_size": -3},
        {"global_attn_indexes": (99,)},
        {"global_attn_indexes": (-1,)},
    ],
)
def test_sizes_out_of_range(change):
    with pytest.raises(UserError, match="sizes out of range"):
        Architecture(**change)


def test_what_it_is_not_made_from(tmp_path, hugging_face):
    def refusal(checkpoint: Path, model_type: str | None = None) -> str:
        with pytest.raises(UserError) as caught:
            MlxTeacher(checkpoint, model_type)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "nothing.pth: no such file" in refusal(tmp_path / "nothing.pth")
    (tmp_path / "empty").mkdir()
    assert "model.safetensors: no such file" in refusal(tmp_path / "empty")
    (tmp_path / "text.pth").write_text("hello")
    assert "text.pth: expected a checkpoint of PyTorch" in refusal(tmp_path / "text.pth")
    (tmp_path / "text.safetensors").write_text("hello")
    assert "not a readable checkpoint" in refusal(tmp_path / "text.safetensors")
    other = tmp_path / "other.safetensors"
    mx.save_safetensors(str(other), {"weight": mx.zeros(3)})
    assert "expected the weights of segment_anything, got keys like weight" in refusal(other)

    assert "holds a model of other sizes, got --model-type vit_b" in refusal(hugging_face, "vit_b")

    def configured(**changes) -> str:
        (hugging_face / CONFIG).write_text(json.dumps(HUGGING_FACE | changes))
        return refusal(hugging_face)

    vision = HUGGING_FACE["vision_config"]
    assert "expected a teacher made by" in configured(model_type="clip")
    assert "use_rel_pos: expected True" in configured(vision_config=vision | {"use_rel_pos": False})
    assert "must be a multiple of patch_size" in configured(
        vision_config=vision | {"image_size": 127}
    )
    assert "sizes out of range" in configured(vision_config=vision | {"hidden_size": 10**9})
    assert "expected int" in configured(vision_config=vision | {"hidden_size": "96"})
    assert "weights of another architecture" in configured(
        vision_config=vision | {"num_hidden_layers": 5}
    )
    (hugging_face / CONFIG).write_text(json.dumps(HUGGING_FACE))
    weights = hugging_face / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors: not a readable checkpoint" in refusal(hugging_face)


@pytest.mark.e2e
def test_it_needs_no_torch():
    code = (
        "import sys\n"
        "sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'segment_anything']))\n"
        "import numpy as np\n"
        "from agevlm_mlx.sam.mlx_teacher import MlxTeacher\n"
        "masks, _ = MlxTeacher().masks(np.full((40, 60, 3), 90, np.uint8), [(1, 1, 30, 30)])\n"
        "print(masks.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 40, 60)"
