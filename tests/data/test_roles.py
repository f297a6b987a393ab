"""Which case plays which part."""

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnunet_oneshot.config import OneShotConfig
from nnunet_oneshot.data.atlas import AtlasChoice
from nnunet_oneshot.data.preprocessed import (
    check_preprocessed,
    load_image,
    load_properties,
    load_segmentation,
    open_image,
)
from nnunet_oneshot.data.roles import assign_roles
from nnunet_oneshot.data.splits import Fold
from nnunet_oneshot.errors import OneShotError

CASES = [f"case_{number}" for number in range(10)]


def roles(**changes):
    atlases = changes.pop("atlases", ["case_3"])
    fold = Fold(0, changes.pop("train", CASES[:8]), changes.pop("validation", CASES[8:]), CASES)
    return assign_roles(AtlasChoice(atlases, "named"), fold, OneShotConfig(**{"seed": 1, **changes}))


def test_every_training_case_but_the_atlas_is_unlabelled():
    assert roles().unlabelled == ("case_0", "case_1", "case_2", "case_4", "case_5", "case_6", "case_7")
    assert roles().progress == ("case_8", "case_9")
    assert roles().held_out


@pytest.mark.parametrize(("share", "number"), [(0.0, 1), (0.1, 1), (0.5, 4), (1.0, 7)])
def test_share_of_the_unlabelled_cases(share, number):
    assert len(roles(unlabelled_fraction=share).unlabelled) == number


def test_share_depends_on_the_seed_and_grows_by_adding_cases():
    half, more = roles(unlabelled_fraction=0.3), roles(unlabelled_fraction=0.8)
    assert set(half.unlabelled) < set(more.unlabelled)
    assert any(roles(unlabelled_fraction=0.3, seed=seed).unlabelled != half.unlabelled for seed in range(2, 9))


def test_without_validation_case_progress_is_watched_in_training():
    result = roles(validation=[], progress_cases=2)
    assert result.progress == result.unlabelled[:2]
    assert not result.held_out


def test_one_progress_case_at_least():
    assert roles(progress_cases=0).progress == ("case_8",)


def test_atlas_is_never_a_progress_case():
    assert roles(atlases=["case_9"]).progress == ("case_8",)


def test_nothing_to_warp_to_is_an_error_when_it_is_needed():
    alone = roles(train=["case_3"])
    with pytest.raises(OneShotError, match="no case beside the atlas"):
        alone.require_unlabelled()
    roles().require_unlabelled()


def test_several_atlases_need_nothing_to_be_warped_to():
    several = roles(train=["case_3", "case_4"], atlases=["case_4", "case_3"], validation=[], progress_cases=1)
    several.require_unlabelled()
    assert (several.unlabelled, several.progress) == ((), ("case_3",))


def test_sentences_name_the_atlas_and_the_numbers():
    text = " ".join(roles().sentences())
    assert "Atlas: case_3 (named)." in text
    assert "Unlabelled training cases: 7." in text
    assert "2 held-out cases" in text


@pytest.mark.parametrize("kind", ["npz", "npy", "b2nd"])
def test_image_is_read_in_each_of_the_formats(kind, tmp_path):
    import blosc2

    image = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    path = str(tmp_path / f"case_0.{kind}")
    if kind == "npz":
        np.savez(path, data=image, seg=image)
    elif kind == "npy":
        np.save(path, image)
    else:
        blosc2.asarray(image, urlpath=path)
    assert np.array_equal(load_image(str(tmp_path), "case_0"), image)


@pytest.mark.parametrize("content", [None, b"damaged"])
@pytest.mark.parametrize("kind", ["npz", "b2nd"])
def test_image_that_cannot_be_read_is_named(kind, content, tmp_path):
    if content is not None:
        (tmp_path / f"case_0.{kind}").write_bytes(content)
    with pytest.raises(OneShotError, match=r"case_0\.(npz|b2nd) cannot be read.*Preprocess"):
        load_image(str(tmp_path), "case_0")


def test_folder_without_cases_is_not_preprocessed(tmp_path):
    with pytest.raises(OneShotError, match="holds no preprocessed case"):
        check_preprocessed(str(tmp_path), "3d_fullres")


@pytest.mark.parametrize("content", [None, b"", b"x", b"\x80\x04N."])
def test_properties_that_cannot_be_read_are_told_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "case_0.pkl").write_bytes(content)
    with pytest.raises(OneShotError, match=r"case_0\.pkl cannot be read.*Preprocess"):
        load_properties(str(tmp_path), "case_0")


@pytest.mark.parametrize("shape", [(2, 37, 211, 199), (1, 1, 300, 233), (1, 13, 17, 29)])
def test_cases_are_read_however_nnunet_divides_them(shape, tmp_path):
    image = np.random.default_rng(0).random(shape, np.float32)
    seg = (image[:1] > 0.5).astype(np.int16)
    kinds = {}
    for name, array in (("", image), ("_seg", seg)):
        blocks, chunks = comp_blosc2_params(array.shape, (20, 192, 192), array.itemsize)
        kinds |= {f"blocks{name}": blocks, f"chunks{name}": chunks}
    nnUNetDatasetBlosc2.save_case(image, seg, {}, str(tmp_path / "case"), **kinds)
    assert np.array_equal(open_image(str(tmp_path), "case")[:], image)
    assert np.array_equal(load_segmentation(str(tmp_path), "case"), seg)
