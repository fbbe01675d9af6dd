"""gpu_peers.py RESULTS PRECISION: PyTorch (eager and compiled, channels-last) on the steps, and cuBLAS, cuDNN and its
attention kernels on the layers, that `scripts/gpu.sh bench` timed with tilewright just before: a table, and
RESULTS/peers-PRECISION.json. Without PyTorch it prints tilewright's times alone."""

import glob
import json
import os
import re
import statistics
import sys

folder, precision = sys.argv[1:]
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "benches", "peers"))
try:
    import torch
    import torch.nn.functional as F

    import pytorch as models
except ImportError as e:
    print(f"PyTorch and torchvision are not here ({e}): no rivals")
    torch = None
if torch is not None and not torch.cuda.is_available():
    print("this PyTorch has no CUDA: no rivals")
    torch = None


def setting():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    return torch.bfloat16 if precision == "bf16" else torch.float32


def timed(call, runs=30):
    """Median milliseconds by events, caches flushed before every run."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    for _ in range(5):
        call()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def layer(op, case):
    """The same kernel from the vendor's libraries, or None where there is no match. Operands are in the precision
    already: tilewright rounds float32 operands itself, and that is part of its time."""
    room, text = re.fullmatch(r"(\w+)\((.*)\)", case).groups()
    p = dict(kv.split("=") for kv in text.split(","))
    n = lambda key, default=None: int(p.get(key, default))
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=setting())
    if room == "linear":
        x, w, dy = make(n("m"), n("i")), make(n("o"), n("i")), make(n("m"), n("o"))
        return {"linear": lambda: x @ w.T, "linear_dgrad": lambda: dy @ w, "linear_wgrad": lambda: dy.T @ x}.get(op)
    if room == "conv2d":
        h, r, stride, pad = n("h"), n("r"), n("stride", 1), n("pad", 0)
        last = torch.channels_last
        x = make(n("n"), n("c"), h, n("w", h)).to(memory_format=last)
        w = make(n("k"), n("c") // n("groups", 1), r, n("s", r)).to(memory_format=last)
        forward = lambda: F.conv2d(x, w, None, stride, pad, 1, n("groups", 1))
        dy = torch.randn_like(forward())
        back = lambda mask: torch.ops.aten.convolution_backward(
            dy, x, w, None, [stride] * 2, [pad] * 2, [1, 1], False, [0, 0], n("groups", 1), mask
        )
        return {
            "conv2d": forward,
            "conv2d_dgrad": lambda: back([True, False, False]),
            "conv2d_wgrad": lambda: back([False, True, False]),
        }.get(op)
    if room == "attention":
        q, k, v = (make(n("n"), n("h"), n("t"), n("d")).requires_grad_() for _ in range(3))
        out = F.scaled_dot_product_attention(q, k, v)
        dy = torch.randn_like(out)
        return {
            "attention": lambda: F.scaled_dot_product_attention(q, k, v),
            "attention_bwd": lambda: torch.autograd.grad(out, (q, k, v), dy, retain_graph=True),
        }.get(op)
    return None


def step(report, compiled):
    """A PyTorch step like a report's, or None where PyTorch has no such model here."""
    name, classes, side, batch = report["model"], report["classes"], report["image"], report["batch"]
    small = {"cnn_r14": models.CnnR14, "vit_p4_e128_d6": models.SmallVit}
    if name not in small and not hasattr(models.torchvision.models, name):
        return None
    torch.manual_seed(0)
    dtype, last = setting(), torch.channels_last
    net = small.get(name, models.resnet(name, classes))().cuda().to(memory_format=last)
    x = torch.randn(batch, 3, side, side, device="cuda").to(memory_format=last)
    labels = torch.randint(0, classes, (batch,), device="cuda")
    run = torch.compile(net, mode="max-autotune") if compiled else net
    cast = lambda: torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32)
    if not report["direction"].lower().startswith("train"):
        net.eval()

        def infer():
            with torch.inference_mode(), cast():
                return run(x)

        return infer
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)

    def train():
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = F.cross_entropy(run(x), labels)
        loss.backward()
        optimizer.step()

    return train


def load(kind):
    for path in sorted(glob.glob(os.path.join(folder, f"{kind}-*-{precision}.json"))):
        text = open(path).read().strip()
        if text:
            yield from json.loads(text)["results"]


ms = lambda v: "" if v is None else f"{v:.3f}"
rows = []
print(f"\n| step, {precision} | tilewright ms | eager | compiled | speed over compiled |\n|---|--:|--:|--:|--:|")
for r in load("model"):
    mine, peers = 1e3 * r["step"]["median"], {}
    for kind, compiled in (("eager", False), ("compiled", True)):
        call = torch and step(r, compiled)
        peers[kind] = timed(call) if call else None
    name = f"{r['model']} {r['direction']} {r['batch']}x{r['image']}"
    best = peers["compiled"]
    print(f"| {name} | {mine:.3f} | {ms(peers['eager'])} | {ms(best)} | {best / mine:.2f} |" if best else f"| {name} | {mine:.3f} | | | |")
    rows.append({"step": name, "tilewright": mine, **peers})
kernels = list(load("kernel"))
rivals = {}
for r in kernels:
    if r.get("rival"):
        rivals.setdefault((r["case"], r["op"]), {})[r["variant"]] = 1e3 * r["time"]["median"]
print("\nRivals are cuBLAS and cuDNN as `bench` calls them; PyTorch's kernels are those and its flash attention.\n")
print(f"| kernel, {precision} | tilewright ms | registers | occupancy | rivals ms | PyTorch ms | speed over the fastest | of the roofline |")
print("|---|--:|--:|--:|--:|--:|--:|--:|")
for r in kernels:
    if r.get("rival"):
        continue
    mine = 1e3 * r["time"]["median"]
    call = torch and layer(r["op"], r["case"])
    peer = timed(call) if call else None
    others = rivals.get((r["case"], r["op"]), {})
    best = min([*others.values(), *([peer] if peer else [])], default=None)
    ratio = f"{best / mine:.2f}" if best else ""
    took = r.get("footprint") or {}
    share = f"{100 * took['occupancy']['share']:.0f} %" if took.get("occupancy") else ""
    named = ", ".join(f"{name} {v:.3f}" for name, v in others.items())
    print(
        f"| {r['case']} {r['op']} {r['variant']} | {mine:.3f} | {took.get('registers', '')} | {share} | {named} | {ms(peer)} | {ratio} "
        f"| {100 * r['roofline']:.0f} % |"
    )
    rows.append({
        "case": r["case"], "op": r["op"], "variant": r["variant"], "tilewright": mine, "peer": peer, "rivals": others,
        "footprint": took or None, "roofline": r["roofline"],
    })
device = torch.cuda.get_device_name() if torch else None
versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()} if torch else {}
with open(os.path.join(folder, f"peers-{precision}.json"), "w") as f:
    json.dump({"precision": precision, "device": device, "versions": versions, "rows": rows}, f, indent=1)
