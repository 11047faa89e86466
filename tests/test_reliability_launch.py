"""R4 and R5 with the launcher itself: signals reach the ranks, dead ranks come back, exit codes pass through.

Promises and their numbers: docs/RELIABILITY.md.
"""

import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import distributed
import launch as launch_module
import run_with_submitit
from checkpoint import read_checkpoint
from processes import QUICK, STEPS, end, pieces, start_ranks

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = [sys.executable, str(ROOT / "vim" / "launch.py"), "--standalone", "--nproc_per_node=2"]
WITH_TINY = "import sys; sys.path[:0] = ['tests', 'vim']; import tiny, main, distributed; "


def program(tmp_path: Path, body: str) -> str:
    """A file for the launcher to run."""
    path = tmp_path / "program.py"
    path.write_text(body)
    return str(path)


def main_program(tmp_path: Path) -> str:
    """main.py, which also knows the tests' model, and tells where it hangs if it does."""
    watch = "import faulthandler; faulthandler.dump_traceback_later(200, exit=True); "
    return program(tmp_path, f"{watch}{WITH_TINY}distributed.leave(main.main())")


def launch(command: list[str], **environment: str) -> subprocess.Popen:
    return begin([*LAUNCH, *command], **environment)


def begin(command: list[str], **environment: str) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, preexec_fn=as_without_nohup, **pipes)


def as_without_nohup() -> None:
    """The tests themselves may run under it."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def launch_machines(command: list[str], **environment: str) -> list[subprocess.Popen]:
    """Two launchers with a rank each, as on two machines, that meet at an address of the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    launchers = [[sys.executable, LAUNCH[1], *where, f"--node_rank={rank}", *command] for rank in (0, 1)]
    return [begin(launcher, **environment) for launcher in launchers]


def two_ranks_without_launcher(tmp_path_factory, epochs: int) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    flags = f"{QUICK} --batch-size 64 --epochs {epochs} --output_dir {folder / 'run'}"
    assert end(start_ranks(flags, folder / "out")) == [0, 0]
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The run of two ranks that the others must equal."""
    return two_ranks_without_launcher(tmp_path_factory, epochs=2)


@pytest.fixture(scope="module")
def undisturbed_for_longer(tmp_path_factory):
    """The same over six epochs, in which there is time for a signal from outside."""
    return two_ranks_without_launcher(tmp_path_factory, epochs=6)


@pytest.mark.slow
def test_a_rank_killed_in_mid_step_is_started_again_and_the_run_is_the_same(undisturbed, tmp_path):
    flags = f"{QUICK} --batch-size 64 --checkpoint-steps 5 --resume auto"
    flags += f" --output_dir {tmp_path / 'run'}"
    process = launch([main_program(tmp_path), *flags.split()], VIM_FAULT="kill@13:1")
    try:
        text, _ = process.communicate(timeout=240)
    finally:
        process.terminate()  # the launcher ends its ranks
    assert process.returncode == 0, text
    assert "resuming (restart 1)" in text and "on the way: 1 x resumed" in text, text
    assert pieces(tmp_path / "run") == pieces(undisturbed)


@pytest.mark.slow
def test_a_rank_killed_on_one_machine_restarts_those_of_all(undisturbed, tmp_path):
    """Through a meeting of their own, not the dead ranks' (see launch.py): without a failed attempt in between."""
    flags = f"{QUICK} --batch-size 64 --checkpoint-steps 5 --resume auto --output_dir {tmp_path / 'run'}"
    machines = launch_machines([main_program(tmp_path), *flags.split()], VIM_FAULT="kill@13:1")
    try:
        text = "".join(machine.communicate(timeout=240)[0] for machine in machines)
    finally:
        for machine in machines:
            machine.terminate()
    assert [machine.returncode for machine in machines] == [0, 0], text
    assert "on the way: 1 x resumed" in text and "failed to connect" not in text, text
    assert pieces(tmp_path / "run") == pieces(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGUSR1, distributed.EXIT_REQUEUE, "SIGUSR1"), (signal.SIGKILL, -signal.SIGKILL, "SIGTERM")],
)
def test_a_signal_to_the_launcher_saves_asks_for_a_requeue_and_the_resumed_run_is_the_same(
    number, code, said, undisturbed_for_longer, tmp_path
):
    """SIGUSR1, by which torchrun alone would die and leave its ranks behind; loader processes live on. Of a SIGKILL,
    which it cannot pass on, the ranks hear by its death."""
    flags = f"{QUICK} --batch-size 64 --num_workers 1 --epochs 6 --resume auto --output_dir {tmp_path / 'run'}"
    process = launch([main_program(tmp_path), *flags.split()])
    try:
        next(line for line in process.stdout if "step 3/11" in line)
        process.send_signal(number)
        text, _ = process.communicate(timeout=240)  # until the ranks have closed it, too
    finally:
        process.kill()
    assert process.returncode == code, text
    assert f"stopped by {said}" in text
    assert 3 <= read_checkpoint(tmp_path / "run" / "checkpoint.pth").step < 6 * STEPS
    assert end(start_ranks(flags, tmp_path / "out")) == [0, 0]
    assert pieces(tmp_path / "run") == pieces(undisturbed_for_longer)


