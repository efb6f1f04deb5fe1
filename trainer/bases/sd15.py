"""SD1.5: one text encoder, no pooled vector, diffusers block names in LoRA keys, 512 px."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.bases.base import Base, Sizes, TextStates, join_windows, last_state


class SD15(Base):
    """Stable Diffusion 1.x and its fine-tunes."""

    family = "sd15"

    def encode_text(
        self,
        captions: Sequence[str],
        clip_skip: int | None = None,
        max_token_length: int | None = None,
        weighted: bool = False,
    ) -> TextStates:
        with self._reading(captions, max_token_length):
            ids_BWL = self.token_windows(captions, 0, max_token_length, weighted)
            states = last_state(self.text_encoders[0], ids_BWL.flatten(0, 1), clip_skip)
        hidden_BLD = join_windows(states.unflatten(0, ids_BWL.shape[:2]))
        return TextStates(
            self._weighed(hidden_BLD, captions, 0, max_token_length) if weighted else hidden_BLD
        )

    def predict(
        self, noisy_BCHW: Tensor, timesteps_B: Tensor, states: TextStates, sizes: Sequence[Sizes]
    ) -> Tensor:
        self.card.require(self.unet)
        predicted = self.unet(
            noisy_BCHW.to(self.compute_dtype),
            timesteps_B,
            encoder_hidden_states=states.hidden_BLD.to(self.compute_dtype),
            return_dict=False,
        )[0]
        return predicted.float()

    def unet_name(self, path: str) -> str:
        return path
