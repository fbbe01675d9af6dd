"""Times PyTorch on the same steps that `tilewright bench` times: medians of several runs, CPU, float32.

    python3 benches/peers/pytorch.py [--threads 2] [--only NAME] [--compile] [--json FILE]

Modes: eager; eager with channels_last tensors; torch.compile of both (--compile: a minute each).
The models are torchvision's where it has them; `cnn_r14`, `cnn_whiten` and the small ViT are written out below.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


class Block(nn.Module):
    """Basic block with option B (1x1 convolution) shortcuts."""

    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CnnR14(nn.Module):
    """CIFAR ResNet-14: 16, 32, 64 channels, two blocks a stage."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        cin, blocks = 16, []
        for cout, stride in ((16, 1), (32, 2), (64, 2)):
            blocks += [Block(cin, cout, stride), Block(cout, cout, 1)]
            cin = cout
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


class SmallVit(nn.Module):
    """Patch 4, width 128, depth 6, class token, pre-norm, no dropout."""

    def __init__(self, heads=8, dim=128, depth=6, classes=10):
        super().__init__()
        self.patch = nn.Conv2d(3, dim, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, 65, dim))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(len(x), -1, -1), x), 1) + self.pos
        return self.head(self.blocks(x)[:, 0])


class WhitenBlock(nn.Module):
    def __init__(self, cin, cout):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, 1, 1), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1), nn.BatchNorm2d(cout)
        self.shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.dropout(F.max_pool2d(F.relu(y + self.shortcut(x)), 2), 0.25)


class CnnWhiten(nn.Module):
    """Batch norm on the input, three biased residual blocks with max pool and dropout, a hidden layer."""

    def __init__(self, classes=10):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3)
        self.blocks = nn.Sequential(WhitenBlock(3, 32), WhitenBlock(32, 64), WhitenBlock(64, 128))
        self.fc1, self.fc2 = nn.Linear(2048, 512), nn.Linear(512, classes)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(self.blocks(self.bn0(x)).flatten(1))))


def zoo(name, classes=1000):
    return lambda: getattr(torchvision.models, name)(num_classes=classes)


# As `vit_p4_e128_d6`, twice as wide and two blocks deeper.
WIDE = "vit:patch=4,dim=256,depth=8,heads=4,mlp=4"

# name: (model, batch, side, classes, training step, what `tilewright bench` calls the model)
CASES = {
    f"{name} {'train' if train else 'infer'} {batch}x{side}": (make, batch, side, classes, train, args)
    for name, make, batch, side, classes, train, args in [
        ("cnn_r14", CnnR14, 128, 32, 10, True, ["cnn_r14"]),
        ("vit_p4_e128_d6", SmallVit, 128, 32, 10, True, ["vit_p4_e128_d6", "--dropout", "0"]),
        ("resnet18", zoo("resnet18", 100), 64, 32, 100, True, ["resnet18"]),
        ("cnn_whiten", CnnWhiten, 128, 32, 10, True, ["cnn_whiten"]),
        ("resnet18", zoo("resnet18"), 16, 224, 1000, True, ["resnet18"]),
        ("resnet18", zoo("resnet18"), 1, 224, 1000, False, ["resnet18"]),
        ("resnet50", zoo("resnet50"), 16, 224, 1000, False, ["resnet50"]),
        ("vit_b_16", zoo("vit_b_16"), 1, 224, 1000, False, ["vit_b_16"]),
        ("resnet50", zoo("resnet50"), 1, 224, 1000, False, ["resnet50"]),
        ("resnet50", zoo("resnet50"), 8, 224, 1000, True, ["resnet50"]),
        ("vit_b_16", zoo("vit_b_16"), 4, 224, 1000, True, ["vit_b_16"]),
        ("vit_b_16", zoo("vit_b_16"), 8, 224, 1000, False, ["vit_b_16"]),
        ("swin_t", zoo("swin_t"), 1, 224, 1000, False, ["swin_t"]),
        ("swin_t", zoo("swin_t"), 8, 224, 1000, False, ["swin_t"]),
        ("swin_t", zoo("swin_t"), 4, 224, 1000, True, ["swin_t"]),
        ("vit_p4_e256_d8", lambda: SmallVit(4, 256, 8, 100), 64, 32, 100, True, [WIDE, "--dropout", "0"]),
    ]
}


def step_of(case, channels_last, compiled):
    make, batch, side, classes, train, _ = case
    torch.manual_seed(0)
    model, x = make(), torch.randn(batch, 3, side, side)
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    net = torch.compile(model) if compiled else model
    if not train:
        model.eval()

        def infer():
            with torch.inference_mode():
                return net(x)

        return infer
    labels = torch.randint(0, classes, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def train_step():
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return train_step


def measure(step, seconds):
    for _ in range(3):
        step()
    times, begin = [], time.perf_counter()
    while len(times) < 7 or (time.perf_counter() - begin < seconds and len(times) < 200):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


FIRST = """
import sys; sys.path.insert(0, {folder!r}); import pytorch
pytorch.torch.set_num_threads({threads})
pytorch.step_of(pytorch.CASES[{name!r}], False, False)()
"""


def cold(name, threads, folder):
    """Milliseconds from the start of a process to the end of its first eager step; median of 3."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST.format(folder=folder, threads=threads, name=name)], check=True)
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--only", default="")
    p.add_argument("--seconds", type=float, default=4.0)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--cold", action="store_true", help="process start to the end of the first step, eager")
    p.add_argument("--json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    out = {"torch": torch.__version__, "threads": a.threads, "ms": {}}
    for name, case in CASES.items():
        if a.only not in name:
            continue
        row = {}
        if a.cold:
            row["start to first step"] = cold(name, a.threads, sys.path[0])
        else:
            modes = [("eager", False, False), ("channels_last", True, False)]
            if a.compile:
                modes = [("compile", False, True), ("compile channels_last", True, True)]
            for mode, last, compiled in modes:
                try:
                    row[mode] = measure(step_of(case, last, compiled), a.seconds)
                except Exception as e:  # a mode that does not work on this machine is no result
                    print(f"{name}, {mode}: {e}".splitlines()[0], file=sys.stderr)
        out["ms"][name] = row
        print(name, {k: round(v, 1) for k, v in row.items()}, flush=True)
    if a.json:
        with open(a.json, "w") as f:
            json.dump(out, f, indent=1)


if __name__ == "__main__":
    main()
