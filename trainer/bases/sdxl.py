"""SDXL: two text encoders, a pooled vector, time ids, sgm block names in LoRA keys, 1024 px."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trainer.bases.base import Base, Sizes, TextStates, first_position, join_windows
from trainer.bases.onto import onto

# diffusers names in a resnet and in a sampler → sgm names (sd-scripts library/sdxl_model_util.py)
_RESNET = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
# Modules outside the blocks (sd-scripts library/sdxl_original_unet.py).
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


class SDXL(Base):
    """Stable Diffusion XL base and its fine-tunes."""

    family = "sdxl"

    def encode_text(
        self,
        captions: Sequence[str],
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        weighted: bool = False,
    ) -> TextStates:
        """The second-to-last layers of both encoders, concatenated, without the final norm. The pooled vector
        is the final state of the second encoder at the first end token of the first window, times its
        projection; weights do not change it. ``clip_skip`` is ignored."""
        with self._reading(captions, max_token_length):
            return self._encoded(captions, max_token_length, weighted)

    def _encoded(self, captions: Sequence[str], max_token_length: int | None, weighted: bool) -> TextStates:
        hidden = []
        for number, encoder in enumerate(self.text_encoders):
            ids_BWL = self.token_windows(captions, number, max_token_length, weighted)
            states = encoder(ids_BWL.flatten(0, 1), output_hidden_states=True)
            hidden.append(join_windows(states.hidden_states[-2].unflatten(0, ids_BWL.shape[:2])))
            if weighted:
                hidden[-1] = self._weighed(hidden[-1], captions, number, max_token_length)
        # of the second encoder, which the loop handles last
        end_B = first_position(ids_BWL[:, 0], self._tokenizer(1).eos_token_id)
        final_BLD = states.last_hidden_state.unflatten(0, ids_BWL.shape[:2])[:, 0]
        final_BD = final_BLD[torch.arange(len(captions), device=end_B.device), end_B]
        return TextStates(torch.cat(hidden, dim=-1), encoder.text_projection(final_BD))

    def predict(
        self, noisy_BCHW: Tensor, timesteps_B: Tensor, states: TextStates, sizes: Sequence[Sizes]
    ) -> Tensor:
        assert states.pooled_BP is not None
        assert len(sizes) == len(noisy_BCHW), "SDXL needs the sizes of every row"
        self.card.require(self.unet)
        ids = [[*size.original_hw, *size.crop_top_left, *size.target_hw] for size in sizes]
        predicted = self.unet(
            noisy_BCHW.to(self.compute_dtype),
            timesteps_B,
            encoder_hidden_states=states.hidden_BLD.to(self.compute_dtype),
            added_cond_kwargs={
                "text_embeds": states.pooled_BP.to(self.compute_dtype),
                "time_ids": onto(torch.tensor(ids, dtype=torch.float32), noisy_BCHW.device),
            },
            return_dict=False,
        )[0]
        return predicted.float()

    def unet_name(self, path: str) -> str:
        return sgm_path(path, int(self.unet.config.layers_per_block))


def sgm_path(path: str, layers_per_block: int) -> str:
    """A diffusers module path → the path of the module in Stability's code, which kohya's SDXL keys use.
    Raises KeyError for a module that it does not have."""
    if path in _ENDS:
        return _ENDS[path]
    for pattern, rename in _BLOCKS:
        match = re.fullmatch(pattern, path)
        if match:
            return rename(match.groupdict(), layers_per_block + 1)
    raise KeyError(f"no sgm name for {path}")


def _index(part: dict[str, str], stride: int) -> int:
    return int(part["block"]) * stride + int(part["layer"])


def _resnet(part: dict[str, str]) -> str:
    return _RESNET[part["rest"]]


_BLOCKS: tuple[tuple[str, Callable[[dict[str, str], int], str]], ...] = (
    (
        r"down_blocks\.(?P<block>\d+)\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)",
        lambda part, stride: f"input_blocks.{_index(part, stride) + 1}.1.{part['rest']}",
    ),
    (
        r"up_blocks\.(?P<block>\d+)\.attentions\.(?P<layer>\d+)\.(?P<rest>.+)",
        lambda part, stride: f"output_blocks.{_index(part, stride)}.1.{part['rest']}",
    ),
    (r"mid_block\.attentions\.0\.(?P<rest>.+)", lambda part, stride: f"middle_block.1.{part['rest']}"),
    (
        r"down_blocks\.(?P<block>\d+)\.resnets\.(?P<layer>\d+)\.(?P<rest>\w+)",
        lambda part, stride: f"input_blocks.{_index(part, stride) + 1}.0.{_resnet(part)}",
    ),
    (
        r"up_blocks\.(?P<block>\d+)\.resnets\.(?P<layer>\d+)\.(?P<rest>\w+)",
        lambda part, stride: f"output_blocks.{_index(part, stride)}.0.{_resnet(part)}",
    ),
    (
        r"mid_block\.resnets\.(?P<layer>\d+)\.(?P<rest>\w+)",
        lambda part, stride: f"middle_block.{2 * int(part['layer'])}.{_resnet(part)}",
    ),
    (
        r"down_blocks\.(?P<block>\d+)\.downsamplers\.0\.conv",
        lambda part, stride: f"input_blocks.{(int(part['block']) + 1) * stride}.0.op",
    ),
    (
        r"up_blocks\.(?P<block>\d+)\.upsamplers\.0\.conv",
        lambda part, stride: f"output_blocks.{int(part['block']) * stride + stride - 1}.2.conv",
    ),
)
