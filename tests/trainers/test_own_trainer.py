"""The example of docs/how_to/write_a_trainer.md: nnU-Net finds the class, and it can be sent to another process."""

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "write_a_trainer.md"
LOOKUP = """
import pickle
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunet_oneshot.trainers import OneShotDistillTrainer
found = recursive_find_trainer_class_by_name("MyTrainer")
assert issubclass(found, OneShotDistillTrainer)
assert pickle.loads(pickle.dumps(found)) is found
print("found", found.epochs, found.real_share)
"""


def test_nnunet_finds_a_derived_trainer_that_can_be_pickled(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name, block in zip(("code/my_trainers.py", "found/my_found_trainers.py"), blocks, strict=True):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(block, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path / "code"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "nnUNet_extTrainer": str(tmp_path / "found")}
    done = subprocess.run([sys.executable, "-c", LOOKUP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"found 300 {1 / 3}" in done.stdout
