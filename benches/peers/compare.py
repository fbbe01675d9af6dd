"""PyTorch and Tilewright on the same step in turn, round by round, so that a busy machine is busy for both.

    python3 benches/peers/compare.py TILEWRIGHT [--rounds 5] [--only NAME] [--json FILE]

Prints, per step, the median over rounds of each round's median, and the ratio PyTorch / Tilewright (above 1: we are
faster) as the median of the rounds' ratios.
"""

import argparse
import json
import statistics
import subprocess
import time

import torch

import pytorch


def arguments(case):
    """What `tilewright bench` is told for a case of `pytorch.CASES`."""
    _, batch, side, classes, train, model = case
    how = "--train" if train else "--infer"
    return [*model, "--batch", str(batch), "--image", str(side), "--classes", str(classes), how]


def ours(program, args, threads):
    command = [program, "bench", *args, "--json", "--seconds", "1", "--backend", "cpu", "--threads", str(threads)]
    r = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return r["results"][0]


def theirs(step, seconds=1.0):
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def onnx_step(case, threads):
    """The same inference in ONNX Runtime, where it is installed."""
    import io

    import onnxruntime

    make, batch, side, *_ = case
    x = torch.randn(batch, 3, side, side)
    model = make().eval()
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: x.numpy()})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("program")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only", default="")
    p.add_argument("--compile", action="store_true", help="torch.compile too (half a minute a step)")
    p.add_argument("--json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    out = {}
    for name, case in pytorch.CASES.items():
        if a.only not in name:
            continue
        modes = {"eager": (False, False), "channels_last": (True, False)}
        if a.compile:
            modes |= {"compile": (False, True), "compile channels_last": (True, True)}
        steps = {}
        makers = {mode: lambda how=how: pytorch.step_of(case, *how) for mode, how in modes.items()}
        if not case[4]:
            makers["onnxruntime"] = lambda: onnx_step(case, a.threads)
        for mode, make in makers.items():
            try:
                step = make()
                for _ in range(3):
                    step()
                steps[mode] = step
            except Exception as e:  # a mode that does not work here is no result
                print(f"{name}, {mode}: {type(e).__name__} {e}".splitlines()[0][:160])
        rounds = []
        for _ in range(a.rounds):
            row = {"tilewright": 1e3 * ours(a.program, arguments(case), a.threads)["step"]["median"]}
            for mode, step in steps.items():
                row[mode] = theirs(step)
            rounds.append(row)
        ms = {k: statistics.median(r[k] for r in rounds) for k in rounds[0]}
        ratio = {k: statistics.median(r[k] / r["tilewright"] for r in rounds) for k in rounds[0] if k != "tilewright"}
        out[name] = {"ms": ms, "best_ms": {k: min(r[k] for r in rounds) for k in rounds[0]}, "ratio": ratio}
        shown = {k: round(v, 1) for k, v in ms.items()}
        print(name, shown, "ratio", {k: round(v, 2) for k, v in ratio.items()}, flush=True)
    if a.json:
        with open(a.json, "w") as f:
            json.dump({"torch": torch.__version__, "threads": a.threads, "steps": out}, f, indent=1)


if __name__ == "__main__":
    main()
