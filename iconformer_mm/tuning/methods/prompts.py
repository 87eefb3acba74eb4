"""Methods that add tokens to the sequence."""

from __future__ import annotations

from torch import nn

from iconformer_mm.adapters import PromptAdapter
from iconformer_mm.adapters.base import check_count, check_flag, check_number
from iconformer_mm.registry import PEFT_METHODS

from ..attachments import Attachment, PromptAttachment, PromptStream
from ..sites import Site
from .base import PEFTMethod, TrackerOf


@PEFT_METHODS.register_module(name='vpt')
class VPTMethod(PEFTMethod):
    """Visual prompt tuning (Jia et al., ECCV 2022) of plain ViTs.

    Args:
        num_tokens: Prompt tokens per block. The paper tunes it per task, from 1 to 200.
            Defaults to 10.
        deep: Whether every block gets its own tokens (VPT-deep). If False, the tokens of
            the first block pass through all blocks (VPT-shallow). Defaults to True.
        dropout: Dropout probability of the tokens. Defaults to 0.

    Raises:
        ValueError: An option is out of its range, or a block's attention depends on the positions of its tokens.
    """

    def __init__(self, num_tokens: int = 10, deep: bool = True, dropout: float = 0.0) -> None:
        check_count('num_tokens', num_tokens)
        check_flag('deep', deep)
        check_number('dropout', dropout, low=0, below=1)
        self.num_tokens = num_tokens
        self.deep = deep
        self.dropout = dropout

    def make_attachments(self, backbone: nn.Module, sites: list[Site], tracker_of: TrackerOf) -> list[Attachment]:
        """Create the tokens of every block, or of the first block only."""
        stream = PromptStream()
        attachments: list[Attachment] = []
        for site in sites:
            source = self._make_prompts(site) if self.deep or not attachments else stream
            target = None if self.deep or site is sites[-1] else stream
            attachments.append(PromptAttachment(site, source, target, tracker_of(site)))
        return attachments

    def _make_prompts(self, site: Site) -> PromptAdapter:
        if not site.family.takes_prompts:
            raise ValueError(
                f'{site.family.name} blocks ({site.family.block}) take no prompt tokens: their attention is windowed '
                'or depends on positions. Visual prompt tuning needs plain ViT blocks'
            )
        if site.host is None or site.patch_embed is None:
            raise ValueError(
                f'{site.name} is not in a module with a `patch_embed`, whose size is needed to initialise prompt tokens'
            )
        layers = (nn.Conv2d, nn.Linear)
        layer = next((m for m in site.patch_embed.modules() if isinstance(m, layers)), None)
        if layer is None or site.patch_embed is site.host:
            raise ValueError(
                f'{type(site.host).__name__} has no patch embedding with a convolution or a linear layer, so the size '
                'of a patch is unknown. It is needed to initialise prompt tokens'
            )
        patch_dims = layer.weight[0].numel()
        return PromptAdapter(site.embed_dims, patch_dims, self.num_tokens, self.dropout)