@pytest.mark.slow
def test_a_rank_that_lost_one_which_no_restart_mends_is_not_restarted_either(tmp_path):
    """In a second attempt the injected fault would be gone and the run would end well."""
    process = launch([main_program(tmp_path), *f"{QUICK} --batch-size 64".split()], VIM_FAULT="oom@3:1")
    text, _ = process.communicate(timeout=240)
    assert process.returncode == distributed.EXIT_CONFIG, text
    assert "error: out of memory" in text and "error: another rank died" in text


END = """
import os, sys
open(sys.argv[1], "a").write("x")  # before torch is imported: torchrun ends a rank whose peer has ended with 1
sys.path[:0] = ["vim"]
import distributed
rank, restart = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
"""
CLEAN_TMP = "__import__('shutil').rmtree(os.path.dirname(os.environ[distributed.EXIT_CODE_FILE]), ignore_errors=True)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last_line", "code", "starts"),
    [
        ("distributed.leave(4)", 4, 2),
        ("distributed.leave(1)", 1, 4),
        ("distributed.leave(0) if restart else distributed.leave(4) if rank == 0 else sys.exit(1)", 0, 4),
        ("distributed.leave(4) if restart else sys.exit(1)", 4, 4),
        ("distributed.leave(75) if rank == 0 else sys.exit(1)", 1, 4),
        (f"distributed.leave(4) if restart else sys.exit({CLEAN_TMP} or 1)", 4, 4),
    ],
)
def test_exit_codes_pass_through_and_only_what_a_restart_may_mend_is_restarted(last_line, code, starts, tmp_path):
    process = launch(["--max-restarts=1", program(tmp_path, END + last_line), str(tmp_path / "starts")])
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    assert len((tmp_path / "starts").read_text()) == starts


LONG_STEP = """
import sys, time
sys.path[:0] = ["vim"]
import distributed
distributed.tell(None)
with distributed.StopSignal() as stop:
    sys.stdout.write("in a step\\n")  # at once: with print, two ranks' lines may run together
    while stop.received is None:
        time.sleep(0.1)
    time.sleep(3)
open(sys.argv[1], "a").write(f"{stop.received} ")
distributed.leave(75)
"""
HUP, TERM = signal.SIGHUP, signal.SIGTERM

HANGING_LOADER = """
import atexit, multiprocessing, signal, sys, time
sys.path[:0] = ["vim"]
import distributed
def hang(begun):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    begun.set()
    time.sleep(600)
context = multiprocessing.get_context("fork")
begun = context.Event()
context.Process(target=hang, args=(begun,), daemon=True).start()
begun.wait()
atexit.register(print, "registered for the end")
distributed.leave(3)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "signals", "code", "saved"),
    [
        pytest.param([], [HUP], 75, "SIGHUP SIGHUP ", id="a closed terminal is a stop"),
        pytest.param(["nohup"], [HUP, TERM], 75, "SIGTERM SIGTERM ", id="but not under nohup"),
        pytest.param([], [TERM] * 4, 75, "SIGTERM SIGTERM ", id="further signals change nothing"),
        pytest.param([], [signal.SIGQUIT], 1, "", id="SIGQUIT ends the ranks too, at once"),
    ],
)
def test_the_launcher_leaves_after_its_ranks(before, signals, code, saved, tmp_path):
    (tmp_path / "saved").touch()
    process = begin([*before, *LAUNCH, program(tmp_path, LONG_STEP), str(tmp_path / "saved")])
    try:
        for _ in range(2):
            next(line for line in process.stdout if "in a step" in line)
        for number in signals:
            process.send_signal(number)
            time.sleep(0.5)  # two at once are one
        assert process.wait(timeout=60) == code
        assert (tmp_path / "saved").read_text() == saved
        process.communicate(timeout=60)  # ranks that were left behind would not let it end
    finally:
        process.kill()


def test_a_process_leaves_without_waiting_for_a_loader_that_hangs():
    """Python's own end would: multiprocessing sends SIGTERM and waits."""
    done = subprocess.run([sys.executable, "-c", HANGING_LOADER], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, "registered for the end\n"), done.stderr


