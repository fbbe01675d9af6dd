"""kernel_report.py DIR TOOLS: a table of the cubins that `tilewright kernels` wrote to DIR."""

import collections
import glob
import json
import os
import re
import subprocess
import sys

folder, tools = sys.argv[1:]
find = lambda name: glob.glob(os.path.join(tools, "nvidia", "**", "bin", name), recursive=True)[0]
cuobjdump, nvdisasm = find("cuobjdump"), find("nvdisasm")
for tool in (cuobjdump, nvdisasm):
    os.chmod(tool, 0o755)
index = json.load(open(os.path.join(folder, "index.json")))
arch = index["arch"]
# Per multiprocessor: registers, threads, blocks, KiB of shared memory (CUDA C++ Programming Guide, compute capabilities).
limits = {80: (65536, 2048, 32, 164), 90: (65536, 2048, 32, 228), 100: (65536, 2048, 32, 228)}[arch]


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def occupancy(registers, threads, smem):
    """Share of the multiprocessor's threads that fit, with registers in units of 256 a warp and 1 KiB reserved a block."""
    warps = -(-threads // 32)
    by_registers = limits[0] // (-(-registers * 32 // 256) * 256 * warps)
    by_threads = limits[1] // (warps * 32)
    by_smem = limits[3] * 1024 // (smem + 1024)
    return min(by_registers, by_threads, by_smem, limits[2]) * warps * 32 / limits[1]


resources, counts = {}, {}
for file in sorted({k["file"] for k in index["kernels"]}):
    path = os.path.join(folder, file)
    usage = run(cuobjdump, "--dump-resource-usage", path)
    for name, text in re.findall(r"Function (\w+):\s*\n\s*(.*)", usage):
        resources[file, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", text)}
    kernel = None
    for line in run(nvdisasm, "-c", path).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            kernel = counts.setdefault((file, section[1]), collections.Counter())
        code = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
        if code and kernel is not None:
            kernel[code[1]] += 1

print(f"# CUDA kernels for sm_{arch}, compiled by NVRTC {index['nvrtc']}\n")
print("What the bench cases launch, in every variant and precision (`scripts/kernel_report.sh`). Spills are STL and LDL")
print("instructions; MMA counts tensor-core instructions, LDG.128 16-byte global loads (LDGSTS.128 included).\n")
print("| kernel | constants | registers | spills | smem KiB | occupancy | SASS | MMA | LDG.128 | STG.128 |")
print("|---|---|--:|--:|--:|--:|--:|--:|--:|--:|")
spilled = []
for k in sorted(index["kernels"], key=lambda k: (k["source"], k["entry"], k["constants"])):
    r, c = resources[k["file"], k["entry"]], counts[k["file"], k["entry"]]
    has = lambda *parts: sum(n for op, n in c.items() if all(p in op.split(".") for p in parts))
    spills = has("STL") + has("LDL")
    smem = r.get("SHARED", 0) + k["dynamic_smem"]
    mma = sum(n for op, n in c.items() if op.split(".")[0] in ("HMMA", "QGMMA", "HGMMA", "UTCHMMA"))
    row = [
        f"{k['source']}/{k['entry']}", f"`{k['constants']}`" if k["constants"] else "", r["REG"], spills, f"{smem / 1024:.1f}",
        f"{100 * occupancy(r['REG'], k['threads'], smem):.0f} %", sum(c.values()), mma, has("LDG", "128") + has("LDGSTS", "128"),
        has("STG", "128"),
    ]
    if spills:
        spilled.append(row[0])
    print("| " + " | ".join(map(str, row)) + " |")
print(f"\nsm_{arch}: {len(index['kernels'])} kernels, {len(spilled)} with spills" + (": " + ", ".join(sorted(set(spilled))) if spilled else ""))
