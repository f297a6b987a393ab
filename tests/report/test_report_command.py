"""The page of a user's own data: its structure, that it asks nothing of a network, and what a browser makes of it."""

import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_oneshot.cli import main
from nnunet_oneshot.registration.dataset.ratings import FORMAT, RATINGS_FILE
from nnunet_oneshot.report.page import MARK

PLANS = "nnUNetOneShotCPUPlans"
HOSTILE = '<script>alert("x")</script>'
LABELS = {"background": 0, HOSTILE: 1, "a'b\"><img src=x onerror=alert(1)>": 2}
TRAINER = "OneShotDistillTrainer_5epochs"
LOG = """
2026-01-01 10:00:00.0: Epoch 0
2026-01-01 10:00:01.0: hint 1.5 (weight 0.0000), reconstruction 2.5
2026-01-01 10:00:02.0: Weight of the averaged student's labels as a guide: [0.7, 0.0], its Dice on synthetic or real \
patches of held-out cases, whichever is smaller (0 below 0.5). 2 of 3 registrations that it guided are kept, those.
2026-01-01 10:00:03.0: Epoch 1
2026-01-01 10:00:04.0: hint 0.5 (weight 0.1000), reconstruction 1.25
"""


class Page(html.parser.HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self._script = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._script = dict(attributes).get("id", "code") if tag == "script" else None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] = data
            self._script = None

    def all(self, tag, **wanted):
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def command(dataset, out, *more):
    return main(["report", "-d", str(dataset.id), "-p", PLANS, "-o", str(out), "-tr", TRAINER, *more])


