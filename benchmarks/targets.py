"""The project's goals for speed and memory beside what was measured: every row, met or not.

    python benchmarks/targets.py [--results FOLDER]     rewrites FOLDER/targets.md from the JSON files there

A goal whose figure is not in the results reads "not yet measured".
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import harness
from ops import LONG, SHORT
from subjects import PUBLISHED
from vim_vs_deit import SIZES

VIM, DEIT = ({size: names[i] for size, names in SIZES.items()} for i in (0, 1))
FUSED = ("sdpa", "flash", "cudnn", "efficient")

Results = Mapping[str, Mapping]  # {"ops": ..., "models": ..., "stability": ...}: one device's JSON files, or fewer
Measure = Callable[[Results], float | None]


@dataclass(frozen=True)
class Goal:
    """One row: `measure` takes the results to a number, to be at least or at most `bound`."""

    work: str
    bound: float
    measure: Measure
    unit: str = "x"
    at_most: bool = False
    strictly: bool = False

    def met(self, value: float) -> bool:
        if self.strictly:
            return value > self.bound
        return value <= self.bound if self.at_most else value >= self.bound

    @property
    def target(self) -> str:
        sign = ">" if self.strictly else "<=" if self.at_most else ">="
        return f"{sign} {harness.number(self.bound)}{self.unit}"


# --- finding figures


def find(results: Results, part: str, **wanted: object) -> Mapping | None:
    """The one measurement of a part ("ops", "models") whose fields equal the wanted ones, or None."""
    for record in results.get(part, {}).get("measurements", []):
        if all(record.get(key) == value for key, value in wanted.items()):
            return record
    return None


def model_value(field: str, name: str, px: int, mode: str, batch: int) -> Measure:
    def measure(results: Results) -> float | None:
        record = find(results, "models", name=name, px=px, mode=mode, batch=batch)
        return record.get(field) if record else None

    return measure


def images_per_second(name: str, px: int, mode: str, batch: int) -> Measure:
    return model_value("images_per_second", name, px, mode, batch)


def faster_than(rival: str, px: int, mode: str, batch: int) -> Measure:
    """How many times faster the Vim of the same case is than `rival`."""

    def measure(results: Results) -> float | None:
        record = find(results, "models", name=rival, px=px, mode=mode, batch=batch)
        faster = record.get("first_faster_by") if record else None
        return faster["median"] if faster else None

    return measure


def faster_than_best_fused(rival: str, px: int, mode: str, batch: int) -> Measure:
    def measure(results: Results) -> float | None:
        ratios = [faster_than(f"{rival}/{name}", px, mode, batch)(results) for name in FUSED]
        known = [ratio for ratio in ratios if ratio is not None]
        return min(known) if known else None

    return measure


def quotient(upper: Measure, lower: Measure, scale: float = 1.0) -> Measure:
    def measure(results: Results) -> float | None:
        above, below = upper(results), lower(results)
        return None if above is None or not below else scale * above / below

    return measure


def memory_share(name: str, rival: str, px: int, mode: str, batch: int) -> Measure:
    """Peak memory in per cent of the rival's."""
    peaks = (model_value("peak_memory", model, px, mode, batch) for model in (name, rival))
    return quotient(*peaks, scale=100.0)


