"""The benchmarks' own arithmetic and promises: turns, ratios, memory, goals, and no figure on a red test.

Nothing here asserts how fast anything is.
"""

import importlib
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# --- timing


def test_rivals_take_turns(monkeypatch):
    import harness

    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    calls = []
    rivals = {name: lambda name=name: calls.append(name) for name in "AB"}
    timings = harness.interleave(rivals, CPU, seconds=0.0)
    assert calls == ["A", "A", "B", "B"] + ["A", "B"] * harness.MIN_TURNS  # the warm-up, then the turns
    assert all(len(timing.samples) == harness.MIN_TURNS for timing in timings.values())


def test_a_short_call_is_repeated_within_a_sample(monkeypatch):
    import harness

    ticks = iter(range(10_000))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(ticks) / 1000)  # a call "takes" 1 ms
    calls = []
    timings = harness.interleave({"A": lambda: calls.append(1)}, CPU, seconds=0.0)
    assert len(calls) == 2 + 10 * harness.MIN_TURNS  # 10 ms a sample
    assert timings["A"].median == pytest.approx(0.001 / 10)


def test_a_ratio_is_the_median_of_the_turns_ratios():
    from harness import Timing, ratio

    slow, fast = Timing((2.0, 30.0, 8.0)), Timing((1.0, 10.0, 2.0))
    assert ratio(slow, fast) == {"median": 3.0, "q1": 2.5, "q3": 3.5}
    assert slow.median == 8.0 and slow.quartiles == (5.0, 19.0)


def test_the_environment_names_what_a_figure_needs():
    import harness

    record = harness.environment(CPU, "float32")
    assert {"commit", "device", "threads", "precision", "tf32", "backends", "versions"} <= set(record)
    assert record["threads"] == torch.get_num_threads()
    assert set(record["backends"]) == {"causal_conv1d", "selective_scan", "bimamba"}


def test_the_backend_named_is_the_one_of_the_measured_precision(monkeypatch):
    import harness
    import mamba_ssm.ops.backend

    asked, choose = [], mamba_ssm.ops.backend.choose

    def note(op, device, dtype, *sizes):
        asked.append(dtype)
        return choose(op, device, dtype, *sizes)

    monkeypatch.setattr(mamba_ssm.ops.backend, "choose", note)
    for precision in ("bfloat16-weights", "bfloat16 and float32", "float32"):
        harness.environment(CPU, precision)
    assert asked == 2 * [torch.bfloat16] + 2 * [torch.bfloat16] + 2 * [torch.float32]


# --- the gate


@pytest.fixture
def kernel_package(monkeypatch, tmp_path):
    """A stand-in for the kernel packages: writes its one test, says how often that ran."""
    import harness

    (tmp_path / "kernel" / "tests").mkdir(parents=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "KERNEL_PACKAGES", ("kernel",))
    monkeypatch.setattr(harness, "VERDICTS", tmp_path / "output" / "green.json")

    def write(body):
        (tmp_path / "kernel" / "tests" / "test_kernel.py").write_text(
            f"def test_kernel():\n    open({str(tmp_path / 'runs')!r}, 'a').write('x')\n    {body}\n"
        )

    def runs():
        return (tmp_path / "runs").stat().st_size

    return write, runs


def test_red_kernel_tests_end_the_program_without_a_figure(kernel_package):
    import harness

    write, runs = kernel_package
    write("assert False")
    for times in (1, 2):
        with pytest.raises(SystemExit, match="no figures"):
            harness.require_green_tests(CPU)
        assert runs() == times


def test_a_green_verdict_holds_until_a_kernel_file_changes(kernel_package):
    import harness

    write, runs = kernel_package
    write("pass")
    harness.require_green_tests(CPU)
    harness.require_green_tests(CPU)
    assert runs() == 1
    write("pass  # another file")
    harness.require_green_tests(CPU)
    assert runs() == 2


@pytest.mark.parametrize(
    ("switch", "value"),
    [
        ("MAMBA_SSM_BACKEND", "reference"),
        ("MAMBA_SSM_CPU_ISA", "avx2"),
        ("CAUSAL_CONV1D_CPU_ISA", "avx2"),
        ("TRITON_INTERPRET", "1"),
    ],
)
def test_a_green_verdict_is_not_that_of_other_switches(switch, value, kernel_package, monkeypatch):
    import harness

    monkeypatch.delenv(switch, raising=False)
    before = harness.kernel_digest(CPU)
    assert before == harness.kernel_digest(CPU)
    monkeypatch.setenv(switch, value)
    assert before != harness.kernel_digest(CPU)


