"""The report: one file that needs nothing else, with all that the runs left, and no picture where none is wanted."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from pretrain3d.commands import table
from pretrain3d.config import UserError, to_yaml
from pretrain3d.reporting import figures
from pretrain3d.reporting.callbacks import as_images
from pretrain3d.reporting.case_pictures import case_figure, save_case_picture
from pretrain3d.reporting.cost import duration
from pretrain3d.reporting.report import write_report
from pretrain3d.reporting.reported import is_pretraining, read_runs
from pretrain3d.reporting.results import write_result, write_text

CLASSES = ["lung nodule", "liver lesion", "bone lesion"]
KEYS = ["mAP", *(f"AP@{0.1 + 0.05 * i:.2f}" for i in range(17)), "FROC@0.10", "FROC@0.50"]


def entry(value):
    return {"value": value, "low": max(value - 0.08, 0.0), "high": min(value + 0.08, 1.0)}


def volume(size=48, seed=0):
    """A bright ball in a dark body with noise, normalised; its box."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*[np.arange(size) + 0.5] * 3, indexing="ij"))
    body = np.linalg.norm((grid - size / 2) / np.array([22, 16, 24])[:, None, None, None], axis=0) < 1
    ball = np.linalg.norm(grid - np.array([30, 20, 28])[:, None, None, None], axis=0) < 5
    image = np.where(ball, 1.5, np.where(body, 0.2, -2.0)) + rng.normal(0, 0.15, (size,) * 3)
    return image.astype(np.float32), np.array([[25, 15, 23, 35, 25, 33]], np.float32)


def detection_run(folder, name, level, seed=0, trained=True, cases=6):
    """A run folder as `fit` and `test` leave it."""
    rng = np.random.default_rng(seed)
    curve = {
        "false_positives_per_case": [0.0, 0.5, 3.0, 9.0],
        "sensitivity": [0.0, level / 2, level, min(level * 1.2, 1)],
    }
    pr = {"recall": [0.0, level, level], "precision": [1.0, 0.8, 0.0]}
    config = {
        "name": name,
        "out": "runs",
        "seed": seed,
        "module": {"name": "detection", "detector": {"name": "retina_unet"}},
    }
    write_result(
        folder,
        run=name,
        metrics={key: entry(level) for key in KEYS},
        per_class={c: {key: entry(level * f) for key in KEYS} for c, f in zip(CLASSES, (1, 0.8, 0.5), strict=True)},
        curves={"froc": curve, "froc@0.50": curve, "pr": dict.fromkeys(CLASSES, pr)},
        cases=[
            {"case": f"c{i}", "objects": 2, "hits": 1, "missed": 1, "best_false_positive": 0.5} for i in range(cases)
        ],
        config=config if trained else {"baseline": "threshold", "fold": 0},
        seed=seed,
        data={"hash": "abc", "name": "phantom", "licence": "CC0", "cases": cases},
        cost={"seconds": 300.0, "steps": 400, "samples": 1600} if trained else None,
        backbone={"name": "resenc_xs", "fingerprint": "f", "init": "scratch"} if trained else None,
        asked={"split": "test"},
        by_size={"0-500": {"objects": 11, "metrics": {"AP@0.10": entry(level / 2)}}},
    )
    if not trained:
        return folder
    steps = np.arange(10, 401, 10)
    loss = 2 * np.exp(-steps / 120) + 0.3 + rng.normal(0, 0.06, len(steps))
    lines = ["step,train/loss,val/AP@0.10,val/mAP"]
    for step, value in zip(steps, loss, strict=True):
        ap = level * (1 - np.exp(-step / 150))
        lines.append(f"{step},{value},{ap},{ap * 0.8}" if step % 50 == 0 else f"{step},{value},,")
    write_text(folder / "metrics.csv", "\n".join(lines) + "\n")
    image, boxes = volume(seed=seed)
    found = boxes + np.array([[1, -1, 0, 1, 0, 1]], np.float32)
    extra = np.array([[8, 24, 20, 16, 30, 28]], np.float32)
    save_case_picture(
        folder / "pictures" / "test_c0.npz",
        image,
        boxes,
        [0],
        np.concatenate([extra, found]),
        [1, 0],
        [0.31, 0.87],
        CLASSES,
    )
    return folder