def test_a_process_without_standard_error_leaves_with_its_code():
    """Where the descriptor is closed, Python has no such stream."""
    program = "import sys; sys.path[:0] = ['vim']; import distributed; distributed.leave(3)"
    done = subprocess.run(["bash", "-c", '"$0" -c "$1" 2>&-', sys.executable, program], cwd=ROOT, timeout=60)
    assert done.returncode == 3


BESIDE_TORCHRUN = """
import os, signal, sys
sys.path.insert(0, "vim")
import launch
def torchrun(args):
    if sys.argv[1] == "before":
        os.kill(os.getpid(), signal.SIGUSR1)
launch.torchrun.run = torchrun
code = launch.launch(["--standalone", "main.py"])
for number in launch.StopSignal.HANDLED:
    os.kill(os.getpid(), number)
sys.exit(code)
"""


@pytest.mark.parametrize(("when", "code"), [("before", distributed.EXIT_REQUEUE), ("after", 0)])
def test_a_signal_beside_torchrun_does_not_kill_the_launcher(when, code):
    """SLURM sends it once: while torch is being imported, or when the run has just ended, as it may be."""
    done = subprocess.run([sys.executable, "-c", BESIDE_TORCHRUN, when], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("stopped by SIGUSR1 while not training" in done.stderr) == (when == "before")


def test_outside_the_launcher_exit_codes_are_the_programs_own(monkeypatch, tmp_path):
    monkeypatch.delenv(distributed.EXIT_CODE_FILE, raising=False)
    assert [distributed.exit_code(code) for code in (0, 1, 3, 4, 75)] == [0, 1, 3, 4, 75]


def test_the_launcher_is_told_what_no_restart_mends(monkeypatch, tmp_path):
    """By the ranks of the last group: those of one before it have been started again."""
    path = str(tmp_path / "codes")
    monkeypatch.setenv(distributed.EXIT_CODE_FILE, path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert distributed.told_end(path) is None
    assert [distributed.exit_code(code) for code in (0, 1, 75, 4, 1)] == [0, 1, 0, 0, 0]
    assert distributed.told_end(path) == 75
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    distributed.tell(None)
    assert distributed.told_end(path) is None and distributed.exit_code(1) == 1


def test_a_folder_that_tmp_was_cleaned_of_is_made_again(monkeypatch, tmp_path):
    path = str(tmp_path / "gone" / "codes")
    monkeypatch.setenv(distributed.EXIT_CODE_FILE, path)
    assert distributed.exit_code(4) == 0 and distributed.told_end(path) == 4


# --- run_with_submitit.py


@pytest.fixture
def submitit(monkeypatch):
    """The part of submitit that is used; what it was asked for is in `asked`."""
    asked = {}

    class SlurmExecutor:
        def __init__(self, folder):
            asked["folder"] = folder

        def update_parameters(self, **parameters):
            asked["parameters"] = parameters

        def submit(self, what):
            asked["what"] = what
            return types.SimpleNamespace(job_id="17")

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(SlurmExecutor=SlurmExecutor))
    return asked


def test_a_submitted_job_resumes_by_itself_and_is_warned_in_time(submitit, tmp_path, capsys):
    flags = ["--model", "vim_tiny_patch16_224", "--output_dir", str(tmp_path)]
    assert run_with_submitit.main(["--nodes", "2", "--ngpus", "4", "--", *flags]) == 0
    assert submitit["what"].flags == [*flags, "--resume", "auto"]
    wanted = {"nodes": 2, "ntasks_per_node": 4, "gpus_per_node": 4, "signal_delay_s": 300}
    assert submitit["parameters"].items() >= wanted.items() and "partition" not in submitit["parameters"]
    assert "submitted job 17" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--epochs", "3"], ["--eval", "--output_dir", "x"]])
def test_flags_that_cannot_work_are_refused_before_the_queue(flags, submitit, capsys):
    assert run_with_submitit.main(["--", *flags]) == distributed.EXIT_CONFIG
    assert capsys.readouterr().err.startswith("error: --") and "what" not in submitit


def test_without_submitit_the_package_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_with_submitit.main(["--", "--output_dir", "x"]) == distributed.EXIT_CONFIG
    assert "pip install submitit" in capsys.readouterr().err


def test_a_wrong_number_of_nodes_is_one_line(capsys):
    with pytest.raises(SystemExit) as left:
        run_with_submitit.main(["--nodes", "0", "--", "--output_dir", "x"])
    said = capsys.readouterr().err
    assert left.value.code == 2 and "--nodes: 0 is not a positive whole number" in said and said.count("\n") == 1


SCONTROL = """#!/bin/sh
echo "$@" >> "$SCONTROL_LOG"
[ "$1" != show ] || printf 'node7\\nnode8\\n'
"""


def test_a_task_stopped_while_torch_is_imported_queues_its_job_again(monkeypatch):
    """submitit's own handler would end the job for good."""
    asked = []

    class BeingImported(types.ModuleType):
        def __getattr__(self, name):
            signal.raise_signal(signal.SIGUSR2)
            return lambda flags: pytest.fail("trained all the same")

    monkeypatch.setitem(sys.modules, "main", BeingImported("main"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(run_with_submitit.Training, "_find_peers", lambda self: None)
    monkeypatch.setattr(run_with_submitit.subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert run_with_submitit.Training([])() == distributed.EXIT_REQUEUE
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert asked == [["scontrol", "requeue", "17"]]


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False)])
def test_a_stopped_task_queues_its_job_again(code, requeued, monkeypatch, tmp_path):
    """The rank finds its peers in SLURM's variables, and submitit's signal reaches the run as one it knows."""
    import main

    def trained(flags):
        with distributed.StopSignal() as stop:
            signal.raise_signal(signal.SIGUSR2)
        assert stop.received == "SIGUSR1"
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("0", "16", "node7")
        return code

    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0"}
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SCONTROL_LOG": str(tmp_path / "log")}
    unset = dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "")
    for name, value in (slurm | paths | unset | {"SLURM_JOB_NODELIST": "node[7-8]"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(main, "main", trained)
    before = signal.getsignal(signal.SIGUSR2)
    try:
        assert run_with_submitit.Training([])() == code
        signal.raise_signal(signal.SIGUSR2)  # the end of the job is near when its process is
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert ("requeue 17" in (tmp_path / "log").read_text()) == requeued


# --- train.sbatch


SRUN = """#!/bin/sh
echo "$NNODES nodes, $GPUS GPUs, $MASTER_ADDR" >> "$SCONTROL_LOG"
exit "$SRUN_CODE"
"""


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (138, True), (0, False), (4, False)])
def test_the_batch_script_queues_its_job_again_after_a_stop_alone(code, requeued, tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
    fakes = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SCONTROL_LOG": str(tmp_path / "log"), "SRUN_CODE": str(code)}
    command = ["bash", "vim/scripts/train.sbatch", "vim/scripts/pt-vim-t.sh", "--epochs", "3"]
    environment = os.environ | slurm | fakes | {"SLURM_GPUS_ON_NODE": "8", "GPUS": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    log = (tmp_path / "log").read_text()
    assert "2 nodes, 8 GPUs, node7" in log and ("requeue 17" in log) == requeued


def test_the_batch_script_without_a_recipe_is_one_line():
    command = ["bash", "vim/scripts/train.sbatch", "pt-vim-t"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "'pt-vim-t' is not a script" in done.stderr and done.stderr.count("\n") == 1


def test_the_recipes_go_through_the_launcher_and_resume(tmp_path):
    environment = os.environ | {"DRY_RUN": "1", "GPUS": "2", "DATA_PATH": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", "vim/scripts/pt-vim-t.sh"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert f"{ROOT / 'vim' / 'launch.py'} --standalone" in done.stdout and "--resume auto" in done.stdout


def test_the_launcher_hands_torchrun_only_flags_that_it_has():
    from torch.distributed.run import get_args_parser

    flags = [*launch_module.defaults(), "--standalone", "--max-restarts=0", "main.py"]
    parsed = get_args_parser().parse_args(flags)
    assert parsed.signals_to_handle == "SIGQUIT" and parsed.max_restarts == 0


@pytest.mark.parametrize(
    ("flags", "meeting"),
    [
        ("--nproc_per_node=2", (True, "static", "", "")),
        ("--nnodes=2 --node_rank=0 --master_addr=node0 --master_port=7", (False, "c10d", "node0:7", "is_host=True")),
        ("--nnodes=2 --node_rank=1 --master_addr=node0", (False, "c10d", "node0:29500", "is_host=False")),
        ("--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=x:9", (False, "c10d", "x:9", "")),
        ("--nnodes=2 --rdzv_endpoint=x:9", (False, "static", "x:9", "")),
    ],
)
def test_machines_meet_anew_unless_told_otherwise(flags, meeting):
    from torch.distributed.run import get_args_parser

    args = launch_module.meeting_anew(get_args_parser().parse_args([*flags.split(), "main.py"]))
    assert (args.standalone, args.rdzv_backend, args.rdzv_endpoint, args.rdzv_conf) == meeting


def test_a_wrong_flag_is_a_code_too_so_that_the_launcher_is_told(capsys):
    import main

    assert main.main(["--epoch", "3"]) == 2
    assert "did you mean --epochs" in capsys.readouterr().err
