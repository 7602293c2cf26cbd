"""scores.json, which several processes may write to at once."""

import subprocess
import sys

from jaxdiff.evaluation.records import add_record, read_scores, write_validation

ADD = """
import pathlib, sys
from jaxdiff.evaluation.records import add_record
for k in range(40):
    add_record(pathlib.Path(sys.argv[1]), {"protocol": {"num": k, "who": sys.argv[2]}, "scores": {}})
"""


def test_no_record_is_lost(tmp_path):
    processes = [subprocess.Popen([sys.executable, "-c", ADD, str(tmp_path), who]) for who in ("a", "b")]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert len(read_scores(tmp_path)["records"]) == 80
    write_validation(tmp_path, {"val_loss": 1.0}, 5)
    add_record(tmp_path, {"protocol": {"num": 3, "who": "a"}, "scores": {"fd": 1.0}})  # in the place of the other
    scores = read_scores(tmp_path)
    assert len(scores["records"]) == 80 and scores["validation"] == {"val_loss": 1.0, "val_images": 5}
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]
