"""`simclr_dist.train` with small encoders of torchvision's own blocks, in which much is drawn at random."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.convnext import CNBlock
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.vision_transformer import EncoderBlock

from simclr_dist import train
from simclr_dist.config import ModelConfig
from simclr_dist.network import encoders

WIDTH = 16


class Mixed(nn.Module):
    """Blocks of convnext_tiny (with a layer scale that shows), swin_t and vit_b_16, all with dropout where they can."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.convnext = CNBlock(WIDTH, layer_scale=1.0, stochastic_depth_prob=0.3)
        self.swin = SwinTransformerBlock(
            WIDTH, 2, [2, 2], [1, 1], dropout=0.1, attention_dropout=0.1, stochastic_depth_prob=0.3
        )
        self.vit = EncoderBlock(2, WIDTH, 2 * WIDTH, dropout=0.1, attention_dropout=0.1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.convnext(self.patches(images)).permute(0, 2, 3, 1)
        x = self.swin(x).flatten(1, 2)
        return self.vit(x).mean(1)


def mixed(config: ModelConfig) -> tuple[nn.Module, int]:
    return Mixed(), WIDTH


encoders.register("mixed", mixed)

if __name__ == "__main__":
    train.main()
