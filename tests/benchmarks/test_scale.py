"""The benchmark of many cases."""

import csv
import json

import pytest

from nnunet_oneshot.benchmarks import scale
from nnunet_oneshot.cli import main
from nnunet_oneshot.data.prepared import PreparedDataset

PLANS = "nnUNetOneShotCPUPlans"


def test_the_cache_is_compared_with_the_data_of_its_pairs(prepared_dataset, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("nnUNet_oneshot_overrides", '{"registration": {"refine_iterations": [1]}}')
    dataset = prepared_dataset(labelled=("case_00",), n_cases=3)
    sizes = ["--sizes", str(dataset.id), "-o", str(tmp_path / "out")]
    assert scale.main(sizes) == 1
    assert "holds no registration" in capsys.readouterr().err
    register = ["register", "-d", str(dataset.id), "-c", "3d_fullres", "-p", PLANS]
    assert main([*register, "--num_parts", "3", "--part_id", "1"]) == 0
    assert scale.main(sizes) == 0
    (row,) = json.loads((tmp_path / "out" / "scale.json").read_text())
    prepared = PreparedDataset.open(dataset=dataset.id, plans_name=PLANS, configuration="3d_fullres")
    own = sum(path.stat().st_size for path in prepared.folder.glob("case_01*"))
    assert (row["pairs"], row["files"], row["preprocessed_bytes"]) == (1, 3, own)
    assert row["with_pictures_percent"] > row["cache_percent"] > 0
    assert "| dataset | Dataset901_Tiny |" in capsys.readouterr().out
    (written,) = csv.DictReader((tmp_path / "out" / "table.csv").open())
    assert written["cache_bytes"] == str(row["cache_bytes"])


@pytest.mark.slow
def test_no_image_of_a_cached_case_is_read(tmp_path):
    assert scale.main(["--cases", "2", "5", "-np", "2", "-o", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "scale.json").read_text())
    assert [row["cases"] for row in rows] == [2, 5]
    # The atlas's own image is.
    assert [(row["images_read_first"], row["images_read_cached"]) for row in rows] == [(3, 1), (6, 1)]
    assert all(row["files_per_case"] == 2 for row in rows)
