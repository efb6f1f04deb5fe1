"""What people run instead of ``hpo search``: one process that trains a LoRA, one that draws images with it and scores
them.  Written for ``tests.bench.bench_search throughput``, in the manner of diffusers' train_text_to_image_lora.py and
of its documentation for inference, without accelerate, data loader processes, logging and validation: all of these
would only make it slower.

    python -m tests.bench.subprocess_way train JOB.json
    python -m tests.bench.subprocess_way score JOB.json

The job file holds the fields of ``Job``.  Both halves load the same diffusers folder, as users' scripts do.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # as in diffusers' script


@dataclass(frozen=True)
class Job:
    """One trial: a base and images, how to train, what to draw, where to write."""

    base: str
    images: str
    out: str
    clip: str
    prompts: tuple[str, ...]
    side_px: int
    steps: int
    batch: int
    rank: int
    rate: float
    sampling_steps: int
    cfg: float
    device: str = "cpu"
    seed: int = 0

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path


def half_on_gpu(job: Job) -> Any:
    """The number type of the networks: bf16 on a GPU, as users give to --mixed_precision; fp32 on a CPU."""
    import torch

    return torch.bfloat16 if job.device.startswith("cuda") else torch.float32


def train(job: Job) -> None:
    """Load, train, save."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.training_utils import cast_training_params
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from PIL import Image
    from transformers import CLIPTextModel, CLIPTokenizer

    torch.manual_seed(job.seed)
    random.seed(job.seed)
    device = torch.device(job.device)
    tokenizer = CLIPTokenizer.from_pretrained(job.base, subfolder="tokenizer")
    scheduler = DDPMScheduler.from_pretrained(job.base, subfolder="scheduler")
    dtype = half_on_gpu(job)
    kept = {"torch_dtype": dtype}
    text_encoder = CLIPTextModel.from_pretrained(job.base, subfolder="text_encoder", dtype=dtype)
    vae = AutoencoderKL.from_pretrained(job.base, subfolder="vae", **kept)
    unet = UNet2DConditionModel.from_pretrained(job.base, subfolder="unet", **kept)
    for network in (text_encoder, vae, unet):
        network.requires_grad_(False).to(device)
    unet.add_adapter(LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=TARGETS))
    cast_training_params(unet, dtype=torch.float32)
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=job.rate, weight_decay=0.01)
    paths = sorted(path for path in Path(job.images).rglob("*") if path.suffix in (".png", ".jpg"))
    unet.train()
    for _ in range(job.steps):
        chosen = random.choices(paths, k=job.batch)
        pixels, captions = [], []
        for path in chosen:
            image = (
                Image.open(path).convert("RGB").resize((job.side_px, job.side_px), Image.Resampling.BILINEAR)
            )
            array = np.asarray(image, dtype=np.float32) / 127.5 - 1
            pixels.append(torch.from_numpy(array).permute(2, 0, 1))
            captions.append(path.with_suffix(".txt").read_text().strip())
        with torch.no_grad():
            latents = vae.encode(torch.stack(pixels).to(device, dtype)).latent_dist.sample()
            latents = latents * vae.config.scaling_factor
            ids = tokenizer(
                captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
            ).input_ids
            states = text_encoder(ids.to(device))[0]
        noise = torch.randn_like(latents)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (job.batch,), device=device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            predicted = unet(scheduler.add_noise(latents, noise, times), times, states).sample
        torch.nn.functional.mse_loss(predicted.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(job.out, unet_lora_layers=layers)


def score(job: Job) -> None:
    """Load, draw image by image, score each."""
    import numpy as np
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

    from evaluation.encoders import load_scorer

    pipe = StableDiffusionPipeline.from_pretrained(
        job.base, torch_dtype=half_on_gpu(job), local_files_only=True
    )
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(job.out)
    pipe.to(job.device)
    pipe.set_progress_bar_config(disable=True)
    scorer = load_scorer(job.clip, job.device)
    cosines = []
    for number, prompt in enumerate(job.prompts):
        image = pipe(
            prompt,
            height=job.side_px,
            width=job.side_px,
            num_inference_steps=job.sampling_steps,
            guidance_scale=job.cfg,
            generator=torch.Generator("cpu").manual_seed(number),
        ).images[0]
        image.save(Path(job.out) / f"{number}.png")
        image_1D, text_1D = scorer.image_features([np.asarray(image)]), scorer.text_features([prompt])
        cosines.append(float((image_1D * text_1D).sum()))
    (Path(job.out) / "score.json").write_text(json.dumps(sum(cosines) / len(cosines)))


if __name__ == "__main__":
    _job = json.loads(Path(sys.argv[2]).read_text())
    {"train": train, "score": score}[sys.argv[1]](Job(**{**_job, "prompts": tuple(_job["prompts"])}))
