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


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
    r, c, own = resources[k["file"], k["entry"]], counts[k["file"], k["entry"]], k["footprint"]
    # From sm_90 on the 1 KiB that the system keeps of a block's shared memory is in the tool's count where there is any.
    kept = 1024 if arch >= 90 and r.get("SHARED", 0) else 0
    theirs = (r["REG"], r.get("SHARED", 0) - kept + k["dynamic_smem"], max(r.get("STACK", 0), r.get("LOCAL", 0)))
    assert theirs == (own["registers"], own["shared"], own["local"]), (k, theirs)
    has = lambda *parts: sum(n for op, n in c.items() if all(p in op.split(".") for p in parts))
    spills = has("STL") + has("LDL")
    mma = sum(n for op, n in c.items() if op.split(".")[0] in ("HMMA", "QGMMA", "HGMMA", "UTCHMMA"))
    row = [
        f"{k['source']}/{k['entry']}", f"`{k['constants']}`" if k["constants"] else "", own["registers"], spills,
        f"{own['shared'] / 1024:.1f}", f"{100 * own['occupancy']['share']:.0f} %", sum(c.values()), mma, has("LDG", "128") + has("LDGSTS", "128"),
        has("STG", "128"),
    ]
    if spills:
        spilled.append(row[0])
    print("| " + " | ".join(map(str, row)) + " |")
print(f"\nsm_{arch}: {len(index['kernels'])} kernels, {len(spilled)} with spills" + (": " + ", ".join(sorted(set(spilled))) if spilled else ""))