def pretraining_run(folder):
    folder.mkdir(parents=True)
    config = {"name": "mae", "seed": 0, "module": {"name": "reconstruction", "method": {"name": "mae"}}}
    write_text(folder / "config.yaml", to_yaml(config))
    lines = ["step,train/loss,val/loss,val/dice,val/probe_auroc"]
    lines += [
        f"{step},{1 / step + 0.1}," + (f"{1 / step + 0.12},0.5,0.75" if step % 50 == 0 else ",,")
        for step in range(5, 301, 5)
    ]
    write_text(folder / "metrics.csv", "\n".join(lines) + "\n")
    (folder / "pictures").mkdir()
    original = volume()[0][:, :, 24]
    keep = np.kron(np.random.default_rng(0).random((6, 6)) < 0.4, np.ones((8, 8))) > 0
    strip = {
        "original": original,
        "masked": original * keep,
        "reconstructed": np.where(keep, original, original.mean()),
    }
    for name, image in as_images(strip).items():
        image.save(folder / "pictures" / f"step0000300_{name}.png")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        detection_run(tmp_path / "scratch", "scratch", 0.5),
        detection_run(tmp_path / "from_mae", "from-mae", 0.6, seed=1),
        detection_run(tmp_path / "threshold", "threshold", 0.1, trained=False),
        pretraining_run(tmp_path / "mae"),
    ]


