"""The models of torchaudio: those that it builds by name, and its classes with small arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures.case import Case, Family

#: How each model is made, given `torchaudio.models`, which is imported for a case only.
_CASES: dict[str, Callable[[Any], nn.Module]] = {
    "wav2vec2_base": lambda models: models.wav2vec2_base(),
    "wav2vec2_base for recognition": lambda models: models.wav2vec2_base(aux_num_out=29),
    "wav2vec2_large": lambda models: models.wav2vec2_large(),
    "wav2vec2_large_lv60k": lambda models: models.wav2vec2_large_lv60k(),
    "hubert_base": lambda models: models.hubert_base(),
    "hubert_large": lambda models: models.hubert_large(),
    "hubert_pretrain_base": lambda models: models.hubert_pretrain_base(),
    "wavlm_base": lambda models: models.wavlm_base(),
    "conv_tasnet_base": lambda models: models.conv_tasnet_base(),
    "emformer_rnnt_base": lambda models: models.emformer_rnnt_base(num_symbols=64),
    "hdemucs_low": lambda models: models.hdemucs_low(["drums", "bass"]),
    "hdemucs_high": lambda models: models.hdemucs_high(["drums", "bass"]),
    "squim_objective_base": lambda models: models.squim_objective_base(),
    "squim_subjective_base": lambda models: models.squim_subjective_base(),
    "Conformer": lambda models: models.Conformer(16, 4, 32, 2, 3),
    "DeepSpeech": lambda models: models.DeepSpeech(16, n_hidden=64),
    "Emformer": lambda models: models.Emformer(16, 4, 32, 2, 4, max_memory_size=2, tanh_on_mem=True),
    "Tacotron2": lambda models: models.Tacotron2(),
    "Wav2Letter": lambda models: models.Wav2Letter(),
    "WaveRNN": lambda models: models.WaveRNN([2, 2, 3], 16, 12, n_rnn=32, n_fc=32),
}

#: These take half a second of sound at 16 kHz and answer with features and lengths.
_HEARS = ("wav2vec2_base", "hubert_base", "wavlm_base")


class TorchaudioFamily(Family):
    """Wav2Vec2, HuBERT and WavLM at their default sizes, and every other architecture of torchaudio."""

    def names(self) -> list[str]:
        return list(_CASES)

    def case(self, name: str) -> Case:
        from torchaudio import models

        return Case(lambda: _CASES[name](models), forward=_hear if name in _HEARS else None)


def _hear(model: nn.Module) -> Tensor:
    sound = torch.linspace(-1.0, 1.0, 8000).sin().unsqueeze(0)
    features: Tensor = model.eval()(sound)[0]
    return features
