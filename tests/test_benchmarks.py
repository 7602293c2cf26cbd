"""What the benchmarks of speed and memory make of their measurements, and the works they are about."""

import gzip
import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks import harness, kernels, memory, ours, whole_system
from benchmarks.harness import WORKS, Side
from jaxdiff.training.environment import ROOT


@pytest.mark.parametrize("name", [name for name, work in WORKS.items() if work.count])
def test_parameters_of_the_works(name):
    ours.new_generator(WORKS[name], harness.work_config(WORKS[name]))  # raises where there are not as many


def test_sides_take_turns_and_one_that_fails_does_not_stop_the_others(capsys):
    turns = []

    def build(name, limit):
        def run(steps):
            turns.append(name)
            if turns.count(name) > limit:
                raise MemoryError(f"{name} is full")

        return lambda: Side(run)

    def never():
        raise ImportError("not\n here")

    builders = {"ours": build("ours", 99), "eager": build("eager", 6), "compiled": never}
    results = harness.take_turns(builders, rounds=3, steps=1)
    assert len(results["ours"]["seconds"]) == 3
    assert results["eager"] == {"failed": "MemoryError: eager is full"}
    assert results["compiled"] == {"failed": "ImportError: not here"}
    assert turns == ["ours"] * 2 + ["eager"] * 2 + (["ours"] * 2 + ["eager"] * 2) * 2 + ["ours"] * 2 + ["eager"]
    rows = harness.speed_rows({**results, "ours": {"seconds": [0.1, 0.2, 0.4], "first_seconds": 3.0}}, 8, 1e9, 1e11)
    assert rows[0] == ["jaxdiff", "200.00", "40.0", "20.0 to 80.0", "5.0%", "1.00", "3"]
    assert rows[1][1] == "failed: MemoryError: eager is full"


def test_kernels_by_kind(tmp_path):
    names = {
        "group_norm_backward__2": "ours, by Pallas",
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop": "attention",
        "void cudnn::fusion::compute_dot_do_o_specialized<true, 64>": "attention",
        "attention_gradient_of_keys": "attention",
        "sm90_xmma_fprop_implicit_gemm_bf16": "convolutions and matrix products",
        "nvjet_sm90_tst_128x128": "convolutions and matrix products",
        "input_add_reduce_fusion_12": "reductions",
        "input_transpose_fusion_41": "copies",
        "loop_add_fusion_8": "elementwise",
        "something": kernels.OTHER,
    }
    assert {name: kernels.kind_of(name) for name in names} == names
    events = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "/device:GPU:0"}}]
    events += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": 2, "args": {"name": "Stream #1"}}]
    events += [{"ph": "X", "pid": 1, "tid": tid, "name": name, "dur": 3e3} for tid in (2, 9) for name in names]
    content = json.dumps({"traceEvents": events})
    (tmp_path / "x.trace.json.gz").write_bytes(gzip.compress(content.encode()))
    summary = kernels.summarise(kernels.read_kernels(tmp_path), steps=3)
    assert summary["seconds"]["convolutions and matrix products"] == pytest.approx(2e-3)
    assert len(summary["longest"]) == len(names)  # those of threads that are no streams do not count
    assert "| all | 10.00 |" in kernels.report(summary)


def test_largest_batch_by_a_straight_line():
    steps = {8: memory.Step(100, 80, 1.0, 1.0), 16: memory.Step(100, 160, 1.0, 1.0)}
    assert memory.extrapolate(steps, 1000.0) == 88  # 90, of which every image takes 10
    assert memory.extrapolate(steps, 50.0) == 0


