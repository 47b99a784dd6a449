import json
import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_store import blocks, make_case, write_store

from pretrain3d.config import UserError
from pretrain3d.data import store as store_module
from pretrain3d.data.case import Case, case_path
from pretrain3d.data.store import Store, StoreWriter, array_path

SHAPE = (70, 40, 33)  # more than one chunk along x, no multiple of a block


def contents(rng, channels=1, dtype=np.int16):
    image = rng.normal(0, 300, (channels, *SHAPE)).astype(dtype)
    mask = blocks(SHAPE, [(3, 4, 5, 9, 9, 9), (60, 2, 1, 70, 11, 33)])
    return image, mask


@pytest.fixture
def written(tmp_path):
    rng = np.random.default_rng(0)
    cases = {}
    for name in ("b", "a"):
        image, mask = contents(rng)
        cases[name] = (make_case(name, image, mask, [0, 1]), image, mask)
    return write_store(tmp_path / "s", list(cases.values())), cases


def read_at_random(store, cases, rng, times=20):
    for _ in range(times):
        name = rng.choice(sorted(cases))
        ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in SHAPE]
        start, stop = zip(*ends, strict=True)
        region = tuple(slice(a, b) for a, b in ends)
        found = store.read(name, "image", start, stop)
        assert found.dtype == np.int16
        np.testing.assert_array_equal(found, cases[name][1][:, *region])
        np.testing.assert_array_equal(store.read(name, "instances", start, stop), cases[name][2][region])


def test_random_regions_are_those_of_the_array(written):
    read_at_random(*written, np.random.default_rng(1))


def test_few_open_arrays_read_the_same(written, monkeypatch):
    monkeypatch.setattr(store_module, "OPEN_ARRAYS", 1)
    store, cases = written
    read_at_random(store, cases, np.random.default_rng(2))
    assert len(store._open) == 1


def test_a_pickled_store_reads_the_same(written):
    store, cases = written
    read_at_random(store, cases, np.random.default_rng(3))
    again = pickle.loads(pickle.dumps(store))
    assert not again._open  # open files do not travel
    read_at_random(again, cases, np.random.default_rng(4))


def test_a_forked_worker_opens_its_own_arrays(written):
    store, cases = written
    read_at_random(store, cases, np.random.default_rng(5))
    before = store._pid
    with multiprocessing.get_context("fork").Pool(1) as pool:
        first, pid = pool.apply(_first_voxels, (store,))
    np.testing.assert_array_equal(first, cases["a"][1][:, :2, :2, :2])
    assert pid != before


def _first_voxels(store):
    return store.read("a", "image", (0, 0, 0), (2, 2, 2)), store._pid


