"""One training step, four ways: ours, the same with PEFT's layers, diffusers' script's, and sd-scripts'.

    python -m tests.bench.bench_step launches --base sd15 [--sd-scripts DIR]   # on the pretend card
    python -m tests.bench.bench_step memory --base sd15                        # traced at the real resolution
    python -m tests.bench.bench_step wall --base sd15 --rounds 5               # seconds on this machine
    python -m tests.bench.bench_step profile --base sd15                       # where they go, by kind of kernel

* **ours**: ``trainer.loop.stepper`` as ``hpo train`` runs it.
* **PEFT layers**: the same stepper over PEFT's LoRA layers under autocast, dropout in hooks with a generator each:
  what this tool did until 2026-11-29.
* **diffusers**: a plain loop as in diffusers' ``train_text_to_image_lora.py``: PEFT's LoraConfig on the attention
  projections of the U-Net, fp32 LoRA under bf16 autocast, torch's AdamW. Fewer modules are trained than by the others.
* **sd-scripts**: its networks/lora.py over the same networks, in a plain loop like its ``train_network.py``.

``launches`` runs one step of the real architecture with random weights at 64 px and counts kernels, copies and waits by
the model of ``tests.pretendcard``. ``memory`` traces forward and backward without data. ``wall`` alternates the ways in
one process; full-size bases have their real widths and one layer a block (``--whole``: all of them). Ratios count, the
seconds are this machine's. ``profile`` adds up torch.profiler's own times of the same steps.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from tests.bench.record_networks import module_of
from tests.fullsize import meta_base
from tests.pretendcard import GB, pretend_card
from trainer.adapters.adapter import Adapter, Layer, inject
from trainer.adapters.dropout import keyed_generator
from trainer.adapters.kinds import NAME
from trainer.adapters.lowrank import LowRankLayer
from trainer.bases.base import Base, Sizes
from trainer.bases.load import load_base
from trainer.config import TrainConfig
from trainer.data.cache import Prepared
from trainer.data.dataset import Dataset, Item
from trainer.data.epoch import assign_buckets
from trainer.loop import loop, loss, optim
from trainer.loop.batches import Sample
from trainer.loop.stepper import Stepper

OURS, PEFT, DIFFUSERS, SD_SCRIPTS = "ours", "PEFT layers", "diffusers", "sd-scripts"
DIFFUSERS_TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]
LATENT_CELLS = 8  # a side: 64 px
Step = Callable[[int], None]  # one step of a way, by its number


# What is trained


def settings(base: Base, args: argparse.Namespace) -> TrainConfig:
    """SD1.5 with the text encoder, SDXL the U-Net only, as most people train them."""
    values: dict[str, Any] = {
        "resolution": LATENT_CELLS * 8,
        "min_bucket_reso": 64,
        "enable_bucket": False,
        "network_dim": args.rank,
        "network_alpha": args.rank / 2,
        "network_dropout": args.dropout,
        "train_batch_size": args.batch or (4 if base.family == "sd15" else 1),
        "max_train_steps": 1000,
        "mixed_precision": args.precision,
        "optimizer_type": args.optimizer,
        "gradient_checkpointing": args.checkpointing,
        "network_train_unet_only": base.family == "sdxl",
    }
    return TrainConfig(**values)


def full_base(family: str, kind: torch.dtype, *, whole: bool) -> Base:
    """The published architecture with small random weights; not ``whole``: one layer a block and one transformer in
    each, at the real widths."""
    base = meta_base(family)
    if not whole:
        config = dict(base.unet.config)
        config["layers_per_block"] = 1
        depth = config.get("transformer_layers_per_block", 1)
        config["transformer_layers_per_block"] = [1] * len(depth) if isinstance(depth, list | tuple) else 1
        with torch.device("meta"):
            base.unet = type(base.unet).from_config(config)
    base.unet.requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=draw).mul(0.02).to(kind)
    for module in base.modules():
        if module is base.vae:
            continue
        nn.Module.to(module, kind).to_empty(device="cpu")
        for name, weight in module.named_parameters():
            flat = weight.data.view(-1)
            if weight.dim() == 1:
                flat.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
                continue
            for start in range(0, flat.numel(), block.numel()):
                flat[start : start + block.numel()] = block[: flat.numel() - start]
        for name, buffer in module.named_buffers():
            if name.endswith("position_ids"):
                buffer.copy_(torch.arange(buffer.shape[-1]).expand(buffer.shape))
    base.compute_dtype = kind
    return base


def prepared_for(base: Base, config: TrainConfig) -> Prepared:
    """Random latents at 64 px and the captions' states."""
    side = config.resolution
    items = tuple(
        Item(Path(f"image_{n}.png"), f"a photo of sks, number {n}", 1, side, side, f"{n:064x}")
        for n in range(config.train_batch_size)
    )
    draw = torch.Generator().manual_seed(5)
    channels, cells = int(base.unet.config.in_channels), side // 8
    latents = {
        item.sha256: torch.randn(channels, cells, cells, generator=draw) / base.latent_scale for item in items
    }
    sizes = {item.sha256: Sizes((side, side), (0, 0), (side, side)) for item in items}
    states = None
    if not config.trains_text_encoder:
        with torch.no_grad():
            states = {item.caption: base.encode_text([item.caption]).to("cpu") for item in items}
    dataset = Dataset(Path("bench"), items, "sks", "thing")
    return Prepared(dataset, assign_buckets(items, config), latents, sizes, states)


