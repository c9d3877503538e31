"""Float32 products of a model's linear layers on a CPU: torch's own (MKL) and oneDNN's, which gft train may take.

    python samples/smollm2/prepare.py runs/smollm2      # SmolLM2-135M-Instruct, see there
    python benchmarks/products.py                       # a minute on 2 cores
    python benchmarks/products.py --smoke               # the demo's model: says nothing of speed

For each shape of a layer's linears the product of the forward pass (x W^T) and the two of its backward pass (dy W, dy^T
x), and for the head the logits of one chunk of tokens and the product back (dlogits W). Library and product alternate;
every number is the median and the middle half of `--rounds` rounds of a quarter of a second, in GFLOP/s (2 a
multiplication). `taken` says which of the two `gft train` takes for a product of this kind and size on this machine
(gfttrain/onednn.py). The two libraries' results must agree to 1e-5 of the largest entry.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measure import linears, print_end, print_table, spread

from gfttrain import onednn
from gfttrain.head import chunk_tokens

TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Product:
    """A product by each of the libraries."""

    name: str
    multiplications: int
    mkl: Callable[[], torch.Tensor]
    onednn: Callable[[], torch.Tensor]
    kept: bool  # gft train leaves this kind to MKL


def products(model: str, tokens: int) -> list[Product]:
    """Those of a layer's linears, each shape once, and two of the head's of a chunk."""
    config = json.loads((Path(model) / "config.json").read_text())
    width, vocab = config["hidden_size"], config["vocab_size"]
    found = []
    for inputs, outputs in dict.fromkeys(linears(model)):
        x, weight, grad = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        found += [
            product("x W^T", x, weight),
            product("dy W", grad, weight.T),
            product("dy^T x", grad.T, x.T, kept=True),
        ]
    chunk = min(tokens, chunk_tokens(vocab, torch.device("cpu")))
    hidden, weight, grad = torch.randn(chunk, width), torch.randn(vocab, width), torch.randn(chunk, vocab)
    return [*found, product("logits", hidden, weight), product("dlogits W", grad, weight.T)]


def product(kind: str, left: torch.Tensor, right: torch.Tensor, *, kept: bool = False) -> Product:
    """left [M, K] and right [N, K] -> [M, N]."""
    size = f"{kind}  {len(left):,} x {left.shape[1]:,} x {len(right):,}"
    return Product(
        size,
        left.numel() * len(right),
        lambda: left @ right.T,
        lambda: onednn.multiply(left, right, None, "none", [], ""),
        kept,
    )


def rate(product: Callable[[], torch.Tensor], multiplications: int, seconds: float) -> float:
    """GFLOP/s over so many seconds."""
    product()
    began, count = time.perf_counter(), 0
    while (taken := time.perf_counter() - began) < seconds or not count:
        product()
        count += 1
    return 2 * multiplications * count / taken / 1e9


def check_same(product: Product) -> None:
    """Ends the program where the libraries differ by more than rounding."""
    ours, theirs = product.onednn(), product.mkl()
    gap = float((ours - theirs).abs().max() / theirs.abs().max())
    if not gap <= TOLERANCE:
        sys.exit(f"{product.name}: the two libraries differ by {gap:.3g} of the largest entry")


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="runs/smollm2", help="a folder of a Llama-shaped model")
    parser.add_argument("--tokens", type=int, default=1536, help="of a micro-batch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--smoke", action="store_true", help="the demo's model, one short round")
    options = parser.parse_args()
    if onednn.multiply is None:
        sys.exit("this torch has no oneDNN: gft train uses its own products")
    seconds = 0.25
    if options.smoke:
        options.model, options.tokens, options.rounds, seconds = "samples/demo/model", 24, 1, 0.001
    torch.manual_seed(0)
    tried = products(options.model, options.tokens)
    rates: dict[str, tuple[list[float], list[float]]] = {each.name: ([], []) for each in tried}
    for each in tried:
        check_same(each)
    for _ in range(options.rounds):
        for each in tried:
            for place, function in enumerate((each.mkl, each.onednn)):
                rates[each.name][place].append(rate(function, each.multiplications, seconds))
    rows = []
    for each in tried:
        mkl, dnn = rates[each.name]
        ratio = spread([b / a for a, b in zip(mkl, dnn, strict=True)]).median
        here = onednn.is_faster_here() and not each.kept and each.multiplications >= onednn.LEAST
        rows.append(
            [each.name, spread(mkl).text(".0f"), spread(dnn).text(".0f"), f"{ratio:.2f}", "oneDNN" if here else "MKL"]
        )
    print_table(["product, rows x inner x columns", "MKL", "oneDNN", "ratio", "taken"], rows)
    print_end("torch")


if __name__ == "__main__":
    main()