def test_memory_of_several_sides(monkeypatch, capsys, tmp_path):
    def one_side(argv, name, side):
        step = {"side": side, "remat": "none", "batch": 8, "state": 2**30, "temporary": 2**31}
        step |= {"seconds": 0.5, "first_seconds": 1.0} if side == "ours" else {"failed": "no memory"}
        return {"parameters": 5, "capacity": 2**36, "steps": [step]}

    monkeypatch.setattr(harness, "choose_sides", lambda asked: asked.split(","))
    monkeypatch.setattr(memory, "one_side", one_side)
    memory.main(["--work=tiny", "--sides=ours,eager", f"--out={tmp_path / 'm.json'}"])
    ours, eager = capsys.readouterr().out.split("memory of the device 64.0 GiB")[1].splitlines()[4:6]
    assert "| 1.00 | 2.00 | 500.0 | 16.0 | 1 |" in ours and "failed: no memory" in eager
    assert len(json.loads((tmp_path / "m.json").read_text())["works"]["tiny"]["steps"]) == 2


def test_memory_finds_the_largest_batch(monkeypatch, capsys):
    def measure(work, config):
        if config.batch_size > 70:
            raise MemoryError("no room")
        return memory.Step(2**30, 2**30 * config.batch_size, 0.5, 1.0)

    monkeypatch.setattr(memory, "measure_ours", measure)
    monkeypatch.setattr(memory, "capacity", lambda: 80 * 2**30)
    memory.main(["--work=tiny", "--sides=ours", "--remat=blocks", "--largest"])
    table = capsys.readouterr().out.split("memory of the device 80.0 GiB")[1].splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert [row[:3] for row in cells] == [["jaxdiff", "blocks", batch] for batch in ("8", "16", "72", "64")]
    assert cells[0][3:] == ["1.00", "8.00", "500.0", "16.0", "1"]
    assert cells[2][3] == "failed: MemoryError: no room"
    with pytest.raises(SystemExit):
        memory.main(["--remat=some"])


def test_whole_system_by_the_clock(tmp_path):
    file = tmp_path / "metrics.jsonl"
    watch = whole_system.Watch(file)
    records = [{"images": n, "images_per_second": 100.0} for n in (10, 20, 30)] + [{"val_loss": 1.0}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"torn')
    assert [record for _, record in watch.close()] == records[:3]
    records[1]["checkpoint_seconds"], records[2]["checkpoint_seconds"] = 0.3, 0.1
    seen = [(0.0, records[0]), (0.4, records[1]), (0.9, records[2])]  # the last line comes after the end's checkpoint
    result = whole_system.summarise(seen, alone=125.0)
    assert result.pop("pauses") == {"validation": [], "checkpoint": [0.3, 0.1], "samples": []}
    assert result == pytest.approx({"alone": 125.0, "steady": 100.0, "clock": 25.0})
    assert whole_system.pause_rows({"checkpoint": [0.3, 0.1], "samples": []}, 20.0) == [
        ["checkpoint", "2", "0.30", "0.10", "0.50 %"]
    ]
    assert 0 < whole_system.line_seconds(tmp_path / "line") < 1


def test_kernels_of_a_compiled_program():
    text = """
%fused (p: f32[]) -> f32[] {
  ROOT %add = f32[] fusion(%p), kind=kLoop
}

ENTRY %main (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %norm.1 = (bf16[2]{0}, f32[2]{0}) custom-call(%p), custom_call_target="__gpu$xla.gpu.triton"
  %conv.1 = bf16[2]{0} custom-call(%p, %p), custom_call_target="__cudnn$convForward"
  %gemm_fusion_dot.3 = bf16[2]{0} fusion(%p), kind=kCustom
  %copy.2 = f32[] copy(%p)
  ROOT %loop_add_fusion = f32[] fusion(%copy.2), kind=kLoop
}
"""
    counted = run_planned(f"from benchmarks.planned import count_kernels as c; print(c({text!r}))")
    assert counted.stdout.strip() == "{'ours': 1, 'convolutions': 1, 'products': 1, 'others': 2}"


def test_what_is_planned_for_a_gpu_wants_its_plugin():
    if importlib.util.find_spec("jax_plugins"):
        pytest.skip("it is installed")
    refused = run_planned("from benchmarks.planned import main; main(['--work=tiny'])")
    assert refused.returncode == 2 and 'pip install "jax[cuda12]"' in refused.stderr


def run_planned(code):
    """In a process of its own: it sets what JAX runs on."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