def leave_a_training(dataset, case):
    """What a finished training of two epochs leaves, its validation included."""
    folder = dataset.results / f"{TRAINER}__{PLANS}__3d_fullres" / "fold_0"
    (folder / "validation").mkdir(parents=True)
    series = {"train_losses": [0.5, -0.25], "val_losses": [0.4, -0.1], "lrs": [0.003, 0.001]}
    dice = {"mean_fg_dice": [0.2, 0.6], "dice_per_class_or_region": [[0.1, 0.3], [0.5, 0.7]]}
    times = {"epoch_start_timestamps": [0.0, 10.0], "epoch_end_timestamps": [10.0, 25.0]}
    torch.save({"logging": {**series, **dice, **times}}, folder / "checkpoint_final.pth")
    (folder / "training_log_2026_1_1_10_00_00.txt").write_text(LOG)
    (folder / "oneshot_settings.json").write_text(json.dumps({"settings": {}, "versions": {"torch": "9.8.7"}}))
    shutil.copy(dataset.label(case), folder / "validation")
    shape = sitk.GetArrayFromImage(sitk.ReadImage(str(dataset.label(case)))).shape
    np.savez(folder / "validation" / f"{case}.npz", probabilities=np.full((3, *shape), 1 / 3, np.float16))
    metrics = {"1": {"Dice": 0.25}, "2": {"Dice": 0.75}}
    summary = {"metric_per_case": [{"prediction_file": f"/else/{case}.nii.gz", "metrics": metrics}]}
    (folder / "validation" / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One dataset for all tests of the module, made by the first."""
    return {"folder": tmp_path_factory.mktemp("report")}


@pytest.fixture
def registered(tiny_dataset, shared, monkeypatch):
    """A dataset with hostile label names, planned, preprocessed and registered."""
    torch.set_num_threads(1)
    monkeypatch.setenv("nnUNet_oneshot_overrides", json.dumps({"registration": {"refine_iterations": [2]}}))
    dataset = tiny_dataset(n_cases=6, labelled="all", labels=LABELS)
    kept = shared["folder"] / "preprocessed"
    if kept.is_dir():
        shutil.copytree(kept, dataset.preprocessed)
        return dataset
    plan = ["plan_and_preprocess", "-d", str(dataset.id), "-pl", "OneShotCPUPlanner", "-c", "3d_fullres", "--no_pbar"]
    plan.append("--no_estimate")
    assert main([*plan, "--atlas", "case_00"]) == 0
    (dataset.preprocessed / "splits_final.json").write_text(
        json.dumps([{"train": dataset.cases[:4], "val": dataset.cases[4:]}])
    )
    assert main(["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS, "--no_figures"]) == 0
    shutil.copytree(dataset.preprocessed, kept)
    return dataset


def test_before_registration_the_error_names_the_command(registered, tmp_path, capsys):
    shutil.rmtree(registered.preprocessed / "oneshot_registrations")
    capsys.readouterr()
    assert command(registered, tmp_path / "p.html") == 1
    assert f"run `nnunet_oneshot register -d 901 -c 3d_fullres -p {PLANS} -f 0` first" in capsys.readouterr().err
    assert not (tmp_path / "p.html").exists()


def test_page_after_registration(registered, tmp_path):
    out = tmp_path / "p.html"
    assert command(registered, out) == 0
    text = out.read_text(encoding="utf-8")
    page = Page(text)
    pairs = page.all("li", **{"class": "pair"})
    assert [p["data-case"] for p in sorted(pairs, key=lambda p: float(p["data-score"]))] == [
        p["data-case"] for p in pairs
    ]
    assert {p["data-case"] for p in pairs} == set(registered.cases[1:])
    assert {p["data-part"] for p in pairs} == {"training", "validation"}
    for pair in pairs:
        assert {"data-key", "data-flags", "data-rating", "data-before", "data-after"} <= pair.keys()
        cuts = json.loads(page.scripts[f"cuts-{pair['id']}"])
        assert len(cuts["cuts"]) == 7 and len({cut["name"].split(",")[0] for cut in cuts["cuts"]}) == 3
        assert [len(image["src"]) for image in cuts["images"]] == [7, 7, 7]
        assert {label for cut in cuts["contours"][0]["paths"] for label in cut} == {"1", "2"}
    assert all(image["alt"] and image["src"].startswith("data:image/") for image in page.all("img"))
    assert len(page.all("svg", role="img")) == 12 and "has not been trained" in text
    assert not page.all("section", id="training") and not page.all("section", id="predictions")
    # No name has become markup, and nothing is asked of a network.
    assert "<script>alert" not in text and "onerror=alert(1)>" not in text and text.count(HOSTILE) == 0
    addresses = [a[k] for _, a in page.tags for k in ("src", "href", "action") if a.get(k)]
    assert all(address.startswith(("data:image/", "#")) for address in addresses)
    assert set(re.findall(r"https?://[^\s\"'`<]+", text)) <= {"http://www.w3.org/2000/svg"}
    assert not page.all("link") and "@import" not in text and "url(" not in text
    assert "default-src 'none'" in page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]


def test_pictures_are_made_once_and_again_where_a_pair_changes(registered, tmp_path, monkeypatch):
    from nnunet_oneshot.report import registrations

    drawn = []
    original = registrations.CutMaker._draw
    monkeypatch.setattr(registrations.CutMaker, "_draw", lambda s, p, v: drawn.append(p.case) or original(s, p, v))
    assert command(registered, tmp_path / "p.html") == 0 and len(drawn) == 5
    assert command(registered, tmp_path / "p.html") == 0 and len(drawn) == 5
    kept = sorted(registered.preprocessed.rglob("*.cuts"))
    kept[0].write_text("{")
    assert command(registered, tmp_path / "p.html") == 0 and drawn[5:] == [kept[0].stem]


def test_page_after_training_shows_what_is_there(registered, tmp_path, monkeypatch):
    leave_a_training(registered, "case_04")
    assert command(registered, tmp_path / "p.html") == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    page = Page(text)
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert {"Segmentation loss", "Hint and reconstruction", "Weight of the hint", "Pseudo Dice of each label"} <= {
        *titles
    }
    assert "training ends at -0.25" in text and "reconstruction ends at 1.25" in text
    assert "epoch 1 (2 of 3 kept)" in text and "<td>0.70</td>" in text
    assert "mean Dice of 0.500" in text and "were read for these scores only" in text
    cuts = json.loads(page.scripts["cuts-p-worst"])
    assert [image["name"] for image in cuts["images"]] == ["image", "uncertainty"]
    assert cuts["contours"][0]["paths"] == cuts["contours"][1]["paths"]
    assert "torch 9.8.7" in text and "25 s for 2 epochs" in text
    # Without raw images the scores remain.
    monkeypatch.delenv("nnUNet_raw")
    assert command(registered, tmp_path / "p.html") == 0
    text = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert (
        "mean Dice of 0.500" in text
        and "Pictures of predictions are left out: Environment variables are not set: nnUNet_raw" in text
        and "cuts-p-worst" not in text
    )


def test_ratings_go_from_the_page_to_the_dataset_and_back(registered, tmp_path, capsys):
    out, file = tmp_path / "p.html", tmp_path / "download.json"
    assert command(registered, out) == 0
    page = Page(out.read_text(encoding="utf-8"))
    setup = json.loads(page.scripts["setup"])["ratings"]
    worst = page.all("li", **{"class": "pair"})[0]
    entry = {"registrations": setup["registrations"], "atlas": worst["data-atlas"], "case": worst["data-case"]}
    entries = [{**entry, "rating": "bad", "key": worst["data-key"]}]
    file.write_text(json.dumps({"format": FORMAT, "version": 1, "dataset": setup["dataset"], "ratings": entries}))
    assert command(registered, out, "--ratings", str(file)) == 0
    assert json.loads((registered.preprocessed / RATINGS_FILE).read_text())["ratings"] == entries
    text = out.read_text(encoding="utf-8")
    rated = Page(text).all("li", **{"data-rating": "bad"})
    assert [pair["data-case"] for pair in rated] == [worst["data-case"]]
    assert "1 is rated bad and left out of training" in text
    capsys.readouterr()
    assert main(["register", "-d", str(registered.id), "-c", "3d_fullres", "-p", PLANS, "--no_figures"]) == 0
    assert "1 of 5 registrations are left out" in capsys.readouterr().out


def test_another_file_is_not_replaced(registered, tmp_path, capsys):
    mine = tmp_path / "thesis.html"
    mine.write_text("<h1>precious</h1>")
    assert command(registered, mine) == 1
    assert mine.read_text() == "<h1>precious</h1>"
    assert command(registered, tmp_path / "missing" / "p.html") == 1
    assert "was not written by this command" in capsys.readouterr().err
    mine.write_text(f"<html>{MARK}")
    assert command(registered, mine) == 0


_CHECK = """
<script>
const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const found = [];
const one = pairs[0];
one.querySelector("button").click();
found.push(viewer.open, document.querySelectorAll("#v-cuts svg").length);
found.push(byId("v-now").textContent);
press(" ");
found.push(byId("v-now").textContent);
press("b");
found.push(one.dataset.rating);
press("ArrowRight");
found.push(byId("v-title").textContent === pairs[1].dataset.case);
viewer.close();
byId("f-rating").value = "bad";
byId("filter").dispatchEvent(new Event("input"));
found.push(byId("count").textContent, JSON.parse(ratingsFile()).ratings.map((r) => r.rating).join());
document.title = "found " + JSON.stringify(found);
</script>
"""


def test_in_a_browser_cuts_open_keys_work_and_ratings_are_exported(registered, tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no browser")
    out = tmp_path / "p.html"
    assert command(registered, out) == 0
    text = out.read_text(encoding="utf-8")
    out.write_text(text.replace("</body>", f"{_CHECK}</body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([browser, *options, out.as_uri()], capture_output=True, timeout=120)
    (title,) = re.findall(r"<title>found (.*?)</title>", done.stdout.decode(), re.DOTALL)
    assert json.loads(html.unescape(title)) == [
        True,
        7,
        "Shown: case, labels after registration.",
        "Shown: case, labels before the deformation (affine alone).",
        "bad",
        True,
        "1 of 5 registrations",
        "bad",
    ]
