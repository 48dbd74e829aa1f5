from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import EvaluationError
from map_bo.evaluators.images.classification import ImageClassification
from map_bo.evaluators.images.inputs import (
    ImagesAndText,
    TransformersClip,
    call_on_pixels,
    image_features,
)
from tests.evaluators.images.tiny import SIDE, clip, vit


class Plain(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def test_models_are_called_as_they_are_made() -> None:
    pixels = torch.zeros(2, 3, SIDE, SIDE)
    assert call_on_pixels(vit(), pixels).logits.shape == (2, 3)
    assert call_on_pixels(Plain(), pixels).shape == (2, 3 * SIDE * SIDE)


def test_a_model_of_images_and_text_is_known_by_its_methods() -> None:
    model = clip()
    assert isinstance(model, ImagesAndText)
    assert isinstance(model, TransformersClip)
    assert not isinstance(vit(), ImagesAndText)
    pixels = torch.rand(2, 3, SIDE, SIDE)
    wanted = model.get_image_features(pixel_values=pixels).pooler_output
    torch.testing.assert_close(image_features(model, pixels), wanted)


def test_images_are_not_known_before_they_are_read() -> None:
    made = ImageClassification(data="somewhere")
    for ask in (lambda: made.examples, lambda: made.image_digest, lambda: made.size):
        with pytest.raises(EvaluationError, match="the images have not been read"):
            ask()