def test_a_green_verdict_is_not_that_of_another_gpu(kernel_package, monkeypatch):
    import harness

    names = iter(["one GPU", "one GPU", "another GPU"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: next(names))
    first, same, other = (harness.kernel_digest(torch.device("cuda")) for _ in range(3))
    assert first == same != other


@pytest.mark.parametrize("name", ["dense_backbones", "ops", "reliability_cost", "run", "stability", "vim_vs_deit"])
def test_every_figure_of_the_kernels_comes_after_their_tests(name, tmp_path, monkeypatch):
    import harness

    asked = []

    def red(device):
        asked.append(device.type)
        sys.exit("The kernels' tests are red: no figures.")

    monkeypatch.setattr(harness, "require_green_tests", red)
    device = [] if name == "reliability_cost" else ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [name, *device, "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="no figures"):
        importlib.import_module(name).main()
    assert asked == ["cpu"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "flag"), [("compare", "--px"), ("dense_backbones", "--attention"), ("vim_vs_deit", "--attention")]
)
def test_a_command_over_two_lines_can_be_pasted_from_the_help(name, flag):
    text = importlib.import_module(name).__doc__
    assert f" \\\n        {flag} " in text and max(map(len, text.splitlines())) <= 120


# --- subjects


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash", "math"])
def test_every_attention_backend_computes_the_same_deit(attention):
    import subjects
    from subjects import Subject

    subject = Subject(f"deit_tiny_patch16_224/{attention}", px=64, batch=2)
    chosen = subjects.attention_chosen(subject)
    assert chosen == attention or attention == "sdpa"
    expected = subjects.build(Subject("deit_tiny_patch16_224/eager", px=64, batch=2))()
    assert torch.allclose(subjects.build(subject)(), expected, atol=1e-4)


def assert_trains(subject, monkeypatch):
    """Every weight has a gradient, and a step changes it."""
    import subjects

    model = subjects.build_model(subject)
    monkeypatch.setattr(subjects, "build_model", lambda _: model)
    run = subjects.build(subject)
    before = [parameter.clone() for parameter in model.parameters()]
    run()
    for old, (name, parameter) in zip(before, model.named_parameters(), strict=True):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert not torch.equal(old, parameter), name


def test_a_step_trains_and_inference_keeps_no_graph(monkeypatch):
    import subjects
    from subjects import Subject

    assert not subjects.build(Subject("vim_tiny_patch16_224", px=32, batch=1))().requires_grad
    assert_trains(Subject("vim_tiny_patch16_224", px=32, batch=1, mode="step"), monkeypatch)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "deit_tiny_patch16_224/fused"}, "unknown attention 'fused'.*eager, sdpa, flash"),
        ({"mode": "train"}, "unknown mode 'train'.*infer, backward, step"),
        ({"precision": "int8"}, "unknown precision 'int8'.*float32"),
        ({"mode": "step", "precision": "bfloat16-weights"}, "is for inference"),
    ],
)
def test_a_misspelt_subject_is_refused(change, message):
    from subjects import Subject

    with pytest.raises(ValueError, match=message):
        Subject(**({"name": "vim_tiny_patch16_224", "px": 64, "batch": 1} | change))


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "deit_tiny_patch16_224/sdpa"])
def test_a_subject_with_a_pyramid_gives_four_levels_and_trains(name, monkeypatch):
    import subjects
    from subjects import Subject

    levels = subjects.build(Subject(name, px=64, batch=1, pyramid=True))()
    assert [tuple(level.shape) for level in levels] == [(1, 192, side, side) for side in (16, 8, 4, 2)]
    assert_trains(Subject(name, px=64, batch=1, mode="step", pyramid=True), monkeypatch)


@pytest.mark.slow
def test_backbones_with_a_pyramid_are_measured_into_a_table(tmp_path):
    import dense_backbones
    from vim_vs_deit import Case, Settings

    settings = Settings(CPU, "float32", "none", ("sdpa",), seconds=0.0)
    result = dense_backbones.run([Case("infer", "tiny", 64)], settings, tmp_path)
    vim, deit = result["measurements"]
    assert vim["pyramid"] and deit["pyramid"] and vim["peak_memory"] > 0 and "first_faster_by" in deit
    table = (tmp_path / "dense_cpu.md").read_text()
    assert "four levels" in table and "| 64 | 1 | vim_tiny |" in table and "deit_tiny, sdpa" in table


