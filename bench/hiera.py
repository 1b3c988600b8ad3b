"""An image classifier on SAM 2's Hiera trunk (Ryali et al. 2023; Ravi et al. 2024): mean of the last features, linear.

transformers has the trunk without a classifier. Its linear layers are called `blocks.N.attn.qkv` (fused), `attn.proj`,
`mlp.proj_in` and `mlp.proj_out`; features are channels last.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig
from transformers.models.sam2.modeling_sam2 import Sam2HieraDetModel


class HieraForImageClassification(PreTrainedModel):
    """Loads a folder of the bare trunk as well as its own: only `classifier` is new then."""

    config: Sam2HieraDetConfig
    config_class = Sam2HieraDetConfig
    base_model_prefix = "trunk"
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: Sam2HieraDetConfig):
        super().__init__(config)
        self.trunk = Sam2HieraDetModel(config)
        self.classifier = nn.Linear(config.embed_dim_per_stage[-1], config.num_labels)  # type: ignore
        self.post_init()

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None, **_: Any) -> ImageClassifierOutput:
        """Logits (batch, labels) of images (batch, 3, height, width); with `labels` (batch,) the mean cross-entropy."""
        features = self.trunk(pixel_values).last_hidden_state  # (batch, height / 32, width / 32, channels)
        logits = self.classifier(features.mean((1, 2)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)
