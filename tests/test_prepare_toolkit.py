"""The toolkit on disk: equal after a round trip, whole or absent, refused when it is not what it says."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sspcompile.errors import ToolkitError
from sspcompile.prepare import toolkit as kit
from sspcompile.prepare.recogniser import Recogniser

LAYERS, HEADS, HIDDEN, DOMAINS = 3, 4, 5, ("a", "b")


def made(seed=0):
    rng = np.random.default_rng(seed)
    k = len(DOMAINS)

    def values(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return kit.Toolkit(
        fingerprint="f" * 64,
        domains=DOMAINS,
        axes=values(k, HIDDEN),
        gram=values(k, k),
        recogniser=Recogniser(
            layers=np.array([0, 2]),
            mean=values(2, HIDDEN),
            scale=values(2, HIDDEN),
            weight=values(2, k + 1, HIDDEN),
            bias=values(k + 1),
            log_temperature=values(1),
            unknown_line=values(1),
        ),
        directions=values(LAYERS, k, HIDDEN),
        importance={"fisher": values(LAYERS, HEADS, k)},
        spread={"fisher": values(LAYERS, HEADS, k)},
        whitelist_p=values(LAYERS, HEADS),
        whitelist=rng.random((LAYERS, HEADS)) < 0.5,
        meta={"seed": 0, "note": "Grüße"},
    )


@pytest.fixture
def saved(tmp_path):
    kit.save(made(), tmp_path / "toolkit")
    return tmp_path / "toolkit"


def edit(folder, **changes):
    path = folder / kit.DESCRIPTION_FILE
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def refusal(folder, fingerprint="f" * 64):
    with pytest.raises(ToolkitError) as caught:
        kit.load(folder, fingerprint=fingerprint)
    assert "\n" not in str(caught.value) and caught.value.hint
    return str(caught.value)


def test_round_trip_is_exact(saved):
    found, expected = kit.load(saved, fingerprint="f" * 64), made()
    for field in dataclasses.fields(kit.Toolkit):
        value, other = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(value, other)
            assert value.dtype == other.dtype
        elif field.name == "recogniser":
            for name, array in vars(other).items():
                np.testing.assert_array_equal(getattr(value, name), array)
                assert getattr(value, name).dtype == array.dtype
        elif field.name in ("importance", "spread"):
            assert value.keys() == other.keys()
            np.testing.assert_array_equal(value["fisher"], other["fisher"])
        else:
            assert value == other


def test_same_toolkit_gives_the_same_bytes(saved, tmp_path):
    kit.save(made(), tmp_path / "again")
    for name in (kit.TENSORS_FILE, kit.DESCRIPTION_FILE):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_fault_files_hold_no_pickle_and_no_extension_lies(saved):
    assert sorted(p.name for p in saved.iterdir()) == ["toolkit.json", "toolkit.safetensors"]
    assert json.loads((saved / "toolkit.json").read_text("utf-8"))["schema_version"] == kit.SCHEMA_VERSION
    assert (saved / "toolkit.safetensors").read_bytes()[:2] not in (b"PK", b"\x80\x02")
    assert load_file(saved / "toolkit.safetensors")["whitelist"].dtype == bool


def test_fault_calibration_survives_the_reload(saved):
    features = np.random.default_rng(0).normal(size=(4, 2, HIDDEN))
    before, after = made().recogniser, kit.load(saved, fingerprint="f" * 64).recogniser
    np.testing.assert_array_equal(after.probabilities(features), before.probabilities(features))
    assert not np.allclose(after.probabilities(features), after.probabilities(features, calibrated=False))


def test_directions_and_a_class_for_other_subjects_may_be_absent(tmp_path):
    whole = made()
    bare = dataclasses.replace(
        whole.recogniser, weight=whole.recogniser.weight[:, :-1], bias=whole.recogniser.bias[:-1]
    )
    kit.save(dataclasses.replace(whole, directions=None, recogniser=bare), tmp_path / "bare")
    found = kit.load(tmp_path / "bare", fingerprint="f" * 64)
    assert found.directions is None and found.recogniser.bias.shape == (2,)


def test_another_models_toolkit_is_refused(saved):
    assert "another model" in refusal(saved, "e" * 64)


def test_another_schema_version_is_refused(saved):
    assert not kit.is_outdated(saved)
    edit(saved, schema_version=99)
    assert "schema version 99" in refusal(saved) and kit.is_outdated(saved)


def test_a_missing_folder_is_refused(tmp_path):
    assert "no toolkit" in refusal(tmp_path / "nothing")


def test_a_missing_tensor_file_is_refused(saved):
    (saved / kit.TENSORS_FILE).unlink()
    assert "lacks toolkit.safetensors" in refusal(saved)


def test_a_damaged_tensor_file_is_refused(saved):
    path = saved / kit.TENSORS_FILE
    path.write_bytes(path.read_bytes()[:40])
    assert "cannot be read" in refusal(saved)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"schema_version": "1"}'])
def test_a_damaged_description_is_refused(saved, content):
    (saved / kit.DESCRIPTION_FILE).write_text(content)
    refusal(saved)


def rewrite(folder, change):
    arrays = dict(load_file(folder / kit.TENSORS_FILE))
    change(arrays)
    save_file(arrays, folder / kit.TENSORS_FILE)
    return {name: list(array.shape) for name, array in arrays.items()}


def test_files_that_disagree_are_refused(saved):
    rewrite(saved, lambda arrays: arrays.pop("gram"))
    assert "disagree about gram" in refusal(saved)


def test_a_missing_array_is_refused(saved):
    edit(saved, arrays=rewrite(saved, lambda arrays: arrays.pop("recogniser.bias")))
    assert "lacks recogniser.bias" in refusal(saved)


def test_a_missing_criterion_is_refused(saved):
    edit(saved, criteria=["fisher", "kl"])
    assert "lacks importance.kl" in refusal(saved)


def test_contradicting_shapes_are_refused(saved):
    edit(saved, arrays=rewrite(saved, lambda a: a.update({"recogniser.bias": np.zeros(9, np.float32)})))
    assert "recogniser.bias has shape [9] instead of [3]" in refusal(saved)


def test_numbers_that_are_not_finite_are_refused_before_they_are_saved(tmp_path):
    broken = dataclasses.replace(made(), gram=np.full((2, 2), np.nan, np.float32))
    with pytest.raises(ToolkitError, match="not finite"):
        kit.save(broken, tmp_path / "toolkit")
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_nothing_and_keeps_the_earlier_toolkit(saved, tmp_path):
    before = (saved / kit.DESCRIPTION_FILE).read_bytes()
    with pytest.raises(TypeError):
        kit.save(dataclasses.replace(made(), meta={"x": object()}), saved)
    assert (saved / kit.DESCRIPTION_FILE).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["toolkit"]


def test_saving_over_an_earlier_toolkit_replaces_it(saved):
    kit.save(made(1), saved)
    np.testing.assert_array_equal(kit.load(saved, fingerprint="f" * 64).axes, made(1).axes)
    assert [p.name for p in saved.parent.iterdir()] == ["toolkit"]


def test_with_importance_adds_a_criterion_and_refuses_a_wrong_shape(saved):
    right, wrong = np.ones((LAYERS, HEADS, 2)), np.ones((HEADS, LAYERS, 2))
    added = kit.with_importance(made(), "kl", right, right)
    assert set(added.importance) == {"fisher", "kl"} and added.importance["kl"].dtype == np.float32
    kit.save(added, saved)
    assert set(kit.load(saved, fingerprint="f" * 64).importance) == {"fisher", "kl"}
    with pytest.raises(ToolkitError, match=r"importance\.kl"):
        kit.with_importance(made(), "kl", wrong, right)
    with pytest.raises(ToolkitError, match=r"spread\.kl"):
        kit.with_importance(made(), "kl", right, wrong)


def test_the_folder_may_be_moved(saved, tmp_path):
    shutil.move(saved, tmp_path / "elsewhere")
    kit.load(tmp_path / "elsewhere", fingerprint="f" * 64)