@pytest.mark.slow
def test_where_no_peak_can_be_measured_the_times_are(tmp_path, monkeypatch):
    import dense_backbones
    from vim_vs_deit import Case, Settings

    monkeypatch.setattr(sys, "platform", "darwin")
    settings = Settings(CPU, "float32", "none", ("sdpa",), seconds=0.0)
    result = dense_backbones.run([Case("infer", "tiny", 64)], settings, tmp_path)
    assert all(record["peak_memory"] is None and record["seconds"] > 0 for record in result["measurements"])
    assert "does not fit" not in (tmp_path / "dense_cpu.md").read_text()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_sees_the_attention_matrix():
    """Eager attention at 640 px holds at least two 1601 x 1601 matrices of 3 heads: 61 MB."""
    import memory
    from subjects import Subject

    names = ("deit_tiny_patch16_224/eager", "deit_tiny_patch16_224/sdpa")
    eager, fused = memory.peak_memory([Subject(name, px=640, batch=1) for name in names])
    assert eager > 61e6
    assert eager > fused + 40e6


# --- goals


def model_results(**fields):
    record = {"name": "deit_tiny_patch16_224/sdpa", "px": 1248, "mode": "infer", "batch": 1} | fields
    return {"models": {"environment": {"commit": "abc"}, "measurements": [record], "growth": {"median": 1.1}}}


def test_a_goal_is_met_or_not_or_not_yet_measured():
    import targets

    results = model_results(first_faster_by={"median": 3.4}, peak_memory=100)
    lines = targets.table(targets.CPU_GOALS, results).splitlines()
    assert "| >= 3.3x | 3.4x | yes |" in lines[2]
    assert "| <= 1.15x | 1.1x | yes |" in lines[-1]
    assert sum("not yet measured" in line for line in lines) == len(targets.CPU_GOALS) - 2
    lines = targets.table(targets.CPU_GOALS, model_results(first_faster_by={"median": 3.2})).splitlines()
    assert "| >= 3.3x | 3.2x | no |" in lines[2]


def test_memory_and_rates_are_converted_to_the_goals_units():
    import targets

    tokens_and_layers = 128 * 197 * 24
    training = {"px": 224, "mode": "backward", "batch": 128, "peak_memory": tokens_and_layers * 1500}
    inference = {"px": 1248, "mode": "infer", "batch": 64, "peak_memory": 3.5e9}
    records = [{"name": "vim_tiny_patch16_224"} | fields for fields in (training, inference)]
    text = targets.table(targets.GPU_GOALS, {"models": {"measurements": records}})
    assert "| 1,500 bytes | yes |" in text
    assert "| 3.5 GB | yes |" in text


def test_the_goals_file_is_rewritten_from_the_results(tmp_path):
    import targets

    results = model_results(first_faster_by={"median": 4.0})
    (tmp_path / "vim_vs_deit_cpu.json").write_text(json.dumps(results["models"]))
    assert "- commit: abc" in targets.write(tmp_path)
    assert "| 4x | yes |" in (tmp_path / "targets.md").read_text()


def test_every_goal_asks_for_a_case_that_the_full_run_measures():
    """A goal that no plan feeds would stay "not yet measured" for ever."""
    import run
    import targets
    from vim_vs_deit import rivals

    wanted = {"cpu": targets.CPU_GOALS, "cuda": targets.GPU_GOALS}
    for device, goals in wanted.items():
        settings = run.settings_for(torch.device(device), quick=False)
        subjects = [
            subject
            for case in run.PLANS[device, "full"]
            for subject in rivals(case.size, case.px, case.batch, case.mode, settings)
        ]
        figures = {"peak_memory": 1, "images_per_second": 1.0, "first_faster_by": {"median": 1.0}}
        records = [subject.fields() | figures for subject in subjects]
        verdict = {"finite": True, "falls": True, "as_float32": True}
        stability = {"model": "vim_tiny_patch16_224", "px": 224, "steps": 1000, "verdict": verdict}
        models = {"measurements": records, "growth": {"median": 1.0}}
        results = {"models": models, "stability": stability}
        unfed = [goal.work for goal in goals if goal.measure(results) is None]
        elsewhere = ("selective scan", "forward + backward of the mixer", "the same against the published")
        assert [work for work in unfed if not work.startswith(elsewhere)] == []


