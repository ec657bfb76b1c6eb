"""The backbones are torchvision's networks: its checkpoints load, and give the same maps."""

import pytest
import torch
from torchvision.models import mobilenet_v2, resnet50
from torchvision.models.feature_extraction import create_feature_extractor

from topiq_core import backbones

PUBLISHED = {
    "resnet50": (resnet50, ["relu", "layer1", "layer2", "layer3", "layer4"]),
    "mobilenet_v2": (mobilenet_v2, [f"features.{tap}" for tap in (1, 3, 6, 13, 18)]),
}


def filled(net, seed):
    """The network with weights and statistics as a trained one might have them."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if "running_var" in name:
                value.uniform_(0.5, 2)
            elif value.dtype.is_floating_point and value.ndim == 1:
                value.normal_(0.5, 0.2)
    return net.eval()


@pytest.mark.parametrize("name", PUBLISHED)
def test_checkpoints_of_torchvision_load_and_give_the_same_maps(name):
    make, nodes = PUBLISHED[name]
    theirs = filled(make(weights=None), seed=0)
    ours = backbones.build(name).eval()
    backbones.load_imagenet(ours, theirs.state_dict())
    image = torch.randn(2, 3, 97, 70, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = list(create_feature_extractor(theirs, nodes)(image).values())
        found = ours(image)
    assert [m.shape[1] for m in found] == list(ours.channels)
    for ours_at, theirs_at in zip(found, expected, strict=True):
        torch.testing.assert_close(ours_at, theirs_at)
