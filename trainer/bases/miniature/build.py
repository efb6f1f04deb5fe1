"""Rebuild every weight of the miniature from nothing: `python -m trainer.bases.miniature.build`.

Owns the order of the stages and the command line; each stage module owns its network and its data. Stages
save and resume; a finished stage is not trained again while its work file lies in the work folder.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
STAGES: tuple[str, ...] = ("vae", "decoder", "text", "sd15", "sdxl", "clip", "likeness")


def run_stage(stage: str, work: Path, weights: Path, device: str) -> None:
    if stage in ("vae", "decoder"):
        from trainer.bases.miniature import stage_vae

        vae = (stage_vae.build_vae if stage == "vae" else stage_vae.build_decoder)(work, device)
        print(f"{stage}: squared error {stage_vae.reconstruction_error(vae):.5f} at 64 px", flush=True)
    elif stage == "text":
        from trainer.bases.miniature import stage_clip

        stage_clip.build_text(work, device)
    elif stage == "clip":
        from trainer.bases.miniature import stage_clip

        stage_clip.build_clip(work, weights, device)
    elif stage == "sd15":
        from trainer.bases.miniature import stage_diffusion

        stage_diffusion.build_sd15(work, weights, device)
    elif stage == "likeness":
        from trainer.bases.miniature import stage_likeness

        stage_likeness.build_likeness(work, weights, device)
    elif stage == "sdxl":
        from trainer.bases.miniature import stage_diffusion

        stage_diffusion.build_sdxl(work, weights, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/miniature"), help="checkpoints (default: %(default)s)"
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished weights go")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, args.work, args.weights, args.device)


if __name__ == "__main__":
    main()