def bytes_per_token_and_layer(name: str, px: int, batch: int, layers: int) -> Measure:
    tokens = batch * ((px // 16) ** 2 + 1)
    peak = model_value("peak_memory", name, px, "backward", batch)
    return quotient(peak, lambda _: float(tokens * layers))


def op_value(op: str, shape: str, rival: str, phase: str, field: str) -> Measure:
    """A field of ops.py's records; a ratio's median."""

    def measure(results: Results) -> float | None:
        record = find(results, "ops", op=op, shape=shape, rival=rival, **{"pass": phase})
        value = record[field] if record else None
        return value["median"] if isinstance(value, Mapping) else value

    return measure


def updates_per_second(shape: str) -> Measure:
    """Scan forward, in 10^9 state updates per second."""
    return quotient(op_value("scan", shape, "ours", "forward", "work_per_second"), lambda _: 1e9)


def conditions_held(model: str, px: int, steps: int) -> Measure:
    """How many hold of a run of stability.py: bfloat16 stayed finite, its loss fell, it ended as float32's."""

    def measure(results: Results) -> float | None:
        record = results.get("stability")
        if not record or (record["model"], record["px"]) != (model, px) or record["steps"] < steps:
            return None
        return float(sum(record["verdict"][key] for key in ("finite", "falls", "as_float32")))

    return measure


def growth(results: Results) -> float | None:
    measured = results.get("models", {}).get("growth")
    return measured["median"] if measured else None


# --- the goals

TI, S = VIM["tiny"], VIM["small"]
DEIT_TI = DEIT["tiny"]

CPU_GOALS = (
    Goal("Vim-Ti forward, 1248 px, batch 1, against DeiT-Ti with SDPA", 3.3,
         faster_than(f"{DEIT_TI}/sdpa", 1248, "infer", 1)),
    Goal("Vim-Ti forward, 224 px, batch 8, against DeiT-Ti with SDPA", 0.9,
         faster_than(f"{DEIT_TI}/sdpa", 224, "infer", 8)),
    Goal("peak memory, 1248 px, batch 1, of DeiT-Ti's with eager attention", 13.2,
         memory_share(TI, f"{DEIT_TI}/eager", 1248, "infer", 1), " %", at_most=True),
    Goal("peak memory, 1248 px, batch 1, of DeiT-Ti's with SDPA", 100,
         memory_share(TI, f"{DEIT_TI}/sdpa", 1248, "infer", 1), " %", at_most=True),
    *(Goal(f"selective scan forward, {shape}", 10, updates_per_second(shape), " G state updates/s")
      for shape in (SHORT, LONG)),
    *(Goal(f"selective scan forward, {shape}, against {rival}", bound,
           op_value("scan", shape, rival, "forward", "ours_faster_by"))
      for rival, bound in (("selective_scan_ref", 50), ("mambapy", 20)) for shape in (SHORT, LONG)),
    *(Goal(f"forward + backward of the mixer, {shape}, of its forward", 3,
           op_value("mixer", shape, "ours", "forward + backward", "times_own_forward"), at_most=True)
      for shape in (SHORT, LONG)),
    Goal("training step of Vim-Ti, 224 px, batch 8, against DeiT-Ti with SDPA", 0.7,
         faster_than(f"{DEIT_TI}/sdpa", 224, "step", 8)),
    Goal("Vim-Ti's time per token, 1248 px against 512 px", 1.15, growth, at_most=True),
)  # fmt: skip

GPU_GOALS = (
    Goal("Vim-Ti forward, 224 px, batch 128", 25_000, images_per_second(TI, 224, "infer", 128), " images/s"),
    Goal("the same against the published kernels", 2.5, faster_than(TI + PUBLISHED, 224, "infer", 128)),
    Goal("Vim-S forward, 224 px, batch 128", 12_000, images_per_second(S, 224, "infer", 128), " images/s"),
    Goal("Vim-Ti forward, 1248 px, batch 32", 770, images_per_second(TI, 1248, "infer", 32), " images/s"),
    Goal("the same against DeiT-Ti with eager attention", 5,
         faster_than(f"{DEIT_TI}/eager", 1248, "infer", 32)),
    Goal("the same against DeiT-Ti with the best SDPA backend", 1,
         faster_than_best_fused(DEIT_TI, 1248, "infer", 32), strictly=True),
    Goal("Vim-Ti forward + backward, 224 px, batch 128", 6_500,
         images_per_second(TI, 224, "backward", 128), " images/s"),
    Goal("the same against the published kernels", 2.5, faster_than(TI + PUBLISHED, 224, "backward", 128)),
    Goal("Vim-Ti forward + backward, 1248 px, batch 32, against DeiT-Ti with flash attention", 1.3,
         faster_than(f"{DEIT_TI}/flash", 1248, "backward", 32)),
    Goal("peak memory of inference, 1248 px, batch 64", 4,
         quotient(model_value("peak_memory", TI, 1248, "infer", 64), lambda _: 1e9), " GB", at_most=True),
    Goal("training memory of Vim-Ti per token and layer, 224 px, batch 128", 2_000,
         bytes_per_token_and_layer(TI, 224, 128, 24), " bytes", at_most=True),
    Goal("1,000 training steps of Vim-Ti in bfloat16, 224 px: finite, loss falls, ends as float32's", 3,
         conditions_held(TI, 224, 1000), " of 3"),
)  # fmt: skip

GOALS = {"cpu": CPU_GOALS, "cuda": GPU_GOALS}


# --- the table


def table(goals: tuple[Goal, ...], results: Results) -> str:
    rows = []
    for goal in goals:
        value = goal.measure(results)
        if value is None:
            rows.append([goal.work, goal.target, "not yet measured", ""])
        else:
            verdict = "yes" if goal.met(value) else "no"
            rows.append([goal.work, goal.target, f"{harness.number(value)}{goal.unit}", verdict])
    return harness.markdown_table(["work", "target", "measured", "met"], rows)


def load(folder: Path, device: str) -> dict[str, Mapping]:
    """The result files of one device that exist in a folder."""
    names = {"ops": "ops", "models": "vim_vs_deit", "stability": "stability"}
    files = {part: folder / f"{name}_{device}.json" for part, name in names.items()}
    return {part: json.loads(path.read_text()) for part, path in files.items() if path.exists()}


def write(folder: Path) -> str:
    """Rewrite targets.md in a folder of results; returns its text. Parts may stem from different commits."""
    sections = []
    for device, goals in GOALS.items():
        results = load(folder, device)
        machines = [f"Of the {name}:\n\n{harness.describe(part['environment'])}" for name, part in results.items()]
        sections.append("\n\n".join([f"## {device.upper()}", table(goals, results), *machines]))
    text = "\n\n".join(sections) + "\n"
    (folder / "targets.md").write_text(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    parser.add_argument("--results", type=Path, default=harness.RESULTS, help="folder of the results")
    print(write(parser.parse_args().results))


if __name__ == "__main__":
    main()