def test_stability_counts_for_a_run_long_enough_of_that_model():
    import targets

    goal = targets.GPU_GOALS[-1]
    verdict = {"finite": True, "falls": True, "as_float32": True}
    run = {"model": "vim_tiny_patch16_224", "px": 224, "steps": 1000, "verdict": verdict}
    assert goal.met(goal.measure({"stability": run}))
    assert not goal.met(goal.measure({"stability": run | {"verdict": verdict | {"falls": False}}}))
    for change in ({"steps": 100}, {"px": 64}, {"model": "vim_small_patch16_224"}):
        assert goal.measure({"stability": run | change}) is None
    assert goal.measure({}) is None


# --- figures of Vim against DeiT


def test_a_figure_follows_from_its_times():
    from harness import Timing
    from vim_vs_deit import Ready, Settings, record_of, rivals, table

    vim, deit = rivals("tiny", 224, 8, "infer", Settings(CPU, "float32", "none", ("eager",), seconds=0.0))
    timings = {vim: Timing((1.0, 2.0, 4.0)), deit: Timing((3.0, 4.0, 12.0))}
    record = record_of(deit, Ready(None, 5_000_000, "eager"), timings, vim)
    assert (record["tokens"], record["seconds"], record["images_per_second"]) == (14 * 14 + 1, 4.0, 2.0)
    assert (record["seconds_q1"], record["seconds_q3"]) == (3.5, 8.0)
    assert record["first_faster_by"]["median"] == 3.0  # of the turns' 3, 2 and 3
    assert "| 224 | 8 | deit_tiny, eager | 2 | 1 to 2.29 | 3.00x | 5 |" in table([record], "infer")


def test_growth_is_the_time_of_a_token_over_that_of_another(monkeypatch):
    import vim_vs_deit
    from harness import Timing

    monkeypatch.setattr(vim_vs_deit.subjects, "build", lambda subject: subject.px)
    times = {512: Timing((1.0, 2.0, 1.0)), 1248: Timing((6.0, 12.0, 9.0))}
    monkeypatch.setattr(vim_vs_deit.harness, "interleave", lambda calls, device, seconds: times)
    settings = vim_vs_deit.Settings(CPU, "float32", "none", (), seconds=0.0)
    assert vim_vs_deit.growth("tiny", settings)["median"] == pytest.approx(6.0 * (32**2 + 1) / (78**2 + 1))


# --- a whole run, small


@pytest.mark.slow
def test_a_run_leaves_numbers_a_table_and_a_figure(tmp_path, monkeypatch):
    import harness
    import vim_vs_deit
    from vim_vs_deit import Case, Settings

    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(vim_vs_deit, "growth", lambda size, settings: None)
    settings = Settings(CPU, "float32", "none", ("sdpa", "eager"), seconds=0.0)
    vim_vs_deit.run([Case("infer", "tiny", 64, 2), Case("step", "tiny", 64, 2)], settings, tmp_path)
    record = json.loads((tmp_path / "vim_vs_deit_cpu.json").read_text())
    assert len(record["measurements"]) == 6
    assert all(measured["images_per_second"] > 0 for measured in record["measurements"])
    table = (tmp_path / "vim_vs_deit_cpu.md").read_text()
    assert "### Inference" in table and "### Training step" in table and "deit_tiny, eager" in table
    assert (tmp_path / "vim_vs_deit_cpu_tiny.png").stat().st_size > 10_000


def test_the_rivals_of_a_kernel_compute_the_same_function(monkeypatch):
    import ops

    ops.check_agreement(CPU, torch.float32)
    monkeypatch.setattr(ops, "causal_conv1d_ref", lambda x, *args, **options: 1.5 * x)
    with pytest.raises(SystemExit, match="not the same function"):
        ops.check_agreement(CPU, torch.float32)


def test_a_hidden_package_is_not_imported_and_comes_back():
    import mamba_ssm
    from ops import hidden

    with hidden("mamba_ssm"), pytest.raises(ImportError):
        import mamba_ssm.ops
    assert sys.modules["mamba_ssm"] is mamba_ssm


