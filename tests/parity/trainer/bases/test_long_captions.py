"""150 and 225 tokens are handled as in sd-scripts, whose windows are reimplemented here with plain lists."""

import pytest
import torch

from tests.tiny import tiny_base
from trainer.bases.base import Sizes

START, END, SECOND_PAD = 512, 513, 33  # the tiny tokenizer's marks; SDXL's second encoder pads with "!"
CAPTIONS = ["a cat", "a" * 75, "b" * 76, "c" * 149 + "!", "d" * 300, ""]


def windows(words: list[int], count: int, pad: int) -> list[list[int]]:
    """The token ids of each window of 77 (sd-scripts library/strategy_base.py, _get_input_ids)."""
    whole = [START, *words[: 75 * count], END]
    whole += [pad] * (75 * count + 2 - len(whole))
    rows = []
    for first in range(1, 75 * count, 75):
        row = [whole[0], *whole[first : first + 75], whole[-1]]
        if pad != END:
            if row[-2] not in (END, pad):
                row[-1] = END
            if row[1] == pad:
                row[1] = END
        rows.append(row)
    return rows


def reference_states(base, caption: str, encoder: int, count: int, layer) -> torch.Tensor:
    """(L, D): start of the first window, the middles, end of the last."""
    words = base.tokenizers[0](caption, add_special_tokens=False)["input_ids"]
    pad = SECOND_PAD if encoder == 1 else END
    states = [layer(torch.tensor([row]))[0] for row in windows(words, count, pad)]
    return torch.cat([states[0][:1], *(state[1:-1] for state in states), states[-1][-1:]])


@pytest.mark.parametrize("length", [150, 225])
@pytest.mark.parametrize("clip_skip", [None, 2])
def test_sd15_reads_long_captions_in_windows(length, clip_skip):
    base = tiny_base("sd15")
    encoder = base.text_encoders[0]

    def layer(ids):
        if clip_skip is None:
            return encoder(ids).last_hidden_state
        states = encoder(ids, output_hidden_states=True).hidden_states
        return encoder.final_layer_norm(states[-clip_skip])

    ours = base.encode_text(CAPTIONS, clip_skip, length).hidden_BLD
    assert ours.shape[1] == length + 2
    for row, caption in enumerate(CAPTIONS):
        expected = reference_states(base, caption, 0, length // 75, layer)
        torch.testing.assert_close(ours[row], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("length", [150, 225])
def test_sdxl_reads_long_captions_in_windows_and_pools_the_first(length):
    base = tiny_base("sdxl")
    first, second = base.text_encoders
    ours = base.encode_text(CAPTIONS, None, length)
    assert ours.hidden_BLD.shape[1] == length + 2
    for row, caption in enumerate(CAPTIONS):
        expected = [
            reference_states(
                base,
                caption,
                number,
                length // 75,
                lambda ids, encoder=encoder: encoder(ids, output_hidden_states=True).hidden_states[-2],
            )
            for number, encoder in enumerate((first, second))
        ]
        torch.testing.assert_close(ours.hidden_BLD[row], torch.cat(expected, -1), rtol=1e-5, atol=1e-6)
        words = base.tokenizers[0](caption, add_special_tokens=False)["input_ids"]
        ids = windows(words, length // 75, SECOND_PAD)[0]
        final = second(torch.tensor([ids])).last_hidden_state[0, ids.index(END)]
        torch.testing.assert_close(ours.pooled_BP[row], second.text_projection(final), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_75_tokens_are_what_they_always_were(family):
    base = tiny_base(family)
    plain, named = base.encode_text(CAPTIONS), base.encode_text(CAPTIONS, None, 75)
    assert plain.hidden_BLD.shape[1] == 77
    assert torch.equal(plain.hidden_BLD, named.hidden_BLD)


def test_the_unet_takes_long_states():
    for family in ("sd15", "sdxl"):
        base = tiny_base(family)
        states = base.encode_text(["a" * 200], None, 225)
        noisy = torch.zeros(1, 4, 8, 8)
        predicted = base.predict(noisy, torch.tensor([10]), states, [Sizes((64, 64), (0, 0), (64, 64))])
        assert predicted.isfinite().all()