@pytest.mark.parametrize("region", [((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (71, 2, 2)), ((3, 0, 0), (3, 2, 2))])
def test_regions_outside_the_volume_are_a_programmers_mistake(written, region):
    with pytest.raises(AssertionError):
        written[0].read("a", "image", *region)


def test_cases_are_ordered_and_complete(written):
    store, cases = written
    assert list(store.cases) == ["a", "b"]
    for name, case in store.cases.items():
        assert case.to_dict() == cases[name][0].to_dict()
        assert case.boxes.dtype == np.float32 and case.labels.dtype == np.int64 and case.instances.dtype == np.int64
        assert case.volumes_mm3.dtype == np.float64 and isinstance(case.shape, tuple)


def test_a_case_without_objects_keeps_its_shapes(tmp_path):
    image, mask = contents(np.random.default_rng(0))
    case = make_case("x", image, mask * 0, [])
    again = Case.from_dict(json.loads(json.dumps(case.to_dict())))
    assert again.boxes.shape == (0, 6) and again.labels.shape == again.instances.shape == (0,)


def test_several_channels_of_floats_and_a_semantic_map(tmp_path):
    rng = np.random.default_rng(0)
    image, mask = contents(rng, channels=2, dtype=np.float32)
    semantic = rng.integers(0, 300, SHAPE).astype(np.uint16)
    case = replace(make_case("x", image, mask, [0, 1], has_instances=False), has_semantic=True)
    writer = StoreWriter(tmp_path, "n", ["nodule", "lesion"], (1, 1, 1), ["MR", "MR"], semantic_classes=["organ"])
    writer.add(case, image, None, semantic)
    store = writer.finish(["x"])
    np.testing.assert_array_equal(store.read("x", "image", (0, 0, 0), SHAPE), image)
    np.testing.assert_array_equal(store.read("x", "semantic", (1, 2, 3), (9, 9, 9)), semantic[1:9, 2:9, 3:9])
    assert not array_path(tmp_path, "instances", "x").exists()


def test_compression_is_real(tmp_path):
    image = np.zeros((1, *SHAPE), dtype=np.int16)
    mask = np.zeros(SHAPE, dtype=np.int16)
    write_store(tmp_path, [(make_case("x", image, mask, []), image, mask)])
    assert array_path(tmp_path, "image", "x").stat().st_size < image.nbytes / 50


def test_data_hash_is_of_the_contents_not_of_their_order(tmp_path):
    image, mask = contents(np.random.default_rng(0))
    cases = [(make_case(name, image, mask, [0, 1]), image, mask) for name in "ab"]
    first = write_store(tmp_path / "1", cases)
    assert write_store(tmp_path / "2", cases[::-1]).data_hash == first.data_hash
    changed = [cases[0], (replace(cases[1][0], content_hash="other"), image, mask)]
    assert write_store(tmp_path / "3", changed).data_hash != first.data_hash


def test_nothing_temporary_is_left(written):
    assert not [path for path in written[0].path.rglob("*") if "tmp" in path.name]


def test_what_is_no_store_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"is not a store .* prepare RAW_FOLDER"):
        Store(tmp_path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda path: (path / "index.json").write_text("{"), "index.json is damaged"),
        (lambda path: (path / "index.json").write_text('{"format": 0}'), "has format 0"),
        (lambda path: case_path(path, "a").unlink(), "cannot read .*a.json"),
        (lambda path: case_path(path, "a").write_text("{}"), "cannot read .*a.json"),
    ],
)
def test_a_damaged_store_says_what_is_damaged(written, spoil, text):
    spoil(written[0].path)
    with pytest.raises(UserError, match=text):
        Store(written[0].path)


def test_a_missing_or_cut_array_is_named(written):
    store, _ = written
    path = array_path(store.path, "image", "a")
    whole = path.read_bytes()
    for damage in (lambda: path.write_bytes(whole[:100]), path.unlink):
        damage()
        with pytest.raises(UserError, match=r"cannot read .*image/a.b2nd"):
            Store(store.path).read("a", "image", (0, 0, 0), (2, 2, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "plan.yaml is missing"),
        ("a: [", "not valid YAML"),
        ("", "holds no settings"),
        (
            "intensity: {scheme: ct}",
            r"plan.yaml: patch_size is missing; correct it there, or delete the file and call `pret",
        ),
        ("{intensity: {}, patch_size: [16, 16]}", "plan.yaml: patch_size must be three numbers of voxels"),
        ("{intensity: ct, patch_size: [16, 16, 16]}", "plan.yaml: intensity must be keys and values"),
        ("{intensity: {}, patch_size: [16, 16, 16], detection_levels: all}", "detection_levels must be null or a list"),
        ("{intensity: {}, patch_size: [16, 16, 16], anker: 1}", "unknown key 'anker'"),
    ],
)
def test_a_bad_plan_is_named(written, text, message):
    path = written[0].path / "plan.yaml"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=message):
        Store(written[0].path).plan  # noqa: B018


def test_a_store_that_is_not_there_is_looked_for_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Store(Path("stores/toy"))
    assert str(caught.value) == (
        f"stores/toy is not a store (no index.json), looked for in {tmp_path}; "
        "`pretrain3d prepare RAW_FOLDER out=stores/toy` makes one"
    )
    with pytest.raises(UserError, match=r"toy is not a store \(no index\.json\); `pretrain3d prepare"):
        Store(tmp_path / "toy")