@pytest.mark.parametrize("text", ["224", "224:x", "a:1", "1:2:3"])
def test_a_misspelt_batch_is_one_readable_line(text):
    from vim_vs_deit import parse_batch

    assert parse_batch(["224:8", "512:2"]) == {224: 8, 512: 2}
    with pytest.raises(SystemExit, match="takes PX:BATCH"):
        parse_batch([text])


# --- where time goes


def test_kernel_times_are_of_one_pass():
    from kernel_times import kernel_times

    x = torch.randn(64, 64)
    rows = kernel_times(lambda: (x @ x).relu() @ x, CPU)
    calls = {row.name: row.calls for row in rows}
    assert calls["aten::mm"] == 2 and calls["aten::relu"] == 1
    assert [row.microseconds for row in rows] == sorted((row.microseconds for row in rows), reverse=True)


def test_the_table_of_kernel_times_adds_up():
    from kernel_times import Row, table

    rows = [Row("first|kernel", 2, 600.0), Row("second", 1, 300.0), Row("third", 4, 60.0), Row("fourth", 1, 40.0)]
    assert table(rows, top=2).splitlines()[2:] == [
        "| first/kernel | 2 | 300.0 | 600 | 60.0 |",
        "| second | 1 | 300.0 | 300 | 30.0 |",
        "| 2 others | 5 | 20.0 | 100 | 10.0 |",
        "| all | 8 |  | 1000 | 100 |",
    ]


# --- two checkouts


def write_checkout(folder, body):
    """A checkout whose `subjects.build` has this body."""
    (folder / "benchmarks").mkdir(parents=True)
    for name in ("harness.py", "memory.py"):
        (folder / "benchmarks" / name).symlink_to(ROOT / "benchmarks" / name)
    (folder / "benchmarks" / "subjects.py").write_text(
        "import os, time, torch\nfrom types import SimpleNamespace as Subject\n"
        f"PRECISIONS = {{'float32': (torch.float32, False)}}\ndef build(subject):\n    {body}\n"
    )
    return folder


def test_each_checkout_runs_its_own_code_in_turns(tmp_path, monkeypatch):
    import compare
    from subjects import Subject

    calls = tmp_path / "calls"
    note = "os.system('echo no answer'); return lambda: open({!r}, 'a').write({!r})"
    for name in "ab":
        write_checkout(tmp_path / name, note.format(str(calls), name))
    monkeypatch.setattr(compare.harness, "ROOT", tmp_path / "a")
    case = Subject("vim_tiny_patch16_224", 224, 2)
    rows = list(compare.compare(tmp_path / "b", [case, case], "graph", 0.0, threads=1))
    said = "vim_tiny_patch16_224, inference, 224 px, batch 2"
    assert [row[:2] for row in rows] == [[said, "here"], [said, "there"]] * 2
    assert all(float(row[2].replace(",", "")) > 0 for row in rows)
    assert [bool(row[4]) for row in rows] == [True, False] * 2
    turns = "".join(letter for letter, _ in itertools.groupby(calls.read_text()))
    assert turns == "ab" * compare.TURNS * 2


@pytest.mark.parametrize("ends", ["raise ValueError('no such model')", "os.kill(os.getpid(), 9)"])
def test_a_checkout_that_fails_is_named(ends, tmp_path):
    import compare

    checkout = compare.Checkout(write_checkout(tmp_path, ends))
    status = "1" if "raise" in ends else "-9"
    for _ in range(2):  # the second request finds nobody there
        with pytest.raises(SystemExit, match=rf"{re.escape(str(tmp_path))}: its process ended \(status {status}\)"):
            checkout.ask(build={"device": "cpu", "precision": "float32"}, launch="graph")
    checkout.close()


@pytest.mark.slow
def test_this_checkout_against_itself(capsys, monkeypatch):
    import compare

    flags = ["--model", "vim_nano_patch4_32", "--px", "32", "--batch", "32:2", "--modes", "step", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["compare.py", str(ROOT), *flags])
    compare.main()
    here, there = capsys.readouterr().out.splitlines()[-2:]
    assert here.startswith("| vim_nano_patch4_32, training step, 32 px, batch 2 | here |") and " | there | " in there
    backends = [line.split(" | ")[-1].removesuffix(" |") for line in (here, there)]
    assert backends[0] == backends[1] and backends[0].startswith("mamba_ssm.ops.")


def test_a_folder_that_is_no_checkout_is_refused(tmp_path, monkeypatch):
    import compare

    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="is no checkout of this project: make one with `git worktree add"):
        compare.main()