# The ways


@contextlib.contextmanager
def ours(base: Base, config: TrainConfig, prepared: Prepared) -> Iterator[Step]:
    adapter = inject(base, config)
    try:
        with loop.recomputing(base, config), Stepper(config, adapter, prepared) as stepper:
            group = [[Sample(item, 0) for item in prepared.dataset.items]]

            def step(number: int) -> None:
                optim.set_rates_of_step(stepper.optimizer, config, 1000, number)
                stepper.step(group, 0, number, (0, group))

            yield step
    finally:
        adapter.remove()


@contextlib.contextmanager
def with_peft(base: Base, config: TrainConfig, prepared: Prepared) -> Iterator[Step]:
    """Ours over PEFT's layers."""
    adapter = inject(base, config)
    try:
        exchange(adapter, base)
        with loop.recomputing(base, config), Stepper(config, adapter, prepared) as stepper:
            group = [[Sample(item, 0) for item in prepared.dataset.items]]
            yield lambda number: void(stepper.step(group, 0, number, None))
    finally:
        take_out_peft(base)


def void(_: Any) -> None: ...


def exchange(adapter: Adapter, base: Base) -> None:
    """PEFT's layers in the place of ours, with the same parameters and dropout in hooks."""
    weights = {layer.target.path: layer for layer in adapter.layers}
    by_component: dict[str, list[Layer]] = {}
    for layer in adapter.layers:
        by_component.setdefault(layer.target.component, []).append(layer)
    for layer in weights.values():
        assert isinstance(layer.wrapped, LowRankLayer)
    for network in base.components().values():
        for path, module in [*network.named_modules()]:
            if isinstance(module, LowRankLayer):
                parent, _, name = path.rpartition(".")
                setattr(network.get_submodule(parent), name, module.base_layer)
        if hasattr(network, "peft_config"):
            del network.peft_config
    number = 0
    for component, layers in by_component.items():
        network, rank = base.components()[component], layers[0].target.rank
        paths = [layer.target.path for layer in layers]
        given = LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, init_lora_weights=False)
        inject_adapter_in_model(given, network, adapter_name=NAME, low_cpu_mem_usage=True)
        for layer in layers:
            theirs: Any = network.get_submodule(layer.target.path)
            theirs.lora_A[NAME].weight = layer.weights["lora_down.weight"]
            theirs.lora_B[NAME].weight = layer.weights["lora_up.weight"]
            theirs.scaling[NAME] = layer.target.alpha / layer.target.rank
            object.__setattr__(layer, "wrapped", theirs)
            if adapter.draws.dropout.network > 0:
                theirs.lora_A[NAME].register_forward_hook(dropping(adapter, number))
            number += 1