class Page(HTMLParser):
    """Text, sources and balance of the tags of a page."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.images, self.tags = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attributes)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_holds_everything_and_needs_nothing_else(runs, tmp_path):
    write_report(tmp_path / "report.html", read_runs(runs), title="Scratch < MAE & more")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert "Scratch < MAE & more" in page.text  # escaped in the source
    assert all(source.startswith("data:image/png;base64,") for source in page.images)
    assert len(page.images) == 2 + 3  # a case of two runs, and original, masked, reconstructed
    assert not re.search(r'(src|href)\s*=\s*"(?!data:|#)', text)  # nothing is fetched
    assert "<script" not in text and "@import" not in text
    shown = " ".join(page.text)
    for expected in ("0.500 [0.420, 0.580]", "threshold", "FROC at IoU 0.10", "pretraining loss", "validation mAP",
                     "validation Dice", "AUROC of the probe of frozen features",
                     "5 min 00 s", "liver lesion", "retina_unet", "Reconstruction", "6 test cases",
                     "0-500 (11 objects)", "0.250 [0.170, 0.330]"):  # fmt: skip
        assert expected in shown, expected
    assert len(text) < 3e6


def test_the_cases_of_each_data_set_are_shown_apart(tmp_path):
    runs = [detection_run(tmp_path / name, name, 0.5, cases=n) for name, n in (("a", 6), ("b", 6), ("other", 5))]
    write_report(tmp_path / "report.html", read_runs(runs))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    first, second = text.split("<h3>c0</h3>")[1:]  # both data sets happen to have a case of that name
    assert (first.count('alt="a"'), first.count('alt="b"'), first.count('alt="other"')) == (1, 1, 0)
    assert (second.count('alt="a"'), second.count('alt="other"')) == (0, 1)


def test_without_pictures_no_image_of_the_data_is_left(runs, tmp_path):
    write_report(tmp_path / "report.html", read_runs(runs), pictures=False)
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.images == [] and "image" not in page.tags  # neither in HTML nor inside an SVG
    assert "svg" in page.tags and "Reconstruction" not in page.text and "Cases" not in page.text


def test_the_same_runs_give_the_same_page(runs, tmp_path):
    for name in ("a.html", "b.html"):
        write_report(tmp_path / name, read_runs(runs[:1]))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_table_command_writes_all_three(runs, tmp_path, capsys):
    options = {"out": str(tmp_path / "new" / "table.md"), "report": str(tmp_path / "report.html"), "pictures": "false"}
    assert table.run([str(path) for path in runs], options) == 0
    printed = capsys.readouterr().out
    assert "from-mae   0.600 [0.520, 0.680]" in printed
    assert "| from-mae | 0.600 [0.520, 0.680] |" in (tmp_path / "new" / "table.md").read_text(encoding="utf-8")
    assert (tmp_path / "report.html").exists()


def test_leakage_is_in_table_and_report(runs, tmp_path, capsys):
    path = runs[0] / "result.json"
    leaked = [{"case": "c2", "split": "test", "how": "copy", "similarity": 0.97}]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"leakage": leaked}))
    table.run([str(run) for run in runs], {"report": str(tmp_path / "r.html")})
    assert "leakage: tested cases that the pretraining has seen" in capsys.readouterr().out
    assert "<td>1 of 6</td>" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_mistakes_are_named(runs, tmp_path):
    assert is_pretraining(runs[3]) and not is_pretraining(runs[0])
    with pytest.raises(UserError, match="given twice"):
        table.run([str(runs[3]), str(runs[3])], {})
    (tmp_path / "table.md").mkdir()
    with pytest.raises(UserError, match="is a folder"):
        table.run([str(runs[0])], {"out": str(tmp_path / "table.md")})
    with pytest.raises(UserError, match="does not exist"):
        read_runs([tmp_path / "nowhere"])


def test_a_case_picture_holds_planes_through_its_objects(tmp_path):
    image, boxes = volume()
    two = np.concatenate([boxes, [[4, 4, 4, 6, 6, 6]]])
    save_case_picture(tmp_path / "test_a.npz", image, two, [1, 0], np.zeros((0, 6)), [], [], CLASSES, (1, 1, 2))
    with np.load(tmp_path / "test_a.npz", allow_pickle=False) as file:
        assert file["points"].tolist() == [[30, 20, 28], [5, 5, 5]]  # centres, the largest object first
        axial = file["slice_0_2"]
        assert axial.shape == image.shape[:2] and axial.dtype == np.uint8
        assert axial[30, 20] > axial[24, 35] > axial[0, 0]  # ball, body, air
        assert np.array_equal(file["slice_0_0"][20], file["slice_0_1"][30])  # the line both planes share
    assert figures.to_png(case_figure(tmp_path / "test_a.npz")).startswith("data:image/png;base64,iVBOR")


def test_a_case_without_objects_shows_its_best_prediction_or_its_middle(tmp_path):
    image, boxes = volume()
    none = np.zeros((0, 6))
    for found, expected in ((boxes, [30, 20, 28]), (none, [24, 24, 24])):
        scores = np.full(len(found), 0.4)
        save_case_picture(tmp_path / "a.npz", image, none, [], found, scores * 0, scores, CLASSES)
        with np.load(tmp_path / "a.npz") as file:
            assert file["points"].tolist() == [expected]
        figures.to_png(case_figure(tmp_path / "a.npz"))


def test_boxes_are_drawn_where_the_plane_cuts_them(tmp_path):
    image, boxes = volume()
    far = boxes + np.array([0, 0, 12, 0, 0, 12], np.float32)  # above the axial plane through the ball
    found = np.concatenate([boxes, far])
    save_case_picture(tmp_path / "a.npz", image, boxes, [0], found, [0, 0], [0.9, 0.8], CLASSES)
    sagittal, coronal, axial = case_figure(tmp_path / "a.npz").axes
    texts = [[text.get_text() for text in axes.texts] for axes in (sagittal, coronal, axial)]
    both = ["lung nodule", "lung nodule 0.90", "lung nodule 0.80"]
    assert texts == [both, both, both[:2]]
    assert axial.get_xlim() == (48, 0) and sagittal.get_xlim() == (48, 0)  # right, and front, on the left
    assert axial.patches[0].get_xy() == (25, 15) and axial.patches[0].get_height() == 10


def test_running_median_against_its_definition():
    values = np.random.default_rng(0).normal(size=300)
    expected = [np.median(values[max(i - 3, 0) : i + 4]) for i in range(300)]
    assert np.array_equal(figures.running_median(values), expected)
    few = values[:80]  # as many as the demo logs
    assert np.array_equal(figures.running_median(few), [np.median(few[max(i - 2, 0) : i + 3]) for i in range(80)])
    assert np.array_equal(figures.running_median(values[:19]), values[:19])


def test_the_runs_of_the_study_have_colours_of_their_own():
    names = [str(number) for number in range(15)]  # two from scratch, twelve methods, a baseline
    assert len(set(figures.palette(names).values())) == 15


def test_durations_read_naturally():
    assert [duration(s) for s in (4.51, 200, 3599.6, 3725)] == [
        "4.5 s",
        "3 min 20 s",
        "1 h 00 min",
        "1 h 02 min",
    ]