def dropping(adapter: Adapter, number: int) -> Any:
    def drop(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        if adapter.draws.key is None:
            return output
        keep = 1.0 - adapter.draws.dropout.network
        generator = keyed_generator(*adapter.draws.key, number, device=output.device)
        mask = torch.empty(output.shape, device=output.device, dtype=output.dtype)
        return output * mask.bernoulli_(keep, generator=generator).div_(keep)

    return drop


def take_out_peft(base: Base) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    for network in base.components().values():
        recurse_remove_peft_layers(network)
        if hasattr(network, "peft_config"):
            del network.peft_config


@contextlib.contextmanager
def as_diffusers(base: Base, config: TrainConfig, prepared: Prepared) -> Iterator[Step]:
    given = LoraConfig(
        r=config.network_dim,
        lora_alpha=config.network_alpha,
        init_lora_weights="gaussian",
        target_modules=DIFFUSERS_TARGETS,
    )
    inject_adapter_in_model(given, base.unet, adapter_name=NAME)
    weights = [weight for weight in base.unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2)
    try:
        yield plain_step(base, config, prepared, weights, optimizer)
    finally:
        take_out_peft(base)


def as_sd_scripts(root: Path) -> Any:
    """The way of a checkout of sd-scripts."""
    create = module_of({"": root}, "networks.lora").create_network

    @contextlib.contextmanager
    def way(base: Base, config: TrainConfig, prepared: Prepared) -> Iterator[Step]:
        encoders = base.text_encoders if base.family == "sdxl" else base.text_encoders[0]
        network = create(
            1.0,
            config.network_dim,
            config.network_alpha,
            base.vae,
            encoders,
            base.unet,
            neuron_dropout=config.network_dropout or None,
        )
        trains_text = config.trains_text_encoder
        network.apply_to(encoders, base.unet, trains_text, True)
        device = base.device
        network.to(device)
        network.train()
        weights = [*network.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=1e-2)
        try:
            yield plain_step(base, config, prepared, weights, optimizer)
        finally:
            for lora in [*network.unet_loras, *network.text_encoder_loras]:
                if (found := getattr(lora, "original_module", None)) is not None:
                    del found.forward  # apply_to put its own there
            for component in base.components().values():
                for module in component.modules():
                    vars(module).pop("forward", None)

    return way


def plain_step(
    base: Base,
    config: TrainConfig,
    prepared: Prepared,
    weights: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Step:
    """Forward, backward, clip, update, as both projects' scripts do it; the loss is read after every step for the
    progress bar."""
    device, items = base.device, prepared.dataset.items
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.float32)

    def step(number: int) -> None:
        latents_BCHW = torch.stack([prepared.latents[i.sha256] for i in items]).to(device) * base.latent_scale
        noise_BCHW = torch.randn_like(latents_BCHW)
        timesteps_B = torch.randint(0, 1000, (len(items),), device=device)
        noisy_BCHW = loss.add_noise(latents_BCHW, noise_BCHW, timesteps_B, base.alphas_cumprod.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=kind != torch.float32):
            captions = [item.caption for item in items]
            if config.updates_text_encoder:
                states = base.encode_text(captions)
            else:
                states = prepared.text(captions).to(device)  # type: ignore[union-attr]
            sizes = [Sizes((64, 64), (0, 0), (64, 64))] * len(items)
            predicted_BCHW = base.predict(noisy_BCHW, timesteps_B, states, sizes)
        found = nn.functional.mse_loss(predicted_BCHW.float(), noise_BCHW.float())
        found.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        found.item()

    return step


# The measurements


def ways(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {OURS: ours, PEFT: with_peft, DIFFUSERS: as_diffusers}
    if args.sd_scripts:
        found[SD_SCRIPTS] = as_sd_scripts(args.sd_scripts)
    return {name: way for name, way in found.items() if not args.only or name in args.only}


def made_base(args: argparse.Namespace, kind: torch.dtype) -> Base:
    if args.base.startswith("mini-"):
        return load_base(args.base, dtype=kind)
    return full_base(args.base, kind, whole=args.whole)


def count(args: argparse.Namespace) -> None:
    """The third step of each way on the pretend card."""
    rows = []
    for name, way in ways(args).items():
        with pretend_card(400 * GB) as card:
            base = made_base(args, torch.bfloat16 if args.precision == "bf16" else torch.float32).to("cuda")
            config = settings(base, args)
            with way(base, config, prepared_for(base, config)) as step:
                for number in range(2):
                    step(number)
                with card.count() as counts:
                    step(2)
            rows.append((name, counts))
            del base
        if args.verbose:
            print(name, counts.ops.most_common(30), counts.sync_places.most_common(12), file=sys.stderr)
    first = dict(rows).get(PEFT, rows[0][1]).launches
    print(
        "| way | kernel launches | of PEFT layers' | waits | to the card, kB | copies |\n|---|---|---|---|---|---|"
    )
    for name, counts in rows:
        print(
            f"| {name} | {counts.launches:,} | {counts.launches / first:.2f} | {len(counts.syncs)} | "
            f"{counts.to_card_bytes / 1e3:,.0f} | {counts.uploads + counts.downloads} |"
        )


def trace_memory(args: argparse.Namespace) -> None:
    """Peak of what forward and backward allocate, weights apart, at the base's own resolution."""
    from trainer.memory import networks, tracing
    from trainer.memory.footprint import base_facts

    facts = base_facts(args.base)
    side = 512 if args.base == "sd15" else 1024
    found = {}
    for name in (OURS, PEFT):
        base = networks.meta_base(facts)
        config = settings(base, args).with_values({"resolution": side})
        for network in base.components().values():
            nn.Module.to(network, torch.bfloat16)
        base.compute_dtype = torch.bfloat16
        it = tracing.subject(base, config)
        if name == PEFT and it.adapter is not None:
            exchange(it.adapter, base)
        live = peak = 0
        trace = tracing.trace(it, config, (side, side), torch.bfloat16)
        for event in trace.events:
            block = trace.blocks[event if event >= 0 else ~event]
            live += block.bytes_at(args.rank, args.rank) * (1 if event >= 0 else -1)
            peak = max(peak, live)
        found[name] = peak
    print("| way | peak of a step, GB | of PEFT layers' |\n|---|---|---|")
    for name, peak in found.items():
        print(f"| {name} | {peak / 1e9:.2f} | {peak / found[PEFT]:.2f} |")


def time_steps(args: argparse.Namespace) -> None:
    """Seconds of a step, the ways in turn, one process."""
    base = made_base(args, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    config = settings(base, args)
    prepared = prepared_for(base, config)
    seconds: dict[str, list[float]] = {}
    for round_ in range(args.rounds + 1):
        for name, way in ways(args).items():
            with way(base, config, prepared) as step:
                step(0)
                started = time.perf_counter()
                for number in range(1, 1 + args.steps):
                    step(number)
                each = (time.perf_counter() - started) / args.steps
            if round_:  # the first warms up
                seconds.setdefault(name, []).append(each)
    middle = {name: statistics.median(found) for name, found in seconds.items()}
    first = middle.get(PEFT) or next(iter(middle.values()))
    print(
        "| way | seconds a step, median | of PEFT layers' | fastest of PEFT layers' fastest |\n|---|---|---|---|"
    )
    for name, found in seconds.items():
        best = min(found) / min(seconds.get(PEFT) or found)
        print(f"| {name} | {middle[name]:.3f} | {middle[name] / first:.2f} | {best:.2f} |")


PRODUCTS = ("mm", "bmm", "conv", "scaled_dot", "flash")  # matrix products: every way makes those of the base
OPTIMIZER = ("adam", "_foreach", "linalg", "norm_except")


def profile_steps(args: argparse.Namespace) -> None:
    """Milliseconds of a step by kind of kernel, after a step that warms up."""
    base = made_base(args, torch.bfloat16 if args.precision == "bf16" else torch.float32)
    config = settings(base, args)
    prepared = prepared_for(base, config)
    print("| way | step, ms | matrix products | other kernels | optimizer and clipping | Python between |")
    print("|---|---|---|---|---|---|")
    for name, way in ways(args).items():
        with way(base, config, prepared) as step:
            step(0)
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
                started = time.perf_counter()
                for number in range(1, 1 + args.steps):
                    step(number)
                whole = (time.perf_counter() - started) / args.steps * 1e3
        parts = {"products": 0.0, "others": 0.0, "optimizer": 0.0}
        for row in seen.key_averages():
            kernel = row.key.removeprefix("aten::").lower()
            if not row.key.startswith("aten::"):
                continue
            kind = "optimizer" if any(part in kernel for part in OPTIMIZER) else "others"
            kind = "products" if any(part in kernel for part in PRODUCTS) else kind
            parts[kind] += row.self_cpu_time_total / 1e3 / args.steps
        between = whole - sum(parts.values())
        shown = " | ".join(f"{ms:.0f} ({ms / whole:.0%})" for ms in (*parts.values(), between))
        print(f"| {name} | {whole:.0f} | {shown} |", flush=True)
        if args.verbose:
            print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=25), file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("launches", "memory", "wall", "profile"))
    parser.add_argument("--base", default="mini-sd15", choices=("mini-sd15", "mini-sdxl", "sd15", "sdxl"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--optimizer", default="AdamW")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--whole", action="store_true", help="wall: every layer of a full-size base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--sd-scripts", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--only", action="append", help="a way, by its name")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    sys.modules.setdefault("cv2", types.ModuleType("cv2"))  # sd-scripts imports it and does not need it here
    args.whole = args.whole or args.what == "launches"
    measure = {"launches": count, "memory": trace_memory, "wall": time_steps, "profile": profile_steps}
    measure[args.what](args)


if __name__ == "__main__":
    main()
